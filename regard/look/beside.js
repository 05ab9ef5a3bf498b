// Two runs of the same shape: one head of each, and the difference of their weights.

const BESIDE = 128;  // blocks per side, at most
/** What the three maps show. @type {any} */
let pair = null;

function buildBeside() {
  element("beside-part").hidden = !page.beside;
  if (!page.beside) return;
  for (const at of [0, 1, 2]) {
    const canvas = element(`beside-${at}`);
    canvas.addEventListener("mousemove", (event) => {
      const cell = besideAt(event);
      if (cell) tip(event, besideWords(cell));
      else hideTip();
    });
    canvas.addEventListener("mouseleave", hideTip);
    canvas.addEventListener("click", (event) => {
      const cell = besideAt(event);
      if (cell) select({ i: cell.i, j: cell.j, pinned: true });
    });
  }
}

/** The mean blocks of both runs in the view of the map. @param {Layer[]} both */
function besidePlanes(both) {
  const { n, m, planes } = both[0], view = state.view;
  const origin = { top: view ? view.top : 0, left: view ? view.left : 0 };
  const span = view ? view.span : Math.max(n, m);
  const rows = Math.min(span, n - origin.top), columns = Math.min(span, m - origin.left);
  const whole = planes && !view;
  const size = whole ? planes.size : Math.ceil(span / BESIDE);
  const found = both.map((layer) => (whole ? bakedPlane(layer, state.head, "mean", page.array)
    : blocks(layer, state.head, false, { ...origin, rows, columns }, size).mean));
  return { planes: found, origin, size };
}

function drawBeside() {
  if (!page.beside) return;
  const both = [page.layers[state.layer], page.beside.layers[state.layer]];
  const key = JSON.stringify([state.layer, state.head, state.view]);
  if (!pair || pair.key !== key) pair = { key, ...besidePlanes(both) };
  const { planes: [here, there], origin, size } = pair, { rows, columns } = here;
  const room = Math.max(160, Math.min(420, element("beside-part").clientWidth / 3 - 24));
  const cell = room / Math.max(rows, columns);
  const box = { width: cell * columns, height: cell * rows };
  const difference = here.weight.map((weight, at) => weight - there.weight[at]);
  const largest = largestOf(difference.map((x) => (Number.isNaN(x) ? 0 : x)));
  Object.assign(pair, { both, cell, difference, largest });
  [here, there, null].forEach((plane, at) => {
    const canvas = /** @type {HTMLCanvasElement} */ (element(`beside-${at}`));
    const context = fit(canvas, box.width, box.height);
    context.putImageData(plane ? planeImage(context, plane, box)
      : differenceImage(context, difference, here, box, largest), 0, 0);
    const row = Math.floor((state.i - origin.top) / size);
    const column = Math.floor((state.j - origin.left) / size), wide = Math.max(6, cell + 2);
    context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--accent");
    context.lineWidth = 2;
    context.strokeRect((column + 0.5) * cell - wide / 2, (row + 0.5) * cell - wide / 2, wide, wide);
    const words = [`This run: ${page.title}`, `Beside it: ${page.beside.title}`,
      "This run − the one beside it"][at];
    element(`beside-${at}-title`).textContent = words;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${words}, layer ${both[0].number}, head ${state.head}`);
    canvas.dataset.shown = JSON.stringify({ rows, columns, size, ...origin, cell, largest });
  });
  element("beside-words").textContent = besideWords({ i: state.i, j: state.j, at: -1 });
  element("beside-legend").replaceChildren(...[["below", "more weight beside it, −"],
    ["above", "more weight in this run, +"]].flatMap(([end, words]) => {
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = css(SIGNED[tone][end]);
    return [swatch, make("span", { textContent: `${words}${number(largest)}` })];
  }));
  element("beside-hint").textContent = `Rows are queries, columns are keys${size > 1
    ? `; one dot is the mean of ${size} × ${size} cells` : ""}. The difference is of weights, not of `
    + "lift, and its colours reach to the largest difference shown. Tokens are compared by position.";
}

/** Signed colours, 0 in the middle; masked where either run is.
 * @param {CanvasRenderingContext2D} context @param {Float32Array} difference @param {Plane} plane
 * @param {{width: number, height: number}} box @param {number} largest */
function differenceImage(context, difference, plane, box, largest) {
  const ratio = window.devicePixelRatio || 1, { below, zero, above } = SIGNED[tone];
  const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const colours = Uint32Array.from(difference, (x) => {
    if (Number.isNaN(x)) return packed(HATCH[tone].ground);
    const end = x < 0 ? below : above, amount = Math.abs(x) / (largest || 1);
    return packed(zero.map((c, at) => Math.round(c + amount * (end[at] - c))));
  });
  for (let y = 0, at = 0; y < height; y++) {
    const row = Math.floor(y * plane.rows / height) * plane.columns;
    for (let x = 0; x < width; x++, at++) {
      pixels[at] = colours[row + Math.floor(x * plane.columns / width)];
    }
  }
  return image;
}

/** @param {MouseEvent} event */
function besideAt(event) {
  if (!pair) return null;
  const { planes: [plane], origin, size, cell } = pair;
  const row = Math.floor(event.offsetY / cell), column = Math.floor(event.offsetX / cell);
  if (row < 0 || column < 0 || row >= plane.rows || column >= plane.columns) return null;
  const i = origin.top + row * size, j = origin.left + column * size;
  return { i, j, at: row * plane.columns + column };
}

/** Both weights and their difference, of a pair or of a block. @param {any} cell */
function besideWords({ i, j, at }) {
  const { both, planes, size } = pair, [a, b] = both;
  const block = at >= 0 && size > 1;
  const [here, there] = block ? planes.map((plane) => plane.weight[at])
    : [weightAt(a, state.head, i, j), weightAt(b, state.head, i, j)];
  const other = (k, length) => (page.beside.labels.length === length ? page.beside.labels[k] : `#${k}`);
  const where = block ? `block at query ${i}, key ${j}: mean ` : `${tokenName(i, a.n)} → `
    + `${tokenName(j, a.m)}, beside it ${other(i, b.n)} → ${other(j, b.m)}: `;
  const told = (weight) => (Number.isNaN(weight) ? "masked" : number(weight));
  const more = Number.isNaN(here - there) ? "" : `, difference ${number(here - there)}`;
  return `${where}weight ${told(here)} and ${told(there)}${more}`;
}
