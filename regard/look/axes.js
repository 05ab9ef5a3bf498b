// What stands around the cells of a map: rulers, the selection; and all of it as a figure.

/** The widest label in pixels, within reason: of every so many tokens, and the last.
 * @param {Layer} layer */
function labelRoom(layer) {
  const stride = Math.ceil(layer.n / 64);
  const labels = Array.from({ length: Math.ceil(layer.n / stride) }, (_, at) =>
    tokenLabel(at * stride, layer.n));
  return Math.min(96, Math.max(...[...labels, tokenLabel(layer.n - 1, layer.n)].map(measure)));
}
/** @param {string} label */
function measure(label) {
  if (!measure.context) {
    measure.context = document.createElement("canvas").getContext("2d");
    measure.context.font = RULER_FONT;
  }
  return measure.context.measureText(label).width;
}
/** @type {any} */
measure.context = null;
const RULER_FONT = "12px system-ui, sans-serif";

/** The labels of both axes, for canvas and figure; `label` names a token of it.
 * @param {any} at what is drawn, and where */
function rulerLabels(at = shown) {
  const { layer, plane, origin, box, cell, words } = at, label = at.label || tokenLabel;
  /** @type {{text: string, x: number, y: number, upright: boolean, here: boolean}[]} */
  const labels = [];
  const axis = (count, start, all, chosen, upright) => {
    const step = words ? 1 : niceStep(count * plane.size, count * cell / 44);
    for (let at = 0; at < count; at++) {
      const token = start + at * plane.size;
      if (!words && token % step >= plane.size) continue;
      const middle = (at + 0.5) * cell;
      labels.push({ text: words ? label(token, all) : String(token - token % step), upright,
        here: chosen >= token && chosen < token + plane.size,
        x: upright ? box.x + middle : box.x - 5, y: upright ? box.y - 5 : box.y + middle });
    }
  };
  axis(plane.rows, origin.top, layer.n, state.i, false);
  axis(plane.columns, origin.left, layer.m, state.j, true);
  return labels;
}

/** @param {CanvasRenderingContext2D} context @param {any} at */
function drawRulers(context, at = shown) {
  const ink = colourOf("--ink"), accent = colourOf("--accent");
  context.font = RULER_FONT;
  context.textBaseline = "middle";
  for (const { text, x, y, upright, here } of rulerLabels(at)) {
    context.fillStyle = here ? accent : ink;
    context.textAlign = upright ? "left" : "right";
    context.save();
    context.translate(x, y);
    if (upright) context.rotate(-Math.PI / 2);
    context.fillText(shorten(text, at.box.x - 8), 0, 0);
    context.restore();
  }
}

/** @param {string} label @param {number} room in pixels */
function shorten(label, room) {
  let text = label;
  while (text.length > 1 && measure(text) > room) text = `${text.slice(0, -2)}…`;
  return text;
}

/** A round distance between ticks. @param {number} length @param {number} ticks */
function niceStep(length, ticks) {
  const rough = Math.max(1, length / Math.max(1, ticks)), ten = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((x) => x * ten).find((x) => x >= rough) || rough;
}

/** The row, the column and the cell of the selection.
 * @param {CanvasRenderingContext2D} context @param {any} at */
function drawSelection(context, at = shown) {
  const { plane, origin, box, cell } = at;
  const row = Math.floor((state.i - origin.top) / plane.size);
  const column = Math.floor((state.j - origin.left) / plane.size);
  const x = box.x + column * cell, y = box.y + row * cell;
  context.strokeStyle = colourOf("--accent");
  context.lineWidth = 1;
  const inRows = row >= 0 && row < plane.rows, inColumns = column >= 0 && column < plane.columns;
  if (inRows) context.strokeRect(box.x - 0.5, y - 0.5, box.width + 1, cell + 1);
  if (inColumns) context.strokeRect(x - 0.5, box.y - 0.5, cell + 1, box.height + 1);
  if (!inRows || !inColumns) return;
  context.lineWidth = state.pinned ? 3 : 2;
  const wide = Math.max(cell, 5) + 2;
  context.strokeRect(x + cell / 2 - wide / 2, y + cell / 2 - wide / 2, wide, wide);
}

/** @param {MouseEvent} event @param {any} at */
function cellAt(event, at = shown) {
  if (!at) return null;
  const { layer, plane, origin, box, cell } = at;
  const column = Math.floor((event.offsetX - box.x) / cell);
  const row = Math.floor((event.offsetY - box.y) / cell);
  if (row < 0 || column < 0 || row >= plane.rows || column >= plane.columns) return null;
  const i = origin.top + row * plane.size, j = origin.left + column * plane.size;
  return { layer, i, j, row, column };
}

/** A pixel per block; masked ones are clear. @param {Plane} plane */
function pixelImage(plane) {
  return pixels(plane, plane.weight, (weight, at) => rampColour(share(weight, plane.lift[at])));
}
/** @param {Plane} plane @param {Float32Array} numbers
 * @param {(x: number, at: number) => number[]} colour */
function pixels(plane, numbers, colour) {
  const canvas = document.createElement("canvas");
  canvas.width = plane.columns;
  canvas.height = plane.rows;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const image = context.createImageData(plane.columns, plane.rows);
  new Uint32Array(image.data.buffer).set(Uint32Array.from(numbers, (x, at) =>
    (Number.isNaN(x) ? 0 : packed(colour(x, at)))));
  context.putImageData(image, 0, 0);
  return canvas;
}

/** A map: cells as one picture of a pixel per block, labels as text.
 * @param {any} at what is drawn, and where @param {(plane: Plane) => HTMLCanvasElement} image */
function mapFigure(at = shown, image = pixelImage) {
  const { plane, box, cell, origin } = at, ink = colourOf("--ink"), accent = colourOf("--accent");
  const place = { x: box.x, y: box.y, width: round(box.width), height: round(box.height) };
  const nodes = [svg("rect", { ...place, fill: "url(#hatch)" }), svgPicture(image(plane), place),
    svg("rect", { ...place, fill: "none", stroke: colourOf("--line") })];
  for (const { text, x, y, upright, here } of rulerLabels(at)) {
    nodes.push(svgText(shorten(text, box.x - 8), x, y, { "font-size": 12,
      fill: here ? accent : ink, "dominant-baseline": "central",
      "text-anchor": upright ? "start" : "end",
      ...(upright ? { transform: `rotate(-90 ${round(x)} ${round(y)})` } : {}) }));
  }
  const row = Math.floor((state.i - origin.top) / plane.size);
  const column = Math.floor((state.j - origin.left) / plane.size);
  if (row >= 0 && row < plane.rows && column >= 0 && column < plane.columns) {
    nodes.push(svg("rect", { x: round(box.x + column * cell), y: round(box.y + row * cell),
      width: round(cell), height: round(cell), fill: "none", stroke: accent, "stroke-width": 2 }));
  }
  return { nodes, width: box.x + box.width, height: box.y + box.height };
}

/** The colour bar of the page. */
function drawLegend() {
  const { low, high } = liftRange, canvas = document.createElement("canvas"), width = 220;
  const context = fit(canvas, width, 12);
  for (let x = 0; x < width; x++) {
    context.fillStyle = css(rampColour(x / (width - 1)));
    context.fillRect(x, 0, 1, 12);
  }
  const middle = state.scale !== "weight" ? -low / (high - low) : 0.5;
  const words = state.scale !== "weight" ? ["≤ 1/16", "uniform", `≥ ${2 ** high}× uniform`]
    : ["weight 0", "0.5", "1"];
  const labels = words.map((textContent, at) => {
    const label = make("span", { textContent });
    label.style.left = `${100 * [0, middle, 1][at]}%`;
    return label;
  });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Colour scale from ${words[0]} to ${words[2]}`);
  const masked = page.layers.some((layer) => layer.spans || layer.bits || layer.masked);
  element("legend").replaceChildren(
    make("div", { className: "ramp" }, canvas, make("div", { className: "ticks" }, ...labels)),
    ...(masked ? [make("span", { className: "swatch masked" }), "masked"] : []));
}
