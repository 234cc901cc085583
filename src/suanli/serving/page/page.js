// The page at /: what the server is like, asking it, and the key. The ways in are in inputs.js.

import { element, outside } from "./answers.js";
import { openWaysFor, startInputs } from "./inputs.js";
import { percent, say, startLanguage, words } from "./language.js";
import { Failure, checkKey, fetchStatus, hasKey, predict, useKey } from "./server.js";

const AT_ONCE = 16; // files in one request
const AT_ONCE_BYTES = 16e6;
const POLL_MS = { well: 10000, ill: 1500 };
const MANY_CLASSES = 200; // names that are listed
const KEPT = 60; // batches; the oldest goes
const ALL_SHOWN = 12; // as many classes are all shown in an answer, else the first five

const $ = (id) => document.getElementById(id);
const batches = [];
let status = null; // the last one that came
let reached = false; // the server answers
let model = null; // the entry of /status that is asked
let shown = ""; // what the page says of it
let heldByKey = []; // questions that were refused for want of a key

// ---- What the server is like

async function poll() {
  try {
    status = await fetchStatus();
    reached = true;
    showServer();
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    reached = false;
    notice(failure.kind === "offline" || failure.kind === "late" ? "offline_still" : failure.kind, failure.told);
  }
}

async function keepPolling() {
  await poll();
  const well = reached && status.ready && !status.draining;
  setTimeout(whenSeen, well ? POLL_MS.well : POLL_MS.ill);
}

function whenSeen() {
  if (document.hidden) document.addEventListener("visibilitychange", whenSeen, { once: true });
  else keepPolling();
}

function notice(key, told = "") {
  const box = $("notice");
  box.hidden = key === null;
  if (key === null || (box.dataset.said === key + told && box.firstChild)) return; // said once, not at every poll
  box.dataset.said = key + told;
  const text = element("p", "", say(element("span"), key));
  text.append(" ", outside(told));
  box.replaceChildren(text);
}

const idOf = (entry) => JSON.stringify([entry.name, entry.version]);

function showServer() {
  const { models } = status;
  const before = model && models.find((entry) => idOf(entry) === idOf(model));
  chooseModel(before ?? models.find((entry) => entry.state === "ready") ?? models[0] ?? null);
  showChoice();
  if (status.draining) notice("draining");
  else if (!model) notice("no_models");
  else if (model.state === "ready") notice(null);
  else notice(["failed", "draining"].includes(model.state) ? model.state : "loading", model.reason ?? "");
  if (status.key_needed && !hasKey()) $("key-form").hidden = false;
  if (!status.key_needed) $("key-form").hidden = true;
}

function showChoice() {
  const { models } = status;
  const twice = new Set(models.map((entry) => entry.name)).size < models.length;
  $("choice").hidden = models.length < 2;
  const options = models.map((entry) => {
    const option = new Option(twice ? `${entry.name} · ${entry.version}` : entry.name, idOf(entry));
    option.selected = model !== null && idOf(entry) === idOf(model);
    return option;
  });
  const list = $("model");
  const same = options.length === list.length && options.every((option, i) => option.value === list.options[i].value);
  if (same) list.value = model === null ? "" : idOf(model);
  else list.replaceChildren(...options); // not while it is open and nothing is new
}

function chooseModel(entry) {
  model = entry;
  const { name, version, engine, precision, kind, classes, draws } = entry ?? {};
  const fresh = JSON.stringify([name, version, engine, precision, kind, classes, draws, status.key_needed]);
  if (fresh === shown) return; // what somebody reads, selects or has scrolled stays as it is
  shown = fresh;
  $("title").textContent = name ?? "suanli";
  document.title = name ? `${name} · suanli` : "suanli";
  $("about").replaceChildren(...(entry ? about(entry) : []));
  showClasses();
  showShell();
  openWaysFor(entry);
}

function about({ kind, height, width, channels, classes, engine, precision, version }) {
  const part = (key, values) => say(element("span"), key, values);
  if (!kind) return [part("version", { version })]; // it never came up
  const size = { height, width, colour: { key: channels === 1 ? "grey" : "colour" } };
  const what = kind === "text" ? part("is_text") : part("is_image", size);
  const many = part("classes", { n: classes.length });
  return [what, many, part("by", { engine, precision }), part("version", { version })];
}

function showClasses() {
  const names = model?.classes ?? [];
  const [summary, list] = $("classes").children;
  $("classes").hidden = names.length === 0;
  say(summary, "knows", { n: names.length });
  list.replaceChildren(...names.slice(0, MANY_CLASSES).map((name) => element("li", "", outside(name))));
  const more = names.length - MANY_CLASSES;
  if (more > 0) list.append(say(element("li", "note"), "more", { n: more }));
}

function showShell() {
  $("shell").hidden = !model?.kind;
  if (!model?.kind) return;
  const address = new URL("predict", location.href);
  address.hash = "";
  address.search = new URLSearchParams({ model: model.name });
  const key = status.key_needed ? ' -H "Authorization: Bearer $SUANLI_API_KEY"' : "";
  const what = model.kind === "text" ? `-H 'Content-Type: text/plain' --data-binary @text.txt` : "-F file=@picture.png";
  // A name can hold any character: none may end the quotes.
  $("shell").querySelector("code").textContent = `curl${key} ${what} '${address.href.replaceAll("'", "%27")}'`;
}

// ---- Asking

// Asks about `items`, and shows what came in `batch`. What a batch showed before stays until there is an answer.
async function ask(batch, items) {
  if (batch.gone) return batch.drop(items);
  batch.asked?.abort();
  const asked = (batch.asked = new AbortController());
  const found = items.map(() => null);
  let answer = null;
  if (!batch.root.isConnected) {
    batches.unshift(batch);
    for (const old of batches.splice(KEPT)) old.remove();
    $("list").prepend(batch.root);
    batch.show(items, { found });
  }
  showEmpty();
  try {
    for (const [start, part] of parts(items)) {
      const more = await askPart(part, asked.signal);
      if (asked.signal.aborted) return batch.drop(items);
      more.predictions.forEach((prediction, i) => (found[start + i] = prediction));
      answer = { ...more, seconds: more.seconds + (answer?.seconds ?? 0), tripS: more.tripS + (answer?.tripS ?? 0) };
      batch.show(items, { found, answer });
    }
    announce(items, found);
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    if (asked.signal.aborted) return batch.drop(items);
    const again = () => {
      batch.show(items, {});
      return ask(batch, items);
    };
    batch.show(items, { found, answer, failure: told(failure), again });
    $("announcer").textContent = words(failure.kind);
    if (failure.kind === "key") askForKey(again);
    else if (failure.kind !== "refused") poll();
    return failure;
  }
}

async function askPart(items, signal) {
  if (!model?.kind) throw new Failure("not_ready");
  const top = model.classes.length <= ALL_SHOWN ? Math.max(model.classes.length, 1) : 5;
  if (items[0].text !== null) return predict({ model, top, text: items[0].text, signal });
  return predict({ model, top, files: items.map((item) => item.file), signal });
}

// Pieces of at most 16 files and about 16 MB, each with the number of its first item.
function* parts(items) {
  let start = 0;
  while (start < items.length) {
    let [end, bytes] = [start, 0];
    do bytes += items[end++].file?.size ?? 0;
    while (end < items.length && end - start < AT_ONCE && bytes + (items[end].file?.size ?? 0) <= AT_ONCE_BYTES);
    yield [start, items.slice(start, end)];
    start = end;
  }
}

// 503 is a full server or a model that isn't there yet: the last /status knows which.
function told(failure) {
  if (failure.kind !== "full" || failure.status !== 503 || model?.state === "ready") return failure;
  return new Failure("not_ready", failure);
}

function announce(items, found) {
  const [prediction] = found;
  const { name: given } = items[0];
  const name = given?.key ? words(given.key) : (given ?? words("text"));
  let text;
  if (found.length > 1) {
    const n = found.filter((one) => one && one.error === null).length;
    text = words("told_many", { n, all: found.length });
  } else if (prediction.error !== null) text = words("told_error", { name, error: prediction.error });
  else text = words("told", { name, label: prediction.label, share: percent(prediction.probability) });
  $("announcer").textContent = text;
}

function showEmpty() {
  const none = !$("list").firstChild;
  $("empty").hidden = !none;
  $("forget").hidden = none;
}

// ---- The key

function askForKey(again) {
  if (hasKey()) {
    useKey("");
    say($("key-note"), "key_wrong");
  }
  heldByKey.push(again);
  $("key-form").hidden = false;
  $("key").focus();
}

async function tryKey(event) {
  event.preventDefault();
  useKey($("key").value.trim());
  say($("key-note"), "key_checking");
  try {
    await checkKey();
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    useKey("");
    say($("key-note"), failure.kind === "key" ? "key_wrong" : failure.kind);
    $("key").select();
    return;
  }
  $("key").value = "";
  $("key-form").hidden = true;
  say($("key-note"), "key_kept");
  for (const again of heldByKey.splice(0)) again();
}

startLanguage($("language"));
startInputs({ ask, current: () => model });
showEmpty();
$("key-form").addEventListener("submit", tryKey);
$("model").addEventListener("change", () => {
  chooseModel(status.models.find((entry) => idOf(entry) === $("model").value) ?? model);
  showServer();
});
$("forget").addEventListener("click", () => {
  for (const batch of batches.splice(0)) batch.remove();
  showEmpty();
});
keepPolling();
