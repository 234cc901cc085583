// The ways in: pictures that are chosen, dropped or pasted, a drawing, the camera, and text. Each makes Items and asks.

import { Batch, Item } from "./answers.js";
import { photograph, turnOff, turnOn, whyNoCamera } from "./camera.js";
import { Drawing } from "./drawing.js";
import { say } from "./language.js";

const PAUSE_MS = 150; // after a stroke, before the drawing is sent: the next stroke often follows
const FRAME_MS = 200; // between two questions of the camera

const $ = (id) => document.getElementById(id);
let open = ""; // the way that is open: draw, picture, camera or text
let ask; // (batch, items) -> a Failure, if there was one
let current; // () -> the model's entry of /status, or null

// Once. `ask` and `current` as above.
export function startInputs(given) {
  ({ ask, current } = given);
  startTabs();
  startFiles();
  startDrawing();
  startCamera();
  startText();
}

// Shows the ways that the model has; the one that is open stays, if the model has it too.
export function openWaysFor(model) {
  $("tab-draw").hidden = !model?.draws;
  const possible = !model?.kind ? [""] : model.kind === "text" ? ["text"] : shownTabs().map(nameOf);
  if (!possible.includes(open)) openWay(possible[0]);
}

const takesPictures = () => current()?.kind === "image";

function submit(files) {
  const items = [...files].map((file) => new Item({ name: file.name, file }));
  if (items.length && takesPictures()) ask(new Batch(), items);
}

// ---- Tabs

const tabs = [...document.querySelectorAll("[role=tab]")];
const nameOf = (tab) => tab.id.replace("tab-", "");
const shownTabs = () => tabs.filter((tab) => !tab.hidden);

function openWay(name) {
  if (open === "camera" && name !== "camera") cameraOff();
  open = name;
  $("tabs").hidden = name === "text" || name === "";
  for (const way of ["draw", "picture", "camera", "text"]) $(`panel-${way}`).hidden = way !== name;
  for (const tab of tabs) {
    const selected = nameOf(tab) === name;
    tab.setAttribute("aria-selected", selected);
    tab.tabIndex = selected ? 0 : -1;
  }
  if (name === "camera" && !$("video").srcObject) cameraOff();
}

function startTabs() {
  for (const tab of tabs) tab.addEventListener("click", () => openWay(nameOf(tab)));
  $("tabs").addEventListener("keydown", (event) => {
    const shown = shownTabs();
    const at = shown.indexOf(document.activeElement);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: shown.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const tab = shown[(to + shown.length) % shown.length];
    openWay(nameOf(tab));
    tab.focus();
  });
}

function startFiles() {
  $("files").addEventListener("change", () => {
    submit($("files").files);
    $("files").value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData?.files.length || !takesPictures()) return;
    event.preventDefault();
    submit(event.clipboardData.files);
  });
  const carries = (event) => event.dataTransfer?.types.includes("Files") && takesPictures();
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
  let batch = null; // of the drawing that is on the slate; a cleared slate begins another
  let timer = 0;
  const drawing = new Drawing($("drawing"), () => {
    clearTimeout(timer);
    $("undo").disabled = $("clear").disabled = drawing.empty;
    $("draw-hint").hidden = !drawing.empty;
    if (drawing.empty) batch = null;
    else timer = setTimeout(send, PAUSE_MS);
  });
  async function send() {
    if (!batch || batch.gone) batch = new Batch();
    const to = batch; // the slate may be cleared, and begun anew, while the picture is made
    const picture = await drawing.picture(current().height, current().width);
    ask(to, [new Item({ name: { key: "drawn" }, file: new File([picture], "drawing.png", { type: picture.type }) })]);
  }
  $("undo").addEventListener("click", () => drawing.undo());
  $("clear").addEventListener("click", () => drawing.clear());
}

// ---- Camera

let live = false;

function cameraShows(on, note) {
  $("video").hidden = !on;
  $("camera-note").hidden = on;
  $("camera-on").hidden = on || whyNoCamera() !== null;
  for (const id of ["camera-take", "camera-live", "camera-off"]) $(id).hidden = !on;
  if (!on) say($("camera-note"), note);
}

function cameraOff() {
  stopLive();
  turnOff($("video"));
  cameraShows(false, whyNoCamera() ?? "camera_is_off");
}

function stopLive() {
  live = false;
  $("camera-live").setAttribute("aria-pressed", false);
}

async function cameraOn() {
  cameraShows(false, "camera_asks");
  try {
    await turnOn($("video"));
    if (open !== "camera") return cameraOff(); // left while the browser asked
    cameraShows(true);
  } catch (error) {
    turnOff($("video"));
    cameraShows(false, error.message);
  }
}

async function frame() {
  const picture = await photograph($("video"));
  return [new Item({ name: { key: "photographed" }, file: new File([picture], "camera.jpg", { type: picture.type }) })];
}

// One question after the other, never two at once; a server that refuses ends it.
async function keepAnswering() {
  live = !live;
  $("camera-live").setAttribute("aria-pressed", live);
  let batch = new Batch();
  while (live && $("video").srcObject) {
    if (batch.gone) batch = new Batch();
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
