// The inputs: pictures (chosen, dropped or pasted), a drawing, the camera, text, and the columns of a row. Each makes
// Items and asks.

import { Batch, Item } from "./answers.js";
import { photograph, turnOff, turnOn, whyNoCamera } from "./camera.js";
import { Drawing } from "./drawing.js";
import { say } from "./language.js";

const MANY_VALUES = 60; // of a column: more are typed, with suggestions

const PAUSE_MS = 150; // between a stroke and sending the drawing, since another stroke often follows
const FRAME_MS = 200; // between two pictures of the camera
const DIGITS = "0 1 2 3 4 5 6 7 8 9"; // a model of grey pictures with these classes reads what is drawn

const $ = (id) => document.getElementById(id);
let open = ""; // the open input: draw, picture, camera, text, row, or none
let fields = ""; // of the row that is shown
let ask; // (batch, items) -> a Failure or nothing
let current; // () -> the model's entry of /status, or null

// Called once; `ask` and `current` are as above.
export function startInputs(functions) {
  ({ ask, current } = functions);
  startTabs();
  startFiles();
  startDrawing();
  startCamera();
  startText();
  $("panel-row").addEventListener("submit", sendRow);
}

// Shows the inputs that the model takes. The open one stays open if the model takes it too.
export function showInputsFor(model) {
  const pictures = takesPictures(model);
  $("tab-draw").hidden = !(pictures && model.channels === 1 && [...model.classes].sort().join(" ") === DIGITS);
  $("tab-camera").hidden = !pictures;
  say($("choose"), pictures ? "choose" : "choose_files");
  $("files").accept = fileTypes(model).map((type) => `${type}*`).join();
  showFields(model);
  const possible = takesRows(model) ? ["row"] : takesTexts(model) ? ["text"] : takesFiles(model) ? visibleTabs().map(nameOf) : [""];
  if (!possible.includes(open)) openInput(possible[0]);
  else showTabs();
}

const fileTypes = (model) => (model?.media_types ?? []).filter((type) => type.endsWith("/")); // "image/": any of these
export const takesTexts = (model) => model?.takes_strings ?? false;
export const takesRows = (model) => (model?.fields ?? []).length > 0;
export const takesFiles = (model) => (model?.media_types ?? []).length > 0 && !takesTexts(model) && !takesRows(model);
export const takesPictures = (model) => fileTypes(model).includes("image/");

function submit(files) {
  const items = [...files].map((file) => new Item({ name: file.name, file }));
  if (items.length && takesFiles(current())) ask(new Batch(), items);
}

// ---- Tabs

const tabs = [...document.querySelectorAll("[role=tab]")];
const nameOf = (tab) => tab.id.replace("tab-", "");
const visibleTabs = () => tabs.filter((tab) => !tab.hidden);

function openInput(name) {
  if (open === "camera" && name !== "camera") cameraOff();
  open = name;
  showTabs();
  for (const input of ["draw", "picture", "camera", "text", "row"]) $(`panel-${input}`).hidden = input !== name;
  for (const tab of tabs) {
    const selected = nameOf(tab) === name;
    tab.setAttribute("aria-selected", selected);
    tab.tabIndex = selected ? 0 : -1;
  }
  if (name === "camera" && !$("video").srcObject) cameraOff();
}

const showTabs = () => ($("tabs").hidden = ["text", "row", ""].includes(open) || visibleTabs().length < 2);

function startTabs() {
  for (const tab of tabs) tab.addEventListener("click", () => openInput(nameOf(tab)));
  $("tabs").addEventListener("keydown", (event) => {
    const visible = visibleTabs();
    const at = visible.indexOf(document.activeElement);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: visible.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const tab = visible[(to + visible.length) % visible.length];
    openInput(nameOf(tab));
    tab.focus();
  });
}

function startFiles() {
  $("files").addEventListener("change", () => {
    submit($("files").files);
    $("files").value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData?.files.length || !takesFiles(current())) return;
    event.preventDefault();
    submit(event.clipboardData.files);
  });
  const carries = (event) => event.dataTransfer?.types.includes("Files") && takesFiles(current());
  const over = (on) => $("dropping").classList.toggle("on", on);
  document.addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    over(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) over(false);
  });
  document.addEventListener("drop", (event) => {
    over(false);
    if (!carries(event)) return;
    event.preventDefault();
    submit(event.dataTransfer.files);
  });
}

function startDrawing() {
  let batch = null; // of the current drawing; after a clear there is a new one
  let timer = 0;
  const drawing = new Drawing($("drawing"), () => {
    clearTimeout(timer);
    $("undo").disabled = $("clear").disabled = drawing.empty;
    $("draw-hint").hidden = !drawing.empty;
    if (drawing.empty) batch = null;
    else timer = setTimeout(send, PAUSE_MS);
  });
  async function send() {
    if (!batch || batch.removed) batch = new Batch();
    const target = batch; // the drawing may be cleared and begun anew meanwhile
    const picture = await drawing.picture(current().height, current().width);
    ask(target, [new Item({ name: { key: "drawn" }, file: new File([picture], "drawing.png", { type: picture.type }) })]);
  }
  $("undo").addEventListener("click", () => drawing.undo());
  $("clear").addEventListener("click", () => drawing.clear());
}

// ---- Camera

let live = false;

function showCamera(on, note) {
  $("video").hidden = !on;
  $("camera-note").hidden = on;
  $("camera-on").hidden = on || whyNoCamera() !== null;
  for (const id of ["camera-take", "camera-live", "camera-off"]) $(id).hidden = !on;
  if (!on) say($("camera-note"), note);
}

function cameraOff() {
  stopLive();
  turnOff($("video"));
  showCamera(false, whyNoCamera() ?? "camera_is_off");
}

function stopLive() {
  live = false;
  $("camera-live").setAttribute("aria-pressed", false);
}

async function cameraOn() {
  showCamera(false, "camera_asks");
  try {
    await turnOn($("video"));
    if (open !== "camera") return cameraOff(); // the user went elsewhere while the browser asked
    showCamera(true);
  } catch (error) {
    turnOff($("video"));
    showCamera(false, error.message);
  }
}

async function frame() {
  const picture = await photograph($("video"));
  return [new Item({ name: { key: "photographed" }, file: new File([picture], "camera.jpg", { type: picture.type }) })];
}

// Sends one picture after another, never two at once, until the server refuses one.
async function keepAnswering() {
  live = !live;
  $("camera-live").setAttribute("aria-pressed", live);
  let batch = new Batch();
  while (live && $("video").srcObject) {
    if (batch.removed) batch = new Batch();
    if (await ask(batch, await frame())) return stopLive();
    await new Promise((resolve) => setTimeout(resolve, FRAME_MS));
  }
}

function startCamera() {
  $("camera-on").addEventListener("click", cameraOn);
  $("camera-off").addEventListener("click", cameraOff);
  $("camera-live").addEventListener("click", keepAnswering);
  $("camera-take").addEventListener("click", async () => ask(new Batch(), await frame()));
  addEventListener("pagehide", cameraOff);
}

function startText() {
  const send = (event) => {
    event.preventDefault();
    const text = $("text").value;
    if (text.trim()) ask(new Batch(), [new Item({ name: null, text })]);
  };
  $("panel-text").addEventListener("submit", send);
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(event);
  });
}

// ---- A row

function showFields(model) {
  const now = JSON.stringify(model?.fields ?? []);
  if (now === fields) return; // so that what was typed stays
  fields = now;
  $("fields").replaceChildren(...(model?.fields ?? []).map(fieldOf));
}

// A label with a control for one column. What stands in it at first is a usual value.
function fieldOf({ name, type, values = [], example = "" }, place) {
  const label = document.createElement("label");
  const title = document.createElement("bdi");
  title.textContent = name;
  const few = values.length > 0 && values.length <= MANY_VALUES;
  const control = document.createElement(few ? "select" : "input");
  if (few) control.append(new Option("", ""), ...values.map((value) => new Option(value, value)));
  else if (type === "number") Object.assign(control, { type: "number", step: "any" });
  else if (values.length) {
    const list = document.createElement("datalist");
    list.id = `values-${place}`;
    list.append(...values.map((value) => new Option(value, value)));
    control.setAttribute("list", list.id);
    label.append(list);
  }
  control.dataset.column = name;
  control.value = typeof example === "number" ? Number(example.toPrecision(6)) : example;
  label.prepend(title, control);
  return label;
}

function sendRow(event) {
  event.preventDefault();
  const controls = [...$("fields").querySelectorAll("[data-column]")];
  const row = Object.fromEntries(controls.map((control) => [control.dataset.column, control.value || null]));
  const text = controls.map((control) => `${control.dataset.column}: ${control.value || "–"}`).join(", ");
  ask(new Batch(), [new Item({ name: null, text, row })]);
}
