// The page /: the state of the server, requests, and the key. The inputs are in inputs.js.

import { Result, element, outside, showFrom } from "./answers.js";
import { showInputsFor, startInputs, takesFiles, takesPictures, takesRows, takesTexts } from "./inputs.js";
import { percent, say, startLanguage, words } from "./language.js";
import { Failure, checkKey, fetchStatus, hasKey, predict, useKey } from "./server.js";

const AT_ONCE = 16; // files per request
const AT_ONCE_BYTES = 16e6;
const POLL_MS = { ready: 10000, notReady: 1500 };
const MANY_CLASSES = 200; // at most as many names are listed
const MAX_BATCHES = 60; // older ones are removed
const FEW_CLASSES = 12; // up to as many are all shown in an answer, else the first five
const MANY_ENTRIES = 300; // of other lists in an answer, such as boxes
const LEAST = 0.01; // the probability of boxes that the server is asked for; the page shows those from its threshold on

const $ = (id) => document.getElementById(id);
const batches = [];
let status = null; // the last /status
let reached = false; // the server answers
let model = null; // the chosen model: its entry of /status
let description = ""; // what the page shows of it
let waitingForKey = []; // requests that were refused for lack of a key

// ---- The server

async function poll() {
  try {
    status = await fetchStatus();
    reached = true;
    showServer();
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    reached = false;
    notice(failure.kind === "offline" || failure.kind === "late" ? "offline_still" : failure.kind, failure.detail);
  }
}

async function keepPolling() {
  await poll();
  const ready = reached && status.ready && !status.draining;
  setTimeout(pollWhenVisible, ready ? POLL_MS.ready : POLL_MS.notReady);
}

function pollWhenVisible() {
  if (document.hidden) document.addEventListener("visibilitychange", pollWhenVisible, { once: true });
  else keepPolling();
}

function notice(key, detail = "") {
  const box = $("notice");
  box.hidden = key === null;
  if (key === null || (box.dataset.content === key + detail && box.firstChild)) return; // so that a screen reader reads it once
  box.dataset.content = key + detail;
  const text = element("p", "", say(element("span"), key));
  text.append(" ", outside(detail));
  box.replaceChildren(text);
}

const idOf = (entry) => JSON.stringify([entry.name, entry.version]);

function showServer() {
  const { models } = status;
  const same = model && models.find((entry) => idOf(entry) === idOf(model));
  chooseModel(same ?? models.find((entry) => entry.state === "ready") ?? models[0] ?? null);
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
  else list.replaceChildren(...options); // only on a change, since the list may be open
}

function chooseModel(entry) {
  model = entry;
  const { name, version, engine, precision, kind, classes, answer } = entry ?? {};
  const { fields } = entry ?? {};
  const shown = [name, version, engine, precision, kind, classes, fields, answer?.kind, answer?.threshold, status.key_needed];
  const now = JSON.stringify(shown);
  if (now === description) return; // so that scrolling and selection stay
  description = now;
  $("title").textContent = name ?? "suanli";
  document.title = name ? `${name} · suanli` : "suanli";
  $("about").replaceChildren(...(entry ? about(entry) : []));
  showClasses();
  showShell();
  showInputsFor(entry);
  showThreshold(answer?.threshold ?? null);
  const any = !answer || answer.kind === "classes" ? "" : "_any";
  say($("empty"), !kind || takesTexts(entry) || takesRows(entry) || takesFiles(entry) ? `empty${any}` : "only_tensors");
  for (const button of ["ask", "ask-row"]) say($(button), `text_ask${any}`);
  say($("drop-now"), `drop_now${any}`);
}

function about(entry) {
  const { kind, height, width, channels, classes, engine, precision, version } = entry;
  const part = (key, values) => say(element("span"), key, values);
  if (!kind) return [part("version", { version })]; // it has never come up
  const size = { height, width, colour: { key: channels === 1 ? "grey" : "colour" } };
  const texts = takesTexts(entry) ? part("is_text") : element("span", "", outside(kind));
  const what = takesPictures(entry) ? part("is_image", size) : texts;
  const many = classes.length ? [part("classes", { n: classes.length })] : [];
  return [what, ...many, part("by", { engine, precision }), part("version", { version })];
}

// `threshold` is the model's; null: it has none.
function showThreshold(threshold) {
  $("threshold-row").hidden = threshold === null;
  $("threshold").value = threshold ?? 0;
  moveThreshold(threshold ?? 0);
}

function moveThreshold(threshold) {
  $("threshold-value").textContent = percent(threshold);
  showFrom(threshold);
  for (const batch of batches) batch.redraw();
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
  const key = status.key_needed ? ' -H "Authorization: Bearer $SUANLI_API_KEY"' : "";
  const file = takesPictures(model) ? "image.png" : "FILE";
  let [path, what] = [`predict?${new URLSearchParams({ model: model.name })}`, ` -F file=@${file}`];
  if (takesRows(model)) what = ` -H 'Content-Type: text/csv' --data-binary @rows.csv`;
  else if (takesTexts(model)) what = ` -H 'Content-Type: text/plain' --data-binary @text.txt`;
  else if (!takesFiles(model)) [path, what] = [`v2/models/${encodeURIComponent(model.name)}`, ""];
  say($("shell").querySelector("summary"), what ? "shell" : "shell_tensors");
  // A name can hold any character: none may end the quotes.
  const address = new URL(path, location.href.split("#")[0]).href.replaceAll("'", "%27");
  $("shell").querySelector("code").textContent = `curl${key}${what} '${address}'`;
}

// ---- Requests

// Asks for answers to `items` and shows them in `batch`, which keeps its previous content until there is one.
async function ask(batch, items) {
  if (batch.removed) return batch.drop(items);
  batch.request?.abort();
  const request = (batch.request = new AbortController());
  const results = items.map(() => null);
  let answer = null;
  if (!batch.root.isConnected) {
    batches.unshift(batch);
    for (const old of batches.splice(MAX_BATCHES)) old.remove();
    $("list").prepend(batch.root);
    batch.show(items, { results });
  }
  showEmpty();
  try {
    for (const [start, part] of parts(items)) {
      const more = await askPart(part, request.signal);
      if (request.signal.aborted) return batch.drop(items);
      more.results.forEach((result, i) => (results[start + i] = result));
      answer = { ...more, seconds: more.seconds + (answer?.seconds ?? 0), tripS: more.tripS + (answer?.tripS ?? 0) };
      batch.show(items, { results, answer });
    }
    announce(items, results);
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    if (request.signal.aborted) return batch.drop(items);
    const again = () => {
      batch.show(items, {});
      return ask(batch, items);
    };
    batch.show(items, { results, answer, failure: explain(failure), again });
    $("announcer").textContent = words(failure.kind);
    if (failure.kind === "key") askForKey(again);
    else if (failure.kind !== "refused") poll();
    return failure;
  }
}

async function askPart(items, signal) {
  if (!model?.kind) throw new Failure("not_ready");
  const { kind } = model.answer;
  const classes = model.classes.length <= FEW_CLASSES ? Math.max(model.classes.length, 1) : 5;
  const top = kind === "classes" ? classes : MANY_ENTRIES;
  const threshold = (model.answer.threshold ?? null) === null ? null : Math.min(LEAST, model.answer.threshold);
  const input = items[0].text === null ? { files: items.map((item) => item.file) } : items[0];
  const names = model.classes;
  const answer = await predict({ model, top, threshold, files: input.files, text: input.text, row: input.row, signal });
  return { ...answer, results: answer.predictions.map((values, i) => new Result(kind, answer.texts[i], values, names)) };
}

// Parts of at most 16 files and about 16 MB, each with the index of its first item.
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

// 503 means a full server or a model that isn't ready: the last /status says which.
function explain(failure) {
  if (failure.kind !== "full" || failure.status !== 503 || model?.state === "ready") return failure;
  return new Failure("not_ready", failure);
}

function announce(items, results) {
  const [result] = results;
  const title = items[0].name;
  const name = title?.key ? words(title.key) : (title ?? words("text"));
  let text;
  if (results.length > 1) {
    const n = results.filter((each) => each && each.error === null).length;
    text = words("result_many", { n, all: results.length });
  } else if (result.error !== null) text = words("result_error", { name, error: result.error });
  else text = words("result", { name, answer: result.summary() });
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
  waitingForKey.push(again);
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
  for (const again of waitingForKey.splice(0)) again();
}

startLanguage($("language"));
startInputs({ ask, current: () => model });
showEmpty();
$("key-form").addEventListener("submit", tryKey);
$("model").addEventListener("change", () => {
  chooseModel(status.models.find((entry) => idOf(entry) === $("model").value) ?? model);
  showServer();
});
$("threshold").addEventListener("input", () => moveThreshold(Number($("threshold").value)));
$("forget").addEventListener("click", () => {
  for (const batch of batches.splice(0)) batch.remove();
  showEmpty();
});
keepPolling();
