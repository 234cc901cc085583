// The page /health: shows /status, and refreshes it every 2 s while the page is visible.

import { brief, count, label, long, say, startLanguage } from "./language.js";
import { Failure, fetchStatus } from "./server.js";

const EVERY_MS = 2000;
const STATES = ["ready", "loading", "failed", "draining"];

const $ = (id) => document.getElementById(id);
let latest = null; // the last /status, and its time
let previous = null; // the one before it, for rates

// Each column: the key of its title, and the cell for a model; `n` marks numbers.
const COLUMNS = [
  { key: "model", of: nameCell, row: true },
  { key: "state", of: stateCell },
  { key: "engine", of: (entry) => [entry.engine, entry.precision].filter(Boolean).join(" ") || "–" },
  { key: "requests", of: (entry) => number(entry.requests), n: true },
  { key: "rate", of: rate, n: true },
  { key: "waiting", of: (entry) => number(entry.waiting), n: true },
  { key: "p50", of: (entry) => ms(entry.p50_ms), n: true },
  { key: "p99", of: (entry) => ms(entry.p99_ms), n: true },
  { key: "turned_away", of: (entry) => number(entry.refused), n: true },
  { key: "errors", of: (entry) => number(entry.failed), n: true },
  { key: "restarts", of: (entry) => number(entry.restarts), n: true },
];

// A model that never came up has no numbers.
const number = (value) => (Number.isFinite(value) ? count(value) : "–");
const ms = (value) => (Number.isFinite(value) ? brief(value / 1000) : "–");
const idOf = (entry) => JSON.stringify([entry.name, entry.version]);

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function outside(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}

function nameCell(entry) {
  return make("span", "", outside("bdi", entry.name), say(make("small"), "version", { version: entry.version }));
}

function stateCell(entry) {
  const known = STATES.includes(entry.state) ? entry.state : "failed";
  const state = make("span", `state ${known}`, say(make("span"), `state_${entry.state}`));
  const dot = make("i");
  dot.setAttribute("aria-hidden", "true");
  state.prepend(dot);
  const cell = make("span", "", state);
  if (entry.reason && known !== "ready") cell.append(outside("small", entry.reason));
  return cell;
}

// Requests per second between the last two refreshes.
function rate(entry) {
  const old = previous?.status.models.find((other) => idOf(other) === idOf(entry));
  if (!old || !(entry.requests >= old.requests)) return "–";
  const perSecond = (1000 * (entry.requests - old.requests)) / (latest.at - previous.at);
  return perSecond < 9.95 ? perSecond.toFixed(1) : count(Math.round(perSecond));
}

function overall({ models, ready, draining }) {
  if (draining) return ["health_draining", "draining"];
  if (models.length === 0) return ["health_none", "failed"];
  if (ready) return ["health_ready", "ready"];
  const some = models.some((entry) => entry.state === "ready");
  const loading = models.some((entry) => entry.state === "loading");
  return some ? ["health_partly", "draining"] : ["health_not", loading ? "loading" : "failed"];
}

function showState(key, state) {
  const title = $("overall");
  const text = title.lastElementChild;
  title.className = `state ${state}`;
  if (text.dataset.t !== key) say(text, key); // so that a screen reader doesn't repeat it
}

function showModels({ models }) {
  const head = $("models").querySelector("thead tr");
  if (!head.firstChild) head.append(...COLUMNS.map(({ key, n }) => heading(key, n)));
  $("models").hidden = models.length === 0;
  const body = $("models").querySelector("tbody");
  const ids = models.map(idOf);
  if ([...body.children].map((row) => row.dataset.id).join() !== ids.join()) {
    body.replaceChildren(...ids.map(emptyRow));
  }
  models.forEach((entry, i) => {
    COLUMNS.forEach(({ of }, j) => {
      const value = body.children[i].children[j].lastElementChild;
      const fresh = make("span", "value", of(entry));
      if (!fresh.isEqualNode(value)) value.replaceWith(fresh); // unchanged cells keep focus and selection
    });
  });
}

function heading(key, n) {
  const cell = say(make("th", n ? "n" : ""), key);
  cell.scope = "col";
  cell.setAttribute("role", "columnheader");
  return cell;
}

// The roles are explicit, since a narrow page shows the table as blocks, which removes them.
function emptyRow(id) {
  const row = make("tr");
  row.dataset.id = id;
  row.setAttribute("role", "row");
  for (const { key, n, row: first } of COLUMNS) {
    const cell = make(first ? "th" : "td", n ? "n" : "");
    if (first) cell.scope = "row";
    cell.setAttribute("role", first ? "rowheader" : "cell");
    const caption = say(make("span", "caption"), key); // visible where the table's head is not
    caption.setAttribute("aria-hidden", "true");
    cell.append(caption, make("span", "value"));
    row.append(cell);
  }
  return row;
}

async function refresh() {
  try {
    const status = await fetchStatus();
    previous = latest;
    latest = { status, at: performance.now() };
    showState(...overall(status));
    say($("about"), "health_about", { version: status.version, time: long(status.uptime_s) });
    $("since").hidden = true;
    showModels(status);
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    showState("health_lost", "failed");
    $("since").hidden = latest === null;
    if (latest) say($("since"), "health_since", { time: long((performance.now() - latest.at) / 1000) });
  }
}

async function keepRefreshing() {
  const started = performance.now();
  await refresh();
  const wait = () => setTimeout(keepRefreshing, Math.max(EVERY_MS - (performance.now() - started), 500));
  if (document.hidden) document.addEventListener("visibilitychange", keepRefreshing, { once: true });
  else wait();
}

startLanguage($("language"));
label($("models"), "table");
keepRefreshing();
