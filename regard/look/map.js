// The map of one head, from the whole of it down to single cells.

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
  buildView(canvas);
  canvas.addEventListener("pointermove", (event) => {
    if (pan(event) || isStill(event)) return;
    const cell = cellAt(event);
    if (!cell) return hideTip();
    if (!state.pinned) select({ i: cell.i, j: cell.j }, true);
    tip(event, cellWords(cell));
  });
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("click", (event) => {
    const cell = wasDragged() ? null : cellAt(event);
    if (cell) select({ i: cell.i, j: cell.j, pinned: true });
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

/** Room for the map, in CSS pixels. */
function mapRoom() { return Math.max(220, Math.min(640, widthOf("map-box"))); }

/** Which cells the canvas shows, in blocks of which size, and where. @param {Layer} layer */
function frame(layer) {
  const whole = Math.max(layer.n, layer.m), view = state.view;
  const span = view ? view.span : whole, room = mapRoom();
  const most = Math.max(Math.min(layer.n, span), Math.min(layer.m, span));
  let ruler = labelRoom(layer) + 8, cell = Math.min(40, Math.floor((room - ruler - 3) / most));
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
    + (layer.steps.length ? `Joined from ${layer.steps.length} steps of one generation, of which the first `
      + `has ${layer.steps[0]} ${layer.steps[0] === 1 ? "row" : "rows"}. ` : "")
    + (layer.spans || layer.bits ? "Hatched cells are masked. " : "")
    + "Hover to look, click to pin, Ctrl and wheel to zoom, drag to move.";
}

const ROUTES = {
  interface: "read where the model asks for its attention function",
  sdpa: "read at scaled_dot_product_attention", arrays: "from arrays",
  regard: "read at a product with a matrix of regard’s",
};

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
