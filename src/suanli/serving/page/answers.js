// The list of answers: one Batch for each drop, drawing, photograph or text, the newest first.
//
// Everything from outside (names of classes, files and models, the server's messages) is set as text, never as HTML.

import { brief, percent, say } from "./language.js";

const SMALL = 64; // px: pictures up to this width are enlarged with sharp pixels
const LONG = 14; // characters: longer names of classes are above their bars, in smaller type

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
  constructor({ name, file = null, text = null }) {
    Object.assign(this, { name, file, text });
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

export class Batch {
  #items = [];
  #timer = 0;

  constructor() {
    this.root = element("article", "batch");
    this.request = null; // the AbortController of the open request
    this.removed = false; // then the next request needs a new batch
  }

  // Draws the batch anew. `predictions` has one for each item, or null if there is none yet. `answer` is the last answer
  // of the server, with the sums of `seconds` and `tripS`; `failure` says why the rest has none, `again` asks again.
  show(items, { predictions = [], answer = null, failure = null, again = null }) {
    clearInterval(this.#timer);
    const previous = this.#items;
    this.#items = items;
    this.drop(previous);
    const most = items.length === 1 ? Infinity : 3;
    const list = element("ul", "items", ...items.map((item, i) => row(item, predictions[i], most, failure)));
    this.root.className = `batch ${items.length === 1 ? "single" : "many"} ${items[0].text === null ? "" : "quoted"}`;
    this.root.replaceChildren(list);
    if (failure) this.root.append(this.#banner(failure, again));
    if (answer) this.root.append(byline(answer));
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

function row(item, prediction, most, failure) {
  const result = element("div");
  if (prediction && prediction.error === null) {
    const size = prediction.label.length > LONG ? "label long" : "label";
    result.append(element("p", size, outside(prediction.label)), bars(prediction.probabilities, most));
  } else if (prediction) {
    result.append(say(element("p", "label none"), "no_answer"), element("p", "bad", outside(prediction.error)));
  } else {
    result.append(say(element("p", "label none"), failure ? "no_answer" : "pending"));
  }
  if (item.text === null) result.append(element("p", "note file", item.title()));
  return element("li", "item", item.preview, result);
}

function bars(probabilities, most) {
  const sorted = Object.entries(probabilities).sort((a, b) => b[1] - a[1]).slice(0, most);
  const long = sorted.some(([name]) => name.length > LONG);
  const list = element("ol", long ? "bars long" : "bars");
  for (const [name, share] of sorted) {
    const bar = element("i", "bar");
    bar.setAttribute("aria-hidden", true);
    bar.style.setProperty("--v", share);
    const value = element("span", "value", percent(share));
    list.append(element("li", "", element("span", "name", outside(name)), bar, value));
  }
  return list;
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
