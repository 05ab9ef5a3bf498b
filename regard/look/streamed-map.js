// The map of a page whose server computes it: what is drawn until an answer comes, and the answer.

const SIDE = 640;    // pixels of the map, at most
/** What is drawn: the planes of an answer, or a stand-in for one. @type {any} */
let shown = null;
/** Words of tokens, as far as answers named them. @type {Map<number, string>} */
const known = new Map();
/** Small pictures of heads by "layer head". @type {Map<string, any>} */
const thumbs = new Map();

/** @param {number} at @param {number} length */
function tokenLabel(at, length) {
  return (length === page.labelled && known.get(at)) || `#${at}`;
}
/** @param {number} at @param {number} length */
function tokenName(at, length) {
  const label = tokenLabel(at, length);
  return label === `#${at}` ? label : `${label} (${at})`;
}

/** @param {any} told an answer @param {(number | null)[]} numbers of its blocks @returns {Plane} */
function planeOf({ keys, size, rows, columns }, numbers) {
  const weight = Float32Array.from(numbers, (x) => (x === null ? NaN : x));
  return { size, rows, columns, weight, lift: weight.map((x, at) => x * keys[Math.floor(at / columns)]) };
}
/** @param {any} told an answer @returns {{mean: Plane, max: Plane}} */
function planesOf(told) { return { mean: planeOf(told, told.mean), max: planeOf(told, told.largest) }; }

/** @param {number} l @param {number} h @returns {Plane | null} */
function thumbPlane(l, h) {
  const told = thumbs.get(`${page.layers[l].number} ${h}`);
  return told ? told.planes.mean : null;
}

/** The view in cells. @param {any} layer */
function viewOf(layer) {
  const { top, left, span } = state.view || { top: 0, left: 0, span: Math.max(layer.n, layer.m) };
  const rows = Math.min(span, layer.n - top), columns = Math.min(span, layer.m - left);
  return { top, left, span, rows, columns, size: Math.ceil(Math.min(span, Math.max(layer.n, layer.m)) / page.blocks) };
}

/** Until the answer comes: what is known of the view from what is drawn now and from the small
 * picture, as blocks of the size to come. */
function standIn() {
  const layer = page.layers[state.layer], { top, left, rows, columns, size } = viewOf(layer);
  const down = Math.ceil(rows / size), across = Math.ceil(columns / size);
  const small = thumbs.get(`${layer.number} ${state.head}`), sources = [];
  if (shown && shown.layer === layer && shown.head === state.head) sources.push(shown);
  if (small) sources.push(small);
  const filled = (which) => {
    const empty = () => new Float32Array(down * across), weight = empty(), lift = empty();
    for (let at = 0; at < weight.length; at++) {
      const i = top + (Math.floor(at / across) + 0.5) * size, j = left + (at % across + 0.5) * size;
      for (const { planes, origin } of sources) {
        const from = planes[which], row = Math.floor((i - origin.top) / from.size);
        const column = Math.floor((j - origin.left) / from.size);
        if (row < 0 || column < 0 || row >= from.rows || column >= from.columns) continue;
        weight[at] = from.weight[row * from.columns + column];
        lift[at] = from.lift[row * from.columns + column];
        break;
      }
    }
    return { size, rows: down, columns: across, weight, lift };
  };
  shown = { layer, head: state.head, origin: { top, left }, told: null,
    planes: { mean: filled("mean"), max: filled("max") } };
}

function drawMap() {
  if (!shown) return;
  const { layer, planes, origin, told } = shown, plane = planes[state.plane];
  const wide = Math.min(SIDE + 64, widthOf("map-box") - 4);
  const room = Math.max(220, Math.min(wide, Math.max(400, innerHeight - 380)));
  const { words, ruler } = rulerRoom(layer, plane, origin, room);
  const cell = (room - ruler) / Math.max(plane.rows, plane.columns);
  const box = { x: ruler, y: ruler, width: cell * plane.columns, height: cell * plane.rows };
  Object.assign(shown, { plane, box, cell, words });
  const canvas = /** @type {HTMLCanvasElement} */ (element("map"));
  const context = fit(canvas, box.x + box.width + 2, box.y + box.height + 2);
  const ratio = window.devicePixelRatio || 1;
  context.putImageData(planeImage(context, plane, box), Math.round(box.x * ratio),
    Math.round(box.y * ratio));
  drawRulers(context);
  drawSelection(context);
  drawMini(layer);
  offerPlanes(plane.size);
  canvas.classList.toggle("movable", Boolean(state.view));
  canvas.dataset.shown = told ? JSON.stringify({ box, cell, ...origin, size: plane.size,
    rows: plane.rows, columns: plane.columns }) : "";
  drawBeside();
  element("map-title").textContent = `Layer ${layer.number}, head ${state.head}`;
  element("map-hint").textContent = `${layer.name}. Rows are queries i, columns are keys j; each row `
    + `of the whole matrix sums to 1. ${layer.masked ? "Hatched cells are masked. " : ""}`
    + "Hover to read, click to select, Ctrl and wheel to zoom, drag to move.";
}

/** Room beside the cells, for words if they fit. @param {any} layer @param {Plane} plane
 * @param {{top: number, left: number}} origin @param {number} room */
function rulerRoom(layer, plane, origin, room) {
  const labels = (start, count, length) => Array.from({ length: count }, (_, at) =>
    tokenLabel(start + at, length));
  const most = Math.max(plane.rows, plane.columns);
  if (plane.size === 1 && page.labelled && most <= 48) {
    const all = [...labels(origin.top, plane.rows, layer.n), ...labels(origin.left, plane.columns, layer.m)];
    const ruler = Math.min(96, Math.max(...all.map(measure))) + 8;
    if ((room - ruler) / most >= 12) return { words: true, ruler };
  }
  return { words: false, ruler: 8 + measure(String(Math.max(layer.n, layer.m))) };
}

/** What a cell says: its weight, how sure it is, never its colour. @param {any} cell */
function cellWords({ layer, i, j, row, column }) {
  const { plane, told } = shown, { size } = plane, at = row * plane.columns + column;
  const last = (start, all) => Math.min(start + size, all) - 1;
  const where = size === 1 ? `${tokenName(i, layer.n)} → ${tokenName(j, layer.m)}: `
    : `queries ${i}–${last(i, layer.n)} → keys ${j}–${last(j, layer.m)}: `;
  if (!told) return `${where}being computed`;
  if (told.mean[at] === null) return `${where}masked`;
  if (state.plane === "max" && size > 1) {
    return `${where}largest weight ${told.exact ? "" : "of the drawn queries "}${number(told.largest[at])}`;
  }
  const { error } = told;
  const off = error && error[at] !== null ? ` ± ${number(error[at])} (standard error)` : "";
  return `${where}${size === 1 ? "" : "mean "}weight ${number(told.mean[at])}${off}`;
}

/** What the numbers on the map are worth. @param {any} told */
function qualityWords(told) {
  if (told.size === 1) return "Exact: single cells.";
  const kind = state.plane === "max" ? "the largest" : told.exact ? "the mean" : "a mean";
  const dot = `every dot is ${kind} of ${told.size} × ${told.size} cells`;
  if (told.exact) return `Exact: ${dot}, all computed.`;
  const counts = `${told.taken.toLocaleString("en")} of ${told.of.toLocaleString("en")} queries`;
  const worth = state.plane === "max" ? "The largest of all is at least that; a strong query that "
    + "was not drawn is missed. " : `Standard error ${(100 * told.typicalError).toPrecision(2)} % `
      + "(root mean square over the map); a strong query that was not drawn is missed. ";
  return `Sampled: ${dot}, ${state.plane === "max" ? "as far as known" : "estimated"} from ${counts}, whose weights `
    + `are exact. ${worth}More are being computed.`;
}
