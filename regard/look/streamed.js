// The page of a map of any length: the server that it came from computes what is looked at.

const page = JSON.parse(element("data").textContent || "");
const SMALLEST = 8;  // cells across at the deepest zoom
const SIDE = 640;    // pixels of the map, at most
const RULER = 64;    // pixels beside it, for positions

const state = {
  layer: 0, head: 0, i: 0, j: 0, scale: "lift",
  /** @type {{top: number, left: number, span: number} | null} */ view: null,
};
const longestRow = Math.max(...page.layers.map((layer) => layer.m));
// log2(lift) from 1/16 of uniform to 256 times it, as on a page of its own.
const liftRange = { low: -4, high: Math.min(8, Math.max(3, Math.ceil(Math.log2(longestRow)))) };
/** The answer that is drawn, and the plane made of it. @type {any} */
let shown = null;
/** Takes a question back that nobody waits for any more. */
let asking = new AbortController();

/** @param {string} what @param {Object<string, number>} numbers @param {AbortSignal} [signal] */
async function ask(what, numbers, signal) {
  const given = new URLSearchParams(Object.entries(numbers).map(([k, v]) => [k, String(v)]));
  const answer = await fetch(`${what}?${given}`, { signal, cache: "no-store" });
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

/** @param {Partial<typeof state>} change */
function select(change) {
  const before = JSON.stringify([state.layer, state.head, state.view]);
  Object.assign(state, change);
  const clamp = (x, count) => Math.max(0, Math.min(count - 1, Math.trunc(x) || 0));
  state.layer = clamp(state.layer, page.layers.length);
  const layer = page.layers[state.layer];
  state.head = clamp(state.head, layer.heads);
  state.i = clamp(state.i, layer.n);
  state.j = clamp(state.j, layer.m);
  if (state.view) state.view = inside(layer, state.view);
  if (("i" in change || "j" in change) && state.view) follow(layer);
  drawBar(layer);
  if (!shown || before !== JSON.stringify([state.layer, state.head, state.view])) refine();
  else drawMap();
  readCell();
  document.body.dataset.state = JSON.stringify(state);
  const { top, left, span } = state.view || { top: 0, left: 0, span: 0 };
  const hash = `#layer=${state.layer}&head=${state.head}&i=${state.i}&j=${state.j}`
    + (span ? `&top=${top}&left=${left}&span=${span}` : "");
  if (location.hash !== hash) history.replaceState(null, "", hash);
}

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const [layer, head, j, top, left, span] = ["layer", "head", "j", "top", "left", "span"]
    .map((name) => Number(given.get(name)) || 0);
  // Without a word of the address: the last query, which under a causal mask sees all keys.
  const i = given.has("i") ? Number(given.get("i")) : Infinity;
  select({ layer, head, i, j, view: span > 0 ? { top, left, span } : null });
}

/** A view inside the map, or null for the whole of it.
 * @param {any} layer @param {{top: number, left: number, span: number}} view */
function inside(layer, { top, left, span }) {
  const across = Math.max(SMALLEST, Math.round(span));
  if (across >= Math.max(layer.n, layer.m)) return null;
  const start = (at, length) => Math.max(0, Math.min(length - across, Math.floor(at)));
  return { top: start(top, layer.n), left: start(left, layer.m), span: across };
}
/** Bring the selection into the view. @param {any} layer */
function follow(layer) {
  const { top, left, span } = state.view || { top: 0, left: 0, span: Infinity };
  const within = (at, start) => at >= start && at < start + span;
  if (within(state.i, top) && within(state.j, left)) return;
  state.view = inside(layer, { top: state.i - span / 2, left: state.j - span / 2, span });
}
/** @param {number} factor @param {{i: number, j: number}} at a cell that stays in its place */
function zoom(factor, { i, j }) {
  const layer = page.layers[state.layer], whole = Math.max(layer.n, layer.m);
  const old = state.view || { top: 0, left: 0, span: whole };
  const span = Math.max(SMALLEST, old.span * factor), ratio = span / old.span;
  select({ view: { top: i - (i - old.top) * ratio, left: j - (j - old.left) * ratio, span } });
}
/** Single cells around the selection. */
function nearView() {
  select({ view: { top: state.i - 32, left: state.j - 32, span: 64 } });
}

/** Ask for the view, and again for as long as more queries are on their way. */
async function refine() {
  asking.abort();
  const mine = asking = new AbortController();
  const layer = page.layers[state.layer], { head } = state;
  const view = state.view || { top: 0, left: 0, span: Math.max(layer.n, layer.m) };
  let seen = 0;
  element("map").dataset.shown = "";
  element("quality").textContent = "computing the first queries …";
  element("quality").dataset.exact = "";
  try {
    while (!mine.signal.aborted) {
      const told = await ask("map", { layer: layer.number, head, ...view, seen }, mine.signal);
      const progress = /** @type {HTMLProgressElement} */ (element("progress"));
      progress.value = told.taken / told.of;
      if (!told.mean) continue;
      seen = told.taken;
      shown = { ...told, layer, plane: planeOf(told) };
      drawMap();
      drawQuality(told);
      if (told.exact) return;
    }
  } catch (error) {
    if (mine.signal.aborted) return;
    element("quality").textContent = `The server gave no answer: ${/** @type {Error} */ (error).message}`;
    element("quality").dataset.exact = "failed";
  }
}

/** @param {any} told @returns {Plane} */
function planeOf({ mean, keys, size, rows, columns }) {
  const weight = Float32Array.from(mean, (x) => (x === null ? NaN : x));
  return { size, rows, columns, weight,
    lift: weight.map((x, at) => x * keys[Math.floor(at / columns)]) };
}

/** What the numbers on the map are worth. @param {any} told */
function drawQuality(told) {
  const counts = `${told.taken.toLocaleString("en")} of ${told.of.toLocaleString("en")} queries`;
  const cells = told.size === 1 ? "Exact: single cells." : `Exact: every dot is the mean of ${told.size} × `
    + `${told.size} cells, all computed.`;
  element("quality").textContent = told.exact ? cells
    : `Sampled: every dot is a mean of ${told.size} × ${told.size} cells, estimated from ${counts}, `
      + `whose weights are exact. Standard error ${(100 * told.typicalError).toPrecision(2)} % `
      + "(root mean square over the map); a strong query that was not drawn is missed. "
      + "More are being computed.";
  element("quality").dataset.exact = String(told.exact);
  element("quality").dataset.taken = String(told.taken);
}

function drawMap() {
  if (!shown) return;
  const { layer, plane, top, left, size } = shown;
  const wide = Math.min(SIDE, element("map-box").clientWidth - RULER - 4);
  const room = Math.max(220, Math.min(wide, Math.max(400, innerHeight - 380)));
  const cell = room / Math.max(plane.rows, plane.columns);
  const box = { x: RULER, y: 18, width: cell * plane.columns, height: cell * plane.rows };
  const canvas = /** @type {HTMLCanvasElement} */ (element("map"));
  const context = fit(canvas, box.x + box.width + 2, box.y + box.height + 2);
  const ratio = window.devicePixelRatio || 1;
  context.putImageData(planeImage(context, plane, box), Math.round(box.x * ratio),
    Math.round(box.y * ratio));
  shown.box = box;
  shown.cell = cell;
  drawRulers(context);
  drawSelection(context);
  canvas.dataset.shown = JSON.stringify({ box, cell, top, left, size, rows: plane.rows,
    columns: plane.columns });
  element("map-title").textContent = `Layer ${layer.number}, head ${state.head}`;
  element("map-hint").textContent = `${layer.name}. Rows are queries i, columns are keys j; each row `
    + `of the whole matrix sums to 1. ${layer.masked ? "Hatched cells are masked. " : ""}`
    + "Hover to read, click to select, Ctrl and wheel to zoom.";
}

/** @param {CanvasRenderingContext2D} context */
function drawRulers(context) {
  const { box, cell, size, plane, top, left } = shown;
  context.fillStyle = getComputedStyle(document.body).getPropertyValue("--ink");
  context.font = "12px system-ui, sans-serif";
  for (let part = 0; part < 5; part++) {
    const row = Math.floor((plane.rows - 1) * part / 4);
    const column = Math.floor((plane.columns - 1) * part / 4);
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillText(String(top + row * size), box.x - 5, box.y + (row + 0.5) * cell);
    context.textAlign = part === 4 ? "right" : part ? "center" : "left";
    context.textBaseline = "bottom";
    context.fillText(String(left + column * size), box.x + (column + (part ? 0.5 : 0)) * cell, box.y - 3);
  }
}

/** @param {CanvasRenderingContext2D} context */
function drawSelection(context) {
  const { box, cell, size, plane, top, left } = shown;
  const row = Math.floor((state.i - top) / size), column = Math.floor((state.j - left) / size);
  if (row < 0 || column < 0 || row >= plane.rows || column >= plane.columns) return;
  const wide = Math.max(cell, 6) + 2;
  context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  context.lineWidth = 2;
  context.strokeRect(box.x + (column + 0.5) * cell - wide / 2, box.y + (row + 0.5) * cell - wide / 2,
    wide, wide);
}

/** @param {MouseEvent} event */
function cellAt(event) {
  if (!shown) return null;
  const { box, cell, size, plane, top, left } = shown;
  const column = Math.floor((event.offsetX - box.x) / cell);
  const row = Math.floor((event.offsetY - box.y) / cell);
  if (row < 0 || column < 0 || row >= plane.rows || column >= plane.columns) return null;
  return { i: top + row * size, j: left + column * size, at: row * plane.columns + column };
}

/** @param {{i: number, j: number, at: number}} cell */
function cellWords({ i, j, at }) {
  const { size, mean, error, layer } = shown;
  const last = (start, all) => Math.min(start + size, all) - 1;
  const where = size === 1 ? `query ${i} → key ${j}: `
    : `queries ${i}–${last(i, layer.n)} → keys ${j}–${last(j, layer.m)}: `;
  if (mean[at] === null) return `${where}masked`;
  const off = error && error[at] !== null ? ` ± ${number(error[at])} (standard error)` : "";
  return `${where}${size === 1 ? "" : "mean "}weight ${number(mean[at])}${off}`;
}

/** @param {any} layer */
function drawBar(layer) {
  const heads = /** @type {HTMLSelectElement} */ (element("head"));
  if (heads.length !== layer.heads) {
    heads.replaceChildren(...Array.from({ length: layer.heads }, (_, h) =>
      make("option", { value: String(h), textContent: String(h) })));
  }
  const values = { layer: state.layer, head: state.head, query: state.i, key: state.j };
  for (const [id, value] of Object.entries(values)) {
    /** @type {HTMLInputElement} */ (element(id)).value = String(value);
  }
}

let reading = new AbortController();
/** The weight of the selected pair and the row that it stands in, exactly. */
async function readCell() {
  reading.abort();
  const mine = reading = new AbortController(), { head, i, j } = state;
  const layer = page.layers[state.layer];
  element("readout").dataset.weight = "";
  try {
    const told = await ask("cell", { layer: layer.number, head, i, j }, mine.signal);
    const lift = (weight) => liftWords(weight * told.keys);
    element("readout").textContent = told.weight === null ? "masked"
      : `weight ${number(told.weight)}, ${lift(told.weight)}`;
    element("readout").dataset.weight = String(told.weight);
    element("query-token").textContent = told.labels[0];
    element("key-token").textContent = told.labels[1];
    element("row-title").textContent = `Query ${i}: its largest weights`;
    element("row-hint").textContent = `It sees ${told.keys.toLocaleString("en")} ${told.keys === 1 ? "key" : "keys"}, as evenly as `
      + `${number3(Math.exp(told.entropy))} would be (entropy ${number(told.entropy)} nats).`;
    element("row-body").replaceChildren(...told.top.map(({ key, label, weight }) => {
      const go = make("button", { type: "button", textContent: String(key) });
      go.addEventListener("click", () => select({ j: key }));
      return make("tr", {}, make("td", {}, go), make("td", { textContent: label }),
        make("td", { textContent: number(weight) }), make("td", { textContent: lift(weight) }));
    }));
    document.body.dataset.read = `${layer.number} ${head} ${i} ${j}`;
  } catch (error) {
    if (!mine.signal.aborted) {
      element("readout").textContent = /** @type {Error} */ (error).message;
    }
  }
}

/** The map that is shown as rows of numbers; with what it is worth. */
function saveCsv() {
  if (!shown) return;
  const { plane, mean, error, top, left, size } = shown, lines = ["query,key,size,mean_weight,standard_error"];
  mean.forEach((weight, at) => {
    const i = top + Math.floor(at / plane.columns) * size, j = left + at % plane.columns * size;
    lines.push([i, j, size, weight ?? "", weight === null ? "" : error ? error[at] ?? "" : 0].join(","));
  });
  const link = make("a", { download: `regard-map-${state.head}.csv`,
    href: URL.createObjectURL(new Blob([`${lines.join("\n")}\n`], { type: "text/csv" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(/** @type {HTMLAnchorElement} */ (link).href), 1000);
}

function drawScale() {
  const { low, high } = liftRange, canvas = document.createElement("canvas"), width = 220;
  const context = fit(canvas, width, 12);
  for (let x = 0; x < width; x++) {
    context.fillStyle = css(rampColour(x / (width - 1)));
    context.fillRect(x, 0, 1, 12);
  }
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Colour scale of lift from ${2 ** low} to ${2 ** high}`);
  const places = [["≤ 1/16", 0], ["uniform", -low / (high - low)], [`≥ ${2 ** high}×`, 1]];
  const labels = places.map(([textContent, at]) => {
    const label = make("span", { textContent });
    label.style.left = `${100 * Number(at)}%`;
    return label;
  });
  element("legend").replaceChildren(make("div", { className: "ramp" }, canvas,
    make("div", { className: "ticks" }, ...labels)));
}

const STEPS = {
  ArrowUp: () => ({ i: state.i - 1 }), ArrowDown: () => ({ i: state.i + 1 }),
  ArrowLeft: () => ({ j: state.j - 1 }), ArrowRight: () => ({ j: state.j + 1 }),
  "[": () => ({ head: state.head - 1 }), "]": () => ({ head: state.head + 1 }),
  "{": () => ({ layer: state.layer - 1 }), "}": () => ({ layer: state.layer + 1 }),
  0: () => ({ view: null }),
};
const here = () => ({ i: state.i, j: state.j });
const ACTS = { "+": () => zoom(0.5, here()), "=": () => zoom(0.5, here()),
  "-": () => zoom(2, here()), 1: nearView };

/** @param {KeyboardEvent} event */
function onKey(event) {
  const target = /** @type {HTMLElement} */ (event.target), { key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || target.matches("input, select")) return;
  if (!(key in STEPS) && !(key in ACTS)) return;
  event.preventDefault();
  if (key in ACTS) ACTS[/** @type {keyof typeof ACTS} */ (key)]();
  else select(STEPS[/** @type {keyof typeof STEPS} */ (key)]());
}

function start() {
  const [first] = page.layers, size = (count) => count.toLocaleString("en");
  element("title").textContent = page.title;
  element("facts").textContent = `${page.layers.length} ${page.layers.length === 1 ? "layer" : "layers"} × `
    + `${first.heads} heads · ${size(first.n)} queries × ${size(first.m)} keys · computed where it is looked at`;
  element("proof").textContent = page.change === null ? "No model ran here: these are arrays."
    : page.change === 0 ? "The model’s output was bit-identical with and without this capture."
    : `The model’s output changed by at most ${number(page.change)} under this capture.`;
  if (page.change !== null) element("proof").dataset.change = String(page.change);
  element("notes").replaceChildren(...page.notes.map((textContent) =>
    make("p", { className: "note", textContent })));
  element("layer").append(...page.layers.map((layer, l) =>
    make("option", { value: String(l), textContent: String(layer.number), title: layer.name })));
  const names = { layer: "layer", head: "head", query: "i", key: "j" };
  for (const [id, name] of Object.entries(names)) {
    element(id).addEventListener("change", (event) =>
      select({ [name]: Number(/** @type {HTMLInputElement} */ (event.target).value) }));
  }
  const acts = { "zoom-in": ACTS["+"], "zoom-out": ACTS["-"], "zoom-cells": nearView,
    "zoom-whole": () => select({ view: null }), "save-csv": saveCsv };
  for (const [id, act] of Object.entries(acts)) element(id).addEventListener("click", act);
  const canvas = element("map");
  canvas.addEventListener("pointermove", (event) => {
    const cell = cellAt(event);
    if (cell) tip(event, cellWords(cell));
    else hideTip();
  });
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) select({ i: cell.i, j: cell.j });
  });
  canvas.addEventListener("wheel", (event) => {
    const cell = event.ctrlKey ? cellAt(event) : null;
    if (event.ctrlKey) event.preventDefault();
    if (cell) zoom(event.deltaY < 0 ? 1 / 2 : 2, cell);
  }, { passive: false });
  addEventListener("keydown", onKey);
  addEventListener("hashchange", readHash);
  addEventListener("resize", drawMap);
  dark.addEventListener("change", () => {
    tone = dark.matches ? "dark" : "light";
    drawScale();
    drawMap();
  });
  drawScale();
  readHash();
}

start();
