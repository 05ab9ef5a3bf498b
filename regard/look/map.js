// The map of one head: the whole of it, or the exact cells around the selection.

const WINDOW = 64;  // cells per side of the view around the selection
/** What the canvas shows now: which cells, where. @type {any} */
let shown = null;
/** @type {{key: string, plane: Plane} | null} */
let lastPlane = null;
/** The cells as they were painted last: moving the selection leaves them as they are.
 * @type {{key: string, plane: Plane, image: ImageData} | null} */
let lastImage = null;

function buildMap() {
  const canvas = element("map");
  canvas.addEventListener("mousemove", (event) => {
    const cell = cellAt(event);
    if (!cell) return hideTip();
    if (!state.pinned) select({ i: cell.i, j: cell.j }, true);
    tip(event, cellWords(cell));
  });
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) select({ i: cell.i, j: cell.j, pinned: true });
  });
  element("view").addEventListener("change", () => { state.corner = null; drawMap(); });
  addEventListener("resize", soon(drawMap));
}

/** Room for the map, in CSS pixels. */
function mapRoom() { return Math.max(220, Math.min(640, element("map-box").clientWidth)); }

/** Offer the views that differ: with few tokens there is only one. */
function offerViews() {
  const layer = page.layers[state.layer], view = /** @type {HTMLSelectElement} */ (element("view"));
  const size = blockSize(layer), was = view.value;
  const views = size === 1 ? [["mean", "every cell"]] : [
    ["mean", `the whole map, mean of ${size} × ${size} cells`],
    ["max", `the whole map, largest of ${size} × ${size} cells`],
    ["near", `exact cells around the selection`]];
  view.replaceChildren(...views.map(([value, textContent]) =>
    make("option", { value, textContent })));
  view.value = views.some(([value]) => value === was) ? was : "mean";
  element("view-label").hidden = views.length === 1;
}

/** @param {Layer} layer */
function blockSize(layer) {
  if (layer.planes) return layer.planes.size;
  return Math.ceil(Math.max(layer.n, layer.m) / (mapRoom() - 50));
}

/** @param {Layer} layer @param {string} view */
function mapPlane(layer, view) {
  const size = blockSize(layer);
  if (view === "near") return cells(layer, state.head, corner(layer));
  const key = [state.layer, state.head, view, size].join(" ");
  if (lastPlane && lastPlane.key === key) return lastPlane.plane;
  const which = view === "max" ? "max" : "mean";
  const all = { top: 0, left: 0, rows: layer.n, columns: layer.m };
  const plane = layer.planes ? bakedPlane(layer, state.head, which, page.array)
    : pool(cells(layer, state.head, all), size, which);
  lastPlane = { key, plane };
  return plane;
}

/** The window of the near view: it moves only when the selection leaves it. @param {Layer} layer */
function corner(layer) {
  const rows = Math.min(WINDOW, layer.n), columns = Math.min(WINDOW, layer.m);
  const inside = (at, start, count) => at >= start && at < start + count;
  const start = (at, count, all) => Math.max(0, Math.min(all - count, at - (count >> 1)));
  const old = state.corner;
  if (!old || !inside(state.i, old.top, rows) || !inside(state.j, old.left, columns)) {
    state.corner = { top: start(state.i, rows, layer.n), left: start(state.j, columns, layer.m) };
  }
  return { ...state.corner, rows, columns };
}

function drawMap() {
  offerViews();
  const layer = page.layers[state.layer];
  const view = /** @type {HTMLSelectElement} */ (element("view")).value;
  const plane = mapPlane(layer, view);
  const origin = view === "near" ? corner(layer) : { top: 0, left: 0 };
  const longest = labelRoom(layer), most = Math.max(plane.rows, plane.columns);
  let ruler = longest + 8, cell = Math.min(40, Math.floor((mapRoom() - ruler) / most));
  const words = plane.size === 1 && cell >= 12;
  if (!words) {
    ruler = 8 + measure(String(Math.max(layer.n, layer.m)));
    // Large cells are equal to the pixel. Small ones may differ by one, so that the map fills its
    // place; blockSize keeps them from falling below a pixel.
    const exact = (mapRoom() - ruler - 4) / most;
    cell = exact >= 5 ? Math.min(40, Math.floor(exact)) : exact;
  }
  const box = { x: ruler, y: ruler, width: cell * plane.columns, height: cell * plane.rows };
  shown = { layer, plane, origin, box, cell, words, view };
  const canvas = /** @type {HTMLCanvasElement} */ (element("map"));
  const context = fit(canvas, ruler + box.width + 2, ruler + box.height + 2);
  canvas.dataset.shown = JSON.stringify({ origin, box, cell });
  paintCells(context, plane, box);
  drawRulers(context);
  drawSelection(context);
  element("map-title").textContent = `Layer ${layer.number}, head ${state.head}`;
  element("map-hint").textContent = mapHint(layer, plane);
}

/** @param {CanvasRenderingContext2D} context @param {Plane} plane
 * @param {{x: number, y: number, width: number, height: number}} box */
function paintCells(context, plane, box) {
  const ratio = window.devicePixelRatio || 1;
  const key = [tone, state.scale, box.width, box.height, ratio].join(" ");
  if (!lastImage || lastImage.plane !== plane || lastImage.key !== key) {
    lastImage = { key, plane, image: planeImage(context, plane, box) };
  }
  context.putImageData(lastImage.image, Math.round(box.x * ratio), Math.round(box.y * ratio));
}

/** @param {Layer} layer @param {Plane} plane */
function mapHint(layer, plane) {
  const shared = layer.heads / layer.kvHeads;
  return `${layer.name}, ${ROUTES[layer.route]}. Rows are queries i, columns are keys j; each row sums to 1`
    + (layer.sinks ? " together with the sink, which has no column. " : ". ")
    + (plane.size > 1 ? `One dot is a block of ${plane.size} × ${plane.size} cells. ` : "")
    + (shared > 1 ? `${shared} query heads share each key head; this one reads key head `
      + `${keyHead(layer, state.head)}. ` : "")
    + (layer.spans || layer.bits ? "Hatched cells are masked. " : "")
    + "Hover to look, click to pin.";
}

const ROUTES = {
  interface: "read where the model asks for its attention function",
  sdpa: "read at scaled_dot_product_attention", arrays: "from arrays",
};

/** The widest label in pixels, within reason. @param {Layer} layer */
function labelRoom(layer) {
  const labels = Array.from({ length: Math.min(64, layer.n) }, (_, i) => tokenLabel(i, layer.n));
  return Math.min(96, Math.max(...labels.map(measure)));
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

/** @param {CanvasRenderingContext2D} context */
function drawRulers(context) {
  const { layer, plane, origin, box, cell, words } = shown, style = getComputedStyle(document.body);
  const ink = style.getPropertyValue("--ink"), accent = style.getPropertyValue("--accent");
  context.font = RULER_FONT;
  context.textBaseline = "middle";
  const axis = (count, start, all, chosen, place) => {
    const step = words ? 1 : niceStep(count * plane.size, count * cell / 44);
    for (let at = 0; at < count; at++) {
      const token = start + at * plane.size;
      const here = chosen >= token && chosen < token + plane.size;
      if (!words && token % step >= plane.size) continue;
      context.fillStyle = here ? accent : ink;
      place(words ? tokenLabel(token, all) : String(token - token % step), at, here);
    }
  };
  axis(plane.rows, origin.top, layer.n, state.i, (label, at) => {
    context.textAlign = "right";
    context.fillText(shorten(context, label, box.x - 8), box.x - 5, box.y + (at + 0.5) * cell);
  });
  axis(plane.columns, origin.left, layer.m, state.j, (label, at) => {
    context.save();
    context.translate(box.x + (at + 0.5) * cell, box.y - 5);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    context.fillText(shorten(context, label, box.y - 8), 0, 0);
    context.restore();
  });
}

/** @param {CanvasRenderingContext2D} context @param {string} label @param {number} room */
function shorten(context, label, room) {
  let text = label;
  while (text.length > 1 && context.measureText(text).width > room) text = `${text.slice(0, -2)}…`;
  return text;
}

/** A round distance between ticks. @param {number} length @param {number} ticks */
function niceStep(length, ticks) {
  const rough = Math.max(1, length / Math.max(1, ticks)), ten = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((x) => x * ten).find((x) => x >= rough) || rough;
}

/** @param {CanvasRenderingContext2D} context */
function drawSelection(context) {
  const { plane, origin, box, cell } = shown;
  const row = Math.floor((state.i - origin.top) / plane.size);
  const column = Math.floor((state.j - origin.left) / plane.size);
  const x = box.x + column * cell, y = box.y + row * cell;
  context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  context.lineWidth = 1;
  context.strokeRect(box.x - 0.5, y - 0.5, box.width + 1, cell + 1);
  context.strokeRect(x - 0.5, box.y - 0.5, cell + 1, box.height + 1);
  context.lineWidth = state.pinned ? 3 : 2;
  const wide = Math.max(cell, 5) + 2;
  context.strokeRect(x + cell / 2 - wide / 2, y + cell / 2 - wide / 2, wide, wide);
}

/** @param {MouseEvent} event */
function cellAt(event) {
  if (!shown) return null;
  const { layer, plane, origin, box, cell } = shown;
  const column = Math.floor((event.offsetX - box.x) / cell);
  const row = Math.floor((event.offsetY - box.y) / cell);
  if (row < 0 || column < 0 || row >= plane.rows || column >= plane.columns) return null;
  const i = origin.top + row * plane.size, j = origin.left + column * plane.size;
  return { layer, i, j, row, column };
}

/** What a cell says: its true weight, never its colour. @param {any} cell */
function cellWords({ layer, i, j, row, column }) {
  const { plane, view } = shown;
  if (plane.size === 1) return pairWords(layer, state.head, i, j);
  const last = (at, all) => Math.min(at + plane.size, all) - 1;
  const weight = plane.weight[row * plane.columns + column];
  const where = `queries ${i}–${last(i, layer.n)} → keys ${j}–${last(j, layer.m)}: `;
  if (Number.isNaN(weight)) return `${where}masked`;
  return `${where}${view === "max" ? "largest" : "mean"} weight ${number(weight)}`;
}

/** @param {Layer} layer @param {number} head @param {number} i @param {number} j */
function pairWords(layer, head, i, j) {
  const pair = `${tokenName(i, layer.n)} → ${tokenName(j, layer.m)}`;
  return `${pair}: ${weightWords(layer, head, i, j)}`;
}

/** @param {Layer} layer @param {number} head @param {number} i @param {number} j */
function weightWords(layer, head, i, j) {
  if (!isVisible(layer, head, i, j)) return maskWords(layer, i, j);
  const weight = weightAt(layer, head, i, j);
  return `weight ${number(weight)}, ${liftWords(weight * visibleKeys(layer, head, i))}`;
}

/** Why a pair is masked. @param {Layer} layer @param {number} i @param {number} j */
function maskWords(layer, i, j) {
  return layer.causal && j > i ? "masked, future" : "masked";
}
