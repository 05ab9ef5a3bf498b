// The map of one head, from the whole of it down to single cells.

const SMALLEST = 8;     // cells across at the deepest zoom
const NEAR = 64;        // cells across where single cells are asked for
const SLICE = 24;       // milliseconds of computing before the page is given back to its reader
/** What the canvas shows now: which cells, where. @type {any} */
let shown = null;
/** The cells as they were painted last: moving the selection leaves them as they are.
 * @type {{key: string, plane: Plane, image: ImageData} | null} */
let lastImage = null;
/** @type {{key: string, plane: Plane} | null} */
let lastPlane = null;

function buildMap() {
  const canvas = element("map");
  canvas.addEventListener("pointermove", (event) => {
    if (pan(event) || isStill(event)) return;
    const cell = cellAt(event);
    if (!cell) return hideTip();
    if (!state.pinned) select({ i: cell.i, j: cell.j }, true);
    tip(event, cellWords(cell));
  });
  canvas.addEventListener("pointerdown", (event) => {
    grip = { x: event.offsetX, y: event.offsetY, moved: false, view: state.view };
  });
  addEventListener("pointerup", () => { if (grip && !grip.moved) grip = null; });
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("click", (event) => {
    const dragged = grip && grip.moved;
    grip = null;
    const cell = dragged ? null : cellAt(event);
    if (cell) select({ i: cell.i, j: cell.j, pinned: true });
  });
  // With Ctrl, as pinching a touchpad also says, so that the plain wheel still scrolls the page.
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const cell = cellAt(event);
    if (cell) zoom(event.deltaY < 0 ? 1 / 1.3 : 1.3, cell);
  }, { passive: false });
  element("view").addEventListener("change", () => {
    state.plane = /** @type {HTMLSelectElement} */ (element("view")).value;
    select({});
  });
  const here = () => ({ i: state.i, j: state.j });
  element("zoom-in").addEventListener("click", () => zoom(0.5, here()));
  element("zoom-out").addEventListener("click", () => zoom(2, here()));
  element("zoom-whole").addEventListener("click", () => lookAt(null));
  element("zoom-cells").addEventListener("click", nearView);
  element("mini").addEventListener("click", (event) => {
    const layer = page.layers[state.layer], box = element("mini");
    const share = (at, side) => Math.max(0, Math.min(1, at / side));
    if (state.view) {
      lookAt(centred(layer, share(event.offsetY, box.offsetHeight) * layer.n,
        share(event.offsetX, box.offsetWidth) * layer.m, state.view.span));
    }
  });
  addEventListener("resize", soon(drawMap));
}

/** Whether the page moved under a resting pointer, which chooses nothing.
 * @param {PointerEvent} event */
function isStill(event) {
  const here = `${event.screenX} ${event.screenY}`, still = here === isStill.last || !isStill.last;
  isStill.last = here;
  return still;
}
isStill.last = "";

/** Where a drag began. @type {any} */
let grip = null;
/** Move the map under the pointer; says whether it did. @param {PointerEvent} event */
function pan(event) {
  if (!grip || !grip.view || !(event.buttons & 1)) return false;
  const down = event.offsetY - grip.y, across = event.offsetX - grip.x;
  if (Math.abs(down) + Math.abs(across) > 4) grip.moved = true;
  if (grip.moved) {
    const cells = (pixels) => Math.round(pixels / shown.cell * shown.plane.size);
    const { top, left, span } = grip.view;
    hideTip();
    lookAt(kept(page.layers[state.layer], { top: top - cells(down), left: left - cells(across), span }));
  }
  return true;
}

/** @typedef {{top: number, left: number, span: number}} View the corner and the cells across */

/** A view inside the map, or null for the whole. @param {Layer} layer @param {View} view */
function kept(layer, { top, left, span }) {
  const whole = Math.max(layer.n, layer.m), across = Math.max(SMALLEST, Math.round(span));
  if (across >= whole) return null;
  const start = (at, length) => Math.max(0, Math.min(length - across, Math.floor(at)));
  return { top: start(top, layer.n), left: start(left, layer.m), span: across };
}
/** @param {Layer} layer @param {number} i @param {number} j @param {number} span */
function centred(layer, i, j, span) {
  return kept(layer, { top: i - span / 2, left: j - span / 2, span });
}
/** @param {View | null} view */
function lookAt(view) {
  state.view = view;
  select({});
}
/** More or fewer cells, with one of them staying where it is.
 * @param {number} factor @param {{i: number, j: number}} at */
function zoom(factor, { i, j }) {
  const layer = page.layers[state.layer], whole = Math.max(layer.n, layer.m);
  const old = state.view || { top: 0, left: 0, span: whole };
  const span = Math.max(SMALLEST, old.span * factor), ratio = span / old.span;
  lookAt(kept(layer, { top: i - (i - old.top) * ratio, left: j - (j - old.left) * ratio, span }));
}
/** Single cells around the selection. */
function nearView() {
  lookAt(centred(page.layers[state.layer], state.i, state.j, NEAR));
}
/** Bring the selection into a zoomed view. */
function follow() {
  const layer = page.layers[state.layer];
  state.view = state.view && kept(layer, state.view);
  if (!state.view) return;
  const { top, left, span } = state.view;
  const inside = (at, start) => at >= start && at < start + span;
  if (!inside(state.i, top) || !inside(state.j, left)) {
    state.view = centred(layer, state.i, state.j, span);
  }
}

/** Room for the map, in CSS pixels. */
function mapRoom() { return Math.max(220, Math.min(640, element("map-box").clientWidth)); }

/** Which cells the canvas shows, in blocks of which size, and where. @param {Layer} layer */
function frame(layer) {
  const whole = Math.max(layer.n, layer.m), view = state.view;
  const span = view ? view.span : whole, room = mapRoom();
  const most = Math.max(Math.min(layer.n, span), Math.min(layer.m, span));
  let ruler = labelRoom(layer) + 8, cell = Math.min(40, Math.floor((room - ruler) / most));
  const words = cell >= 12;
  if (!words) {
    ruler = 8 + measure(String(whole));
    // Large cells are equal to the pixel. Small ones may differ by one, so that the map fills its
    // place; blocks keep them from falling below a pixel.
    const exact = (room - ruler - 4) / most;
    cell = exact >= 5 ? Math.min(40, Math.floor(exact)) : exact;
  }
  let size = cell >= 1 ? 1 : 2 ** Math.ceil(Math.log2(1 / cell));
  const baked = Boolean(layer.planes) && state.scale !== "value"
    && (!view || size >= layer.planes.size);
  if (baked) size = layer.planes.size;
  const start = (at) => Math.floor(at / size) * size;
  const top = view ? start(view.top) : 0, left = view ? start(view.left) : 0;
  const rows = Math.ceil(Math.min(layer.n - top, span) / size);
  const columns = Math.ceil(Math.min(layer.m - left, span) / size);
  return { origin: { top, left }, rows, columns, size, baked, words, cell: cell * size, ruler };
}

/** The blocks of a frame, from tiles; what is not computed yet is taken from coarser blocks.
 * @param {Layer} layer @param {any} at @returns {{plane: Plane, missing: number}} */
function framed(layer, at) {
  const { origin, rows, columns, size } = at, ofValues = state.scale === "value";
  const which = state.plane === "max" ? "max" : "mean";
  const key = [layer.number, state.head, which, ofValues, size, origin.top, origin.left, rows,
    columns].join(" ");
  if (lastPlane && lastPlane.key === key) return { plane: lastPlane.plane, missing: 0 };
  const weight = new Float32Array(rows * columns), lift = new Float32Array(rows * columns);
  const plane = { size, rows, columns, weight, lift };
  const baked = layer.planes && !ofValues ? bakedPlane(layer, state.head, which, page.array) : null;
  const coarse = at.baked ? baked : baked || thumbPlane(page.layers.indexOf(layer), state.head);
  const until = performance.now() + SLICE, first = { r: origin.top / size, c: origin.left / size };
  let missing = 0;
  for (let r = 0; r < rows;) {
    const tr = Math.floor((first.r + r) / TILE), down = Math.min(rows, (tr + 1) * TILE - first.r);
    for (let c = 0; c < columns;) {
      const tc = Math.floor((first.c + c) / TILE);
      const across = Math.min(columns, (tc + 1) * TILE - first.c);
      const tile = at.baked ? null
        : tileAt(layer, state.head, ofValues, size, tr, tc, performance.now() < until);
      if (!tile && !at.baked) missing++;
      const from = /** @type {Plane} */ (tile ? tile[which] : coarse), shift = tile ? TILE : 0;
      for (let y = r; y < down; y++) {
        for (let x = c; x < across; x++) {
          const row = tile ? first.r + y - tr * shift : Math.floor((first.r + y) * size / from.size);
          const column = tile ? first.c + x - tc * shift
            : Math.floor((first.c + x) * size / from.size);
          weight[y * columns + x] = from.weight[row * from.columns + column];
          lift[y * columns + x] = from.lift[row * from.columns + column];
        }
      }
      c = across;
    }
    r = down;
  }
  if (!missing) lastPlane = { key, plane };
  return { plane, missing };
}

let refining = 0;
function drawMap() {
  const layer = page.layers[state.layer], at = frame(layer);
  offerPlanes(at.size);
  const { plane, missing } = framed(layer, at), { ruler, cell, words, origin } = at;
  const box = { x: ruler, y: ruler, width: cell * plane.columns, height: cell * plane.rows };
  shown = { layer, plane, origin, box, cell, words, which: state.plane };
  const canvas = /** @type {HTMLCanvasElement} */ (element("map"));
  const context = fit(canvas, ruler + box.width + 2, ruler + box.height + 2);
  canvas.dataset.shown = JSON.stringify({ origin, box, cell, size: at.size, missing });
  canvas.classList.toggle("movable", Boolean(state.view));
  paintCells(context, plane, box, missing);
  drawRulers(context);
  drawSelection(context);
  drawMini(layer);
  element("map-title").textContent = `Layer ${layer.number}, head ${state.head}`;
  element("map-hint").textContent = mapHint(layer, plane);
  element("map-busy").textContent = missing ? `computing exact cells: ${missing} tiles to go` : "";
  clearTimeout(refining);
  if (missing) refining = setTimeout(drawMap, 0);
}

/** Offer both planes where cells are pooled. @param {number} size */
function offerPlanes(size) {
  const view = /** @type {HTMLSelectElement} */ (element("view"));
  const words = { mean: `mean of ${size} × ${size} cells`, max: `largest of ${size} × ${size} cells` };
  view.replaceChildren(...Object.entries(words).map(([value, textContent]) =>
    make("option", { value, textContent })));
  view.value = state.plane;
  element("view-label").hidden = size === 1;
}

/** The whole head with the view marked on it. @param {Layer} layer */
function drawMini(layer) {
  const canvas = /** @type {HTMLCanvasElement} */ (element("mini")), view = state.view;
  canvas.hidden = !view;
  if (!view) return;
  const longest = Math.max(layer.n, layer.m), side = 112 / longest;
  const width = Math.max(8, layer.m * side), height = Math.max(8, layer.n * side);
  const context = fit(canvas, width, height);
  const plane = thumbPlane(state.layer, state.head);
  context.putImageData(planeImage(context, plane, { width, height }), 0, 0);
  context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  context.lineWidth = 2;
  const inside = (length) => Math.max(3, Math.min(length, view.span) * side);
  context.strokeRect(view.left * side, view.top * side, inside(layer.m), inside(layer.n));
}

/** @param {CanvasRenderingContext2D} context @param {Plane} plane
 * @param {{x: number, y: number, width: number, height: number}} box @param {number} missing */
function paintCells(context, plane, box, missing) {
  const ratio = window.devicePixelRatio || 1;
  const key = [tone, state.scale, box.width, box.height, ratio].join(" ");
  if (missing || !lastImage || lastImage.plane !== plane || lastImage.key !== key) {
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
    + "Hover to look, click to pin, Ctrl and wheel to zoom, drag to move.";
}

const ROUTES = {
  interface: "read where the model asks for its attention function",
  sdpa: "read at scaled_dot_product_attention", arrays: "from arrays",
  regard: "read at a product with a matrix of regard’s",
};

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

/** The labels of both axes, for canvas and figure. */
function rulerLabels() {
  const { layer, plane, origin, box, cell, words } = shown;
  /** @type {{text: string, x: number, y: number, upright: boolean, here: boolean}[]} */
  const labels = [];
  const axis = (count, start, all, chosen, upright) => {
    const step = words ? 1 : niceStep(count * plane.size, count * cell / 44);
    for (let at = 0; at < count; at++) {
      const token = start + at * plane.size;
      if (!words && token % step >= plane.size) continue;
      const middle = (at + 0.5) * cell;
      labels.push({ text: words ? tokenLabel(token, all) : String(token - token % step), upright,
        here: chosen >= token && chosen < token + plane.size,
        x: upright ? box.x + middle : box.x - 5, y: upright ? box.y - 5 : box.y + middle });
    }
  };
  axis(plane.rows, origin.top, layer.n, state.i, false);
  axis(plane.columns, origin.left, layer.m, state.j, true);
  return labels;
}

/** @param {CanvasRenderingContext2D} context */
function drawRulers(context) {
  const style = getComputedStyle(document.body);
  const ink = style.getPropertyValue("--ink"), accent = style.getPropertyValue("--accent");
  context.font = RULER_FONT;
  context.textBaseline = "middle";
  for (const { text, x, y, upright, here } of rulerLabels()) {
    context.fillStyle = here ? accent : ink;
    context.textAlign = upright ? "left" : "right";
    context.save();
    context.translate(x, y);
    if (upright) context.rotate(-Math.PI / 2);
    context.fillText(shorten(text, shown.box.x - 8), 0, 0);
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

/** @param {CanvasRenderingContext2D} context */
function drawSelection(context) {
  const { plane, origin, box, cell } = shown;
  const row = Math.floor((state.i - origin.top) / plane.size);
  const column = Math.floor((state.j - origin.left) / plane.size);
  const x = box.x + column * cell, y = box.y + row * cell;
  context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  context.lineWidth = 1;
  const inRows = row >= 0 && row < plane.rows, inColumns = column >= 0 && column < plane.columns;
  if (inRows) context.strokeRect(box.x - 0.5, y - 0.5, box.width + 1, cell + 1);
  if (inColumns) context.strokeRect(x - 0.5, box.y - 0.5, cell + 1, box.height + 1);
  if (!inRows || !inColumns) return;
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
  const { plane, which } = shown;
  if (plane.size === 1) return pairWords(layer, state.head, i, j);
  const last = (at, all) => Math.min(at + plane.size, all) - 1;
  const weight = plane.weight[row * plane.columns + column];
  const where = `queries ${i}–${last(i, layer.n)} → keys ${j}–${last(j, layer.m)}: `;
  if (Number.isNaN(weight)) return `${where}masked`;
  return `${where}${which === "max" ? "largest" : "mean"} weight ${number(weight)}`;
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
