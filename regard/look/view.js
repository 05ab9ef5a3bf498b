// Which part of a map is looked at, and how keys, wheel and drags change it.

const SMALLEST = 8;     // cells across at the deepest zoom
const NEAR = 64;        // cells across where single cells are asked for

/** Zoom and pan by buttons, wheel, drags and the small map. @param {HTMLElement} canvas */
function buildView(canvas) {
  canvas.addEventListener("pointerdown", (event) => {
    grip = { x: event.offsetX, y: event.offsetY, moved: false, view: state.view };
  });
  addEventListener("pointerup", () => { if (grip && !grip.moved) grip = null; });
  // With Ctrl, as pinching a touchpad also says, so that the plain wheel still scrolls the page.
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const cell = cellAt(event);
    if (cell) zoom(event.deltaY < 0 ? 1 / 1.3 : 1.3, cell);
  }, { passive: false });
  element("view").addEventListener("change", () => {
    select({ plane: /** @type {HTMLSelectElement} */ (element("view")).value });
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
}

/** Whether the click that is handled ends a drag. */
function wasDragged() {
  const dragged = grip && grip.moved;
  grip = null;
  return dragged;
}

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
function lookAt(view) { select({ view }); }
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

/** Offer both planes where cells are pooled. @param {number} size */
function offerPlanes(size) {
  const view = /** @type {HTMLSelectElement} */ (element("view")), now = `${size} ${state.plane}`;
  if (view.dataset.offered === now) return;
  view.dataset.offered = now;
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
  if (plane) context.putImageData(planeImage(context, plane, { width, height }), 0, 0);
  context.strokeStyle = colourOf("--accent");
  context.lineWidth = 2;
  const inside = (length) => Math.max(3, Math.min(length, view.span) * side);
  context.strokeRect(view.left * side, view.top * side, inside(layer.m), inside(layer.n));
}
