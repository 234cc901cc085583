// The list of answers: one Batch for each drop, drawing, photograph or text, the newest first.
//
// Everything from outside (names of classes, files and models, the server's messages) is set as text, never as HTML.

import { brief, percent, say, words } from "./language.js";

const SMALL = 64; // px: pictures up to this width are enlarged with sharp pixels
const LONG = 14; // characters: longer names of classes are above their bars, in smaller type
const LISTED = 12; // boxes beside an image; all are drawn on it
const CROWDED = 25; // boxes: from here on a name is shown only while the pointer is at its box

// Of Okabe and Ito, which people with any of the usual kinds of colour blindness can tell apart; as data/drawing.py has
// them.
const COLORS = ["#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2"];
const DARK = new Set(["#d55e00", "#0072b2", "#009e73"]); // letters on these are white

let shownFrom = 0; // the probability from which a box is shown

// Of all boxes on the page. The server has sent those below, too.
export function showFrom(probability) {
  shownFrom = probability;
}

export function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

// Text from outside, which may run in either direction.
export function outside(text) {
  const node = document.createElement("bdi");
  node.textContent = text;
  return node;
}

// One input. `name` is text, or {key} for an input that the page made itself.
export class Item {
  constructor({ name, file = null, text = null, row = null }) {
    Object.assign(this, { name, file, text, row }); // of a row, the text is what people see
    this.address = file && URL.createObjectURL(file);
    this.preview = file ? this.#picture() : this.#quote();
  }

  drop() {
    if (this.address) URL.revokeObjectURL(this.address);
  }

  title() {
    return this.name.key ? say(element("span"), this.name.key) : outside(this.name);
  }

  #picture() {
    const image = element("img", "preview");
    image.alt = "";
    image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth <= SMALL));
    image.addEventListener("error", () => image.replaceWith((this.preview = element("span", "preview missing", "?"))));
    image.src = this.address;
    return image;
  }

  #quote() {
    const quote = element("blockquote", "preview");
    quote.dir = "auto";
    quote.textContent = this.text;
    return quote;
  }
}

// The answer to one input: how to show it, a line for people, its values, or why there is none. `classes` are all that
// the model knows.
export class Result {
  constructor(kind, text, { name, error, flags = [], input, ...values }, classes = []) {
    Object.assign(this, { kind, text, error, flags, values, classes }); // flags: why the answer may be worth less
  }

  summary() {
    const { label, probability } = this.values;
    if (this.kind === "boxes") return counted(this.boxes()) || words("nothing");
    return this.kind === "classes" ? `${label}, ${percent(probability)}` : this.text;
  }

  boxes() {
    return this.values.boxes.filter(({ probability }) => (probability ?? 1) >= shownFrom);
  }
}

// "3 cat, 1 dog", the most frequent first; empty for no box.
function counted(boxes) {
  const counts = new Map();
  for (const { label } of boxes) counts.set(label, (counts.get(label) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).map(([label, n]) => `${n} ${label}`).join(", ");
}

export class Batch {
  #items = [];
  #results = [];
  #timer = 0;

  constructor() {
    this.root = element("article", "batch");
    this.request = null; // the AbortController of the open request
    this.removed = false; // then the next request needs a new batch
  }

  // Draws the batch anew. `results` has one for each item, or null if there is none yet. `answer` is the last answer of
  // the server, with the sums of `seconds` and `tripS`; `failure` says why the rest has none, `again` asks again.
  show(items, { results = [], answer = null, failure = null, again = null }) {
    clearInterval(this.#timer);
    const previous = this.#items;
    this.#items = items;
    this.#results = results;
    this.drop(previous);
    this.root.className = `batch ${items.length === 1 ? "single" : "many"} ${items[0].text === null ? "" : "quoted"}`;
    this.root.replaceChildren(element("ul", "items", ...this.#rows(failure)));
    if (failure) this.root.append(this.#banner(failure, again));
    if (answer) this.root.append(byline(answer));
  }

  // Draws boxes anew after `showFrom`.
  redraw() {
    if (!this.#results.some((result) => result?.kind === "boxes")) return;
    this.#rows(null).forEach((row, i) => {
      if (this.#results[i]?.kind === "boxes") this.root.firstChild.children[i].replaceWith(row);
    });
  }

  #rows(failure) {
    const most = this.#items.length === 1 ? Infinity : 3;
    return this.#items.map((item, i) => row(item, this.#results[i], most, failure));
  }

  // Releases the items that are not shown.
  drop(items) {
    for (const item of items) if (!this.#items.includes(item)) item.drop();
  }

  remove() {
    this.removed = true;
    clearInterval(this.#timer);
    this.request?.abort();
    this.drop(this.#items.splice(0));
    this.root.remove();
  }

  #banner(failure, again) {
    const text = element("p", "", say(element("strong"), failure.kind));
    if (failure.detail) text.append(" ", outside(failure.detail));
    const banner = element("div", "banner", text);
    if (!again) return banner;
    const button = element("button");
    button.type = "button";
    button.addEventListener("click", again);
    banner.append(element("p", "row", button));
    this.#countDown(button, Math.ceil(failure.retryAfterS ?? 0));
    return banner;
  }

  // Enables "Try again" after the time that the server asked for.
  #countDown(button, seconds) {
    let left = seconds;
    const tick = () => {
      button.disabled = left > 0;
      say(button, left > 0 ? "again_in" : "again", { n: left });
      if (left-- <= 0) clearInterval(this.#timer);
    };
    if (left > 0) this.#timer = setInterval(tick, 1000);
    tick();
  }
}

function row(item, result, most, failure) {
  const cell = element("div");
  let picture = item.preview;
  if (result && result.error === null) {
    const { kind, text, values } = result;
    if (kind === "boxes") {
      picture = boxed(item.preview, result.boxes(), result.classes);
      cell.append(...listBoxes(result.boxes(), Math.min(most, LISTED)));
    } else cell.append(...(SHOW[kind] ?? showValues)(text, values, most));
    cell.append(...result.flags.map((flag) => element("p", "note", outside(flag))));
  } else if (result) {
    cell.append(say(element("p", "label none"), "no_answer"), element("p", "bad", outside(result.error)));
  } else {
    cell.append(say(element("p", "label none"), failure ? "no_answer" : "pending"));
  }
  if (item.text === null) cell.append(element("p", "note file", item.title()));
  return element("li", picture === item.preview ? "item" : "item wide", picture, cell);
}

// What stands beside an input, by the kind of its answer.
const SHOW = {
  classes: (text, { label, probabilities }, most) => [
    headline(label),
    bars(Object.entries(probabilities).sort((a, b) => b[1] - a[1]), most),
  ],
  labels: (text, { labels, probabilities }, most) => [
    headline(labels.join(", ") || text),
    bars(Object.entries(probabilities).sort((a, b) => b[1] - a[1]), most),
  ],
  value: (text) => [headline(text)],
};

const listBoxes = (boxes, most) => [
  boxes.length ? headline(counted(boxes)) : say(element("p", "label none"), "nothing"),
  bars(boxes.map(({ label, probability }) => [label, probability]), most),
  ...(boxes.length > most ? [say(element("p", "note"), "more", { n: boxes.length - most })] : []),
];

const headline = (text) => element("p", text.length > LONG ? "label long" : "label", outside(text));

const showValues = (text, values) => [
  ...(text ? [headline(text)] : []),
  element("pre", "", element("code", "", outside(JSON.stringify(values, null, 2)))),
];

function bars(shares, most) {
  const first = shares.slice(0, most);
  const long = first.some(([name]) => name.length > LONG);
  const list = element("ol", long ? "bars long" : "bars");
  for (const [name, share] of first) {
    const bar = element("i", "bar");
    bar.setAttribute("aria-hidden", true);
    bar.style.setProperty("--v", share);
    const value = element("span", "value", percent(share));
    list.append(element("li", "", element("span", "name", outside(name)), bar, value));
  }
  return list;
}

// A picture with boxes on it, whose sides are in its own pixels. The best is on top.
function boxed(image, boxes, classes) {
  const figure = element("figure", boxes.length > CROWDED ? "boxed crowded" : "boxed", image);
  const draw = () => {
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    const share = (value, whole) => `${(100 * Math.min(Math.max(value / whole, 0), 1)).toFixed(3)}%`;
    for (const [i, { label, probability, box: [left, top, right, bottom] }] of boxes.entries()) {
      // The name begins at the side that has more room, above the box where it hides nothing of it.
      const inside = ["box", left + right < width ? "" : "right", top > height / 14 ? "above" : ""].join(" ");
      const frame = element("span", inside, element("span", "", outside(label), ` ${percent(probability)}`));
      const color = COLORS[Math.max(classes.indexOf(label), 0) % COLORS.length];
      frame.style.setProperty("--tone", color);
      frame.style.setProperty("--on-tone", DARK.has(color) ? "#fff" : "#111");
      frame.style.zIndex = boxes.length - i;
      frame.style.left = share(left, width);
      frame.style.top = share(top, height);
      frame.style.width = share(right - Math.max(left, 0), width);
      frame.style.height = share(bottom - Math.max(top, 0), height);
      figure.append(frame);
    }
  };
  if (image.naturalWidth) draw();
  else image.addEventListener("load", draw, { once: true });
  return figure;
}

function byline({ seconds, tripS, engine, precision, model, version }) {
  const part = (key, values) => say(element("span"), key, values);
  return element(
    "p",
    "note by",
    part("took", { server: brief(seconds), trip: brief(tripS) }),
    part("by", { engine, precision }),
    part("by_model", { model, version }),
  );
}
