// Every head at a glance: one thumbnail per head, all on the same colour scale.

/** @type {Map<string, Plane>} */
const thumbs = new Map();
/** What heads can be ordered by; a statistic that no layer has is left out. */
const STATISTICS = [
  { id: "keys", order: "effective keys", format: (x) => `${short(x)} ${short(x) === "1" ? "key" : "keys"}` },
  { id: "distance", order: "mean distance", format: (x) => `${short(x)} away` },
  { id: "special", order: "weight on special tokens", format: (x) => `${percent(x)} spec` },
  { id: "first", order: "weight on the first token", format: (x) => `${percent(x)} first` },
  { id: "sink", order: "weight on the sink", format: (x) => `${percent(x)} sink` },
];

/** What fits under a thumbnail. @param {number} x */
function short(x) { return x < 0.95 ? x.toFixed(1) : number3(x); }

/** @param {number} x */
function percent(x) { return `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)}%`; }

/** The statistics that are worth showing: "first" repeats "special" where there are any. */
function shownStatistics() {
  const has = (id) => page.layers.some((layer) => layer.statistics[id]);
  return STATISTICS.filter(({ id }) => has(id) && !(id === "first" && has("special")));
}

/** @param {Layer} layer @param {number} head */
function statisticTexts(layer, head) {
  return shownStatistics().flatMap(({ id, format }) => {
    const values = layer.statistics[id];
    return values ? [{ id, text: format(values[head]) }] : [];
  });
}

function buildHeads() {
  const order = /** @type {HTMLSelectElement} */ (element("order"));
  order.append(make("option", { value: "layer", textContent: "layer and head" }),
    make("option", { value: "+kind", textContent: "kind" }));
  for (const { id, order: words } of shownStatistics()) {
    order.append(make("option", { value: `-${id}`, textContent: `${words}, most first` }),
      make("option", { value: `+${id}`, textContent: `${words}, least first` }));
  }
  order.addEventListener("change", orderHeads);
  page.layers.forEach((layer, l) => {
    for (let h = 0; h < layer.heads; h++) headButtons.push(headButton(layer, l, h));
  });
  orderHeads();
  addEventListener("resize", soon(() => { if (sizeHeads()) paintHeads(); }));
  element("heads-hint").textContent = headsHint();
}

/** @param {Layer} layer @param {number} l @param {number} h */
function headButton(layer, l, h) {
  const texts = statisticTexts(layer, h), kind = kindOf(layer, h);
  const words = [`kind ${kind}`, ...texts.map(({ text }) => text)].join(", ");
  const button = make("button", { type: "button", className: "thumb" },
    make("canvas", {}), make("b", { textContent: `L${layer.number} H${h}` }), kindChip(kind),
    ...texts.map(({ id, text }) => {
      const line = make("span", { textContent: text });
      line.dataset.statistic = id;
      return line;
    }));
  button.dataset.layer = String(l);
  button.dataset.head = String(h);
  button.title = `L${layer.number} H${h}: ${words}\n${layer.name}`;
  button.setAttribute("aria-label", `Layer ${layer.number} head ${h}: ${words}`);
  button.addEventListener("click", () => select({ layer: l, head: h }));
  return button;
}

function headsHint() {
  const names = {
    keys: "“keys” is exp(entropy), the effective number of keys a query uses",
    distance: "“away” is the mean distance |i − j|",
    special: "“spec” is the weight on tokens the tokenizer added",
    first: "“first” is the weight on the first token",
    sink: "“sink” is the weight on a learned sink, which has no token",
  };
  const baked = page.layers.find((layer) => layer.planes);
  const said = shownStatistics().map(({ id }) => names[id]).join("; ");
  const block = baked && Math.ceil(Math.max(baked.n, baked.m) / THUMB);
  return `${said}; each averaged over the queries.`
    + (block ? ` Each thumbnail dot is the mean over about ${block} × ${block} cells.` : "");
}

function orderHeads() {
  const order = /** @type {HTMLSelectElement} */ (element("order")).value, grid = element("heads");
  const id = order.slice(1), sign = order[0] === "-" ? -1 : 1;
  const value = (button) => {
    const layer = page.layers[Number(button.dataset.layer)], head = Number(button.dataset.head);
    if (id === "kind") {
      const kind = kindOf(layer, head), scores = layer.statistics.scores[kind];
      return KIND_NAMES.indexOf(kind) - (scores ? scores.score[head] : 0);
    }
    const values = layer.statistics[id];
    return values ? sign * values[head] : Infinity;
  };
  const sorted = [...headButtons];
  if (order !== "layer") sorted.sort((a, b) => value(a) - value(b));
  grid.replaceChildren(...sorted);
  grid.dataset.order = order === "layer" ? "" : id;
  for (const line of grid.querySelectorAll("span")) {
    line.classList.toggle("leading", line.dataset.statistic === id && order !== "layer");
  }
  if (sizeHeads()) paintHeads();
}

/** @param {number} l @param {number} h */
function thumbPlane(l, h) {
  const known = thumbs.get(`${l} ${h}`);
  if (known) return known;
  const layer = page.layers[l], longest = Math.max(layer.n, layer.m);
  const all = { top: 0, left: 0, rows: layer.n, columns: layer.m };
  const baked = layer.planes && bakedPlane(layer, h, "mean", page.array);
  const plane = baked ? pool(baked, Math.ceil(Math.max(baked.rows, baked.columns) / THUMB))
    : blocks(layer, h, false, all, Math.ceil(longest / THUMB)).mean;
  thumbs.set(`${l} ${h}`, plane);
  return plane;
}
