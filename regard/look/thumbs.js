// The grid of all heads: a row for each layer, and its thumbnails.

const THUMB = 64;  // blocks per side at most
/** @type {HTMLElement[]} */
const headButtons = [];

/** One column per head of the widest layer, so that a row is a layer.
 * Says whether any size changed: a canvas that is fitted again is blank. */
function sizeHeads() {
  const grid = element("heads"), widest = Math.max(...page.layers.map((layer) => layer.heads));
  const room = grid.clientWidth - 8, roomy = Math.floor((room + 6) / widest) - 6;
  // Too narrow for a caption: thumbnails alone, and the numbers in the tooltip.
  const bare = widest > 1 && roomy < 50;
  const column = bare ? Math.max(16, Math.floor((room + 1) / widest) - 1) : Math.min(120, roomy);
  const size = column - 8;
  grid.classList.toggle("bare", bare);
  grid.style.gridTemplateColumns = `repeat(${widest}, ${column}px)`;
  const ratio = window.devicePixelRatio || 1;
  if (thumbSize.size === size && thumbSize.ratio === ratio) return false;
  Object.assign(thumbSize, { size, ratio });
  for (const button of headButtons) {
    fit(/** @type {HTMLCanvasElement} */ (button.firstChild), size, size);
  }
  return true;
}
const thumbSize = { size: 0, ratio: 0 };

let painting = 0;
/** Paint all thumbnails, a few at a time, so that the page answers meanwhile. */
function paintHeads() {
  const round = ++painting, left = [...element("heads").children];
  const some = () => {
    const until = performance.now() + 14;
    while (left.length && performance.now() < until) {
      const button = /** @type {HTMLElement} */ (left.shift());
      const canvas = /** @type {HTMLCanvasElement} */ (button.firstChild);
      const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
      const plane = thumbPlane(Number(button.dataset.layer), Number(button.dataset.head));
      const box = { width: thumbSize.size, height: thumbSize.size };
      if (plane) context.putImageData(planeImage(context, plane, box), 0, 0);
    }
    if (round === painting && left.length) setTimeout(some, 0);
    else if (round === painting) element("heads").dataset.painted = "all";
  };
  some();
}

function markHead() {
  for (const button of headButtons) {
    const here = Number(button.dataset.layer) === state.layer
      && Number(button.dataset.head) === state.head;
    button.setAttribute("aria-pressed", String(here));
  }
}
