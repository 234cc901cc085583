// What was asked and what came back: one Batch for each drop, drawing, photograph or text, the newest first.
//
// Everything from outside (names of classes, files and models, the server's sentences) is set as text.

import { brief, percent, say } from "./language.js";

const SMALL = 64; // px: a picture of at most this width is shown with its pixels
const LONG = 14; // characters: longer names of classes stand above their bars, in smaller type

export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// Text from outside: it may be of any direction.
export function outside(text) {
  const made = document.createElement("bdi");
  made.textContent = text;
  return made;
}

// One thing to ask about. `name` is text, or {key} for what the page itself made.
export class Item {
  constructor({ name, file = null, text = null }) {
    Object.assign(this, { name, file, text });
    this.address = file && URL.createObjectURL(file);
    this.shown = file ? this.#picture() : this.#quote();
  }

  drop() {
    if (this.address) URL.revokeObjectURL(this.address);
  }

  title() {
    return this.name.key ? say(element("span"), this.name.key) : outside(this.name);
  }

  #picture() {
    const image = element("img", "shown");
    image.alt = "";
    image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth <= SMALL));
    image.addEventListener("error", () => image.replaceWith((this.shown = element("span", "shown unshown", "?"))));
    image.src = this.address;
    return image;
  }

  #quote() {
    const quote = element("blockquote", "shown");
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
    this.asked = null; // the AbortController of the question that is open
    this.gone = false; // removed: what is asked next is another batch
  }

  // Draws all of it anew. `found` has a prediction for each item, or null: not yet. `answer` is the last whole answer
  // of the server, with the sums of `seconds` and `tripS`; `failure` says why the rest got none, `again` asks again.
  show(items, { found = [], answer = null, failure = null, again = null }) {
    clearInterval(this.#timer);
    const [before, after] = [this.#items, items];
    this.#items = after;
    this.drop(before);
    const most = items.length === 1 ? Infinity : 3;
    const list = element("ul", "items", ...items.map((item, i) => row(item, found[i], most, failure)));
    this.root.className = `batch ${items.length === 1 ? "single" : "many"} ${items[0].text === null ? "" : "quoted"}`;
    this.root.replaceChildren(list);
    if (failure) this.root.append(this.#trouble(failure, again));
    if (answer) this.root.append(byline(answer));
  }

  // Items that are not shown are done with.
  drop(items) {
    for (const item of items) if (!this.#items.includes(item)) item.drop();
  }

  remove() {
    this.gone = true;
    clearInterval(this.#timer);
    this.asked?.abort();
    this.drop(this.#items.splice(0));
    this.root.remove();
  }

  #trouble(failure, again) {
    const told = element("p", "", say(element("strong"), failure.kind));
    if (failure.told) told.append(" ", outside(failure.told));
    const trouble = element("div", "banner", told);
    if (!again) return trouble;
    const button = element("button");
    button.type = "button";
    button.addEventListener("click", again);
    trouble.append(element("p", "row", button));
    this.#countDown(button, Math.ceil(failure.retryAfterS ?? 0));
    return trouble;
  }

  // "Try again" can be pressed when the server said that it is of use.
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
  const said = element("div", "said");
  if (prediction && prediction.error === null) {
    const size = prediction.label.length > LONG ? "label long" : "label";
    said.append(element("p", size, outside(prediction.label)), bars(prediction.probabilities, most));
  } else if (prediction) {
    said.append(say(element("p", "label none"), "no_answer"), element("p", "bad", outside(prediction.error)));
  } else {
    said.append(say(element("p", "label none"), failure ? "no_answer" : "pending"));
  }
  if (item.text === null) said.append(element("p", "note file", item.title()));
  return element("li", "item", item.shown, said);
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
