// The page at /health: /status for people, asked every 2 s while somebody looks.

import { brief, count, label, long, say, startLanguage } from "./language.js";
import { Failure, fetchStatus } from "./server.js";

const EVERY_MS = 2000;
const STATES = ["ready", "loading", "failed", "draining"];

const $ = (id) => document.getElementById(id);
let seen = null; // the last /status, and when it came
let before = null; // the one before it, for rates

// A column: its word, and the cell's text for a model; `n` for numbers.
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

// A model that never came up has no figures.
const number = (value) => (Number.isFinite(value) ? count(value) : "–");
const ms = (value) => (Number.isFinite(value) ? brief(value / 1000) : "–");
const idOf = (entry) => JSON.stringify([entry.name, entry.version]);

function make(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function outside(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
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

// Requests per second between the last two looks.
function rate(entry) {
  const old = before?.status.models.find((other) => idOf(other) === idOf(entry));
  if (!old || !(entry.requests >= old.requests)) return "–";
  const perSecond = (1000 * (entry.requests - old.requests)) / (seen.at - before.at);
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
  if (text.dataset.t !== key) say(text, key); // not said again while nothing changed
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
      if (!fresh.isEqualNode(value)) value.replaceWith(fresh); // what is as it was keeps focus and selection
    });
  });
}

function heading(key, n) {
  const cell = say(make("th", n ? "n" : ""), key);
  cell.scope = "col";
  cell.setAttribute("role", "columnheader");
  return cell;
}

// The roles are said because a narrow page lays the table out as blocks, which takes them away.
function emptyRow(id) {
  const row = make("tr");
  row.dataset.id = id;
  row.setAttribute("role", "row");
  for (const { key, n, row: first } of COLUMNS) {
    const cell = make(first ? "th" : "td", n ? "n" : "");
    if (first) cell.scope = "row";
    cell.setAttribute("role", first ? "rowheader" : "cell");
    const told = say(make("span", "told"), key); // shown where the head of the column isn't
    told.setAttribute("aria-hidden", "true");
    cell.append(told, make("span", "value"));
    row.append(cell);
  }
  return row;
}

async function look() {
  try {
    const status = await fetchStatus();
    before = seen;
    seen = { status, at: performance.now() };
    showState(...overall(status));
    say($("about"), "health_about", { version: status.version, time: long(status.uptime_s) });
    $("since").hidden = true;
    showModels(status);
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    showState("health_lost", "failed");
    $("since").hidden = seen === null;
    if (seen) say($("since"), "health_since", { time: long((performance.now() - seen.at) / 1000) });
  }
}

async function keepLooking() {
  const started = performance.now();
  await look();
  const wait = () => setTimeout(keepLooking, Math.max(EVERY_MS - (performance.now() - started), 500));
  if (document.hidden) document.addEventListener("visibilitychange", keepLooking, { once: true });
  else wait();
}

startLanguage($("language"));
label($("models"), "table");
keepLooking();
