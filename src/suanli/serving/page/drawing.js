// A canvas to draw a digit on. Strokes are kept as points, not as pixels, so that the picture that is sent depends
// neither on the size and place of the drawing nor on the pen: `picture` gives it the size and stroke width of the data
// sets of handwritten digits, light on black.

const PEN = 0.07; // share of the canvas, on screen
const SENT_SIDE = 256; // px; the server scales it to the model's size, as it does with any picture
const SMALLEST = 0.2; // share of the canvas: a dot isn't enlarged to the size of a digit

// MNIST fits digits into 20 of 28 pixels. The digits of scikit-learn have 8 pixels, reach the edges and have thick
// strokes: drawn like that, 84 % of 160 generated drawings were classified right; with MNIST's margin and stroke, 46 %.
const layout = (height) => (height <= 12 ? { margin: 0, pen: 0.16 } : { margin: 4 / 28, pen: 0.085 });

export class Drawing {
  #strokes = [];
  #open = null; // the stroke that is being drawn, and the pointer that draws it
  #canvas;
  #changed;

  // `changed` is called after a stroke, an undo and a clear.
  constructor(canvas, changed) {
    this.#canvas = canvas;
    this.#changed = changed;
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.#end(event));
    new ResizeObserver(() => this.#fit()).observe(canvas);
  }

  get empty() {
    return this.#strokes.length === 0;
  }

  undo() {
    this.#strokes.pop();
    this.#redraw();
    this.#changed();
  }

  clear() {
    this.#strokes = [];
    this.#redraw();
    this.#changed();
  }

  // A PNG for a model of this height and width.
  picture(height, width) {
    const { margin, pen } = layout(height);
    const canvas = document.createElement("canvas");
    canvas.height = SENT_SIDE;
    canvas.width = Math.round((SENT_SIDE * width) / height);
    const side = Math.min(canvas.height, canvas.width);
    const points = this.#strokes.flat();
    const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
    const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const scale = (side * (1 - 2 * margin - pen)) / Math.max(right - left, bottom - top, SMALLEST);
    const context = canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.translate(canvas.width / 2, canvas.height / 2);
    context.scale(scale, scale);
    context.translate(-(left + right) / 2, -(top + bottom) / 2);
    paint(context, this.#strokes, (pen * side) / scale);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  #begin(event) {
    if (this.#open || event.button !== 0) return; // a second finger, or the other button
    event.preventDefault();
    this.#canvas.setPointerCapture(event.pointerId);
    this.#open = { pointer: event.pointerId, points: [this.#at(event)] };
    this.#strokes.push(this.#open.points);
    this.#redraw();
  }

  #move(event) {
    if (event.pointerId !== this.#open?.pointer) return;
    const all = event.getCoalescedEvents?.() ?? [];
    for (const part of all.length ? all : [event]) this.#open.points.push(this.#at(part));
    this.#redraw();
  }

  #end(event) {
    if (event.pointerId !== this.#open?.pointer) return;
    this.#open = null;
    this.#changed();
  }

  #at(event) {
    const box = this.#canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  #fit() {
    const side = Math.round(this.#canvas.clientWidth * devicePixelRatio);
    if (side === 0 || side === this.#canvas.width) return; // hidden, or unchanged
    this.#canvas.width = this.#canvas.height = side;
    this.#redraw();
  }

  #redraw() {
    const context = this.#canvas.getContext("2d");
    const side = this.#canvas.width;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, side, side);
    context.scale(side, side);
    paint(context, this.#strokes, PEN);
  }
}

// Curves through the midpoints between points: smooth even with the few events of a slow machine.
function paint(context, strokes, width) {
  Object.assign(context, { strokeStyle: "#fff", lineWidth: width, lineCap: "round", lineJoin: "round" });
  for (const points of strokes) {
    context.beginPath();
    context.moveTo(...points[0]);
    for (let i = 1; i < points.length - 1; i++) {
      const [x, y] = points[i];
      const [nextX, nextY] = points[i + 1];
      context.quadraticCurveTo(x, y, (x + nextX) / 2, (y + nextY) / 2);
    }
    context.lineTo(...points[points.length - 1]);
    context.stroke();
  }
}
