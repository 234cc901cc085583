// Requests to the server: /status, /predict, and whether a key is accepted. Addresses are relative to the page, so that
// it also works under a proxy's prefix.

const KEY = "suanli.key";
const STATUS_LIMIT_MS = 5000;
const PREDICT_LIMIT_MS = 120000;

// Why there is no answer. `kind` is the key of a text; `detail` is the server's own message, if it sent one.
export class Failure extends Error {
  constructor(kind, { status = 0, detail = "", retryAfterS = null } = {}) {
    super(detail || kind);
    Object.assign(this, { kind, status, detail, retryAfterS });
  }
}

let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // the browser has no storage: the key lasts as long as the page
}

export const hasKey = () => key !== "";

export function useKey(value) {
  key = value;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // as above
  }
}

export async function fetchStatus() {
  const response = await ask("status", { headers: authorization() }, STATUS_LIMIT_MS);
  return (await body(response)) ?? fail(response, {});
}

// Throws Failure("key") if the key isn't accepted.
export async function checkKey() {
  const response = await ask("v2", { headers: authorization() }, STATUS_LIMIT_MS);
  if (response.status === 401) throw new Failure("key", { status: 401 });
}

// The server's answer for files or one text, with `tripS`: the seconds until the whole answer was here.
export async function predict({ model, top, threshold = null, files = null, text = null, row = null, signal = null }) {
  const query = new URLSearchParams({ model: model.name, version: model.version, top });
  if (threshold !== null) query.set("threshold", threshold);
  const headers = authorization();
  let content;
  if (files) {
    content = new FormData();
    for (const file of files) content.append("file", file, file.name);
  } else {
    headers["Content-Type"] = "application/json";
    content = JSON.stringify(row ? { rows: [row] } : { inputs: [text] });
  }
  const started = performance.now();
  const response = await ask(`predict?${query}`, { method: "POST", headers, body: content, signal }, PREDICT_LIMIT_MS);
  const answer = await body(response);
  const tripS = (performance.now() - started) / 1000;
  if (!answer?.predictions) fail(response, answer ?? {}); // where no input can be read, each has its own error
  return { ...answer, tripS };
}

const authorization = () => (key ? { Authorization: `Bearer ${key}` } : {});

async function ask(address, options, limitMs) {
  const control = new AbortController();
  const outer = options.signal;
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    control.abort();
  }, limitMs);
  const stop = () => control.abort();
  if (outer?.aborted) stop();
  outer?.addEventListener("abort", stop);
  try {
    return await fetch(address, { ...options, signal: control.signal, cache: "no-store" });
  } catch {
    if (outer?.aborted) throw new Failure("withdrawn");
    throw new Failure(late ? "late" : "offline");
  } finally {
    clearTimeout(timer);
    outer?.removeEventListener("abort", stop);
  }
}

async function body(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error instanceof SyntaxError) return null; // not JSON: the answer of a proxy
    throw new Failure(error.name === "AbortError" ? "withdrawn" : "offline");
  }
}

function fail(response, answer) {
  const { status } = response;
  const detail = typeof answer.error === "string" ? answer.error : "";
  const after = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  const kinds = { 401: "key", 413: "large", 429: "full", 503: "full", 504: "late" };
  const kind = kinds[status] ?? (status >= 500 ? "broken" : "refused");
  throw new Failure(kind, { status, detail, retryAfterS: Number.isFinite(after) ? after : null });
}
