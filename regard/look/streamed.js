// The page of a map of any length: the server that it came from computes what is looked at.

const page = JSON.parse(element("data").textContent || "");

const state = {
  layer: 0, head: 0, i: 0, j: 0, scale: "lift", plane: "mean", pinned: false,
  /** @type {View | null} */ view: null,
};
const longestRow = Math.max(...page.layers.map((layer) => layer.m));
// log2(lift) from 1/16 of uniform to 256 times it, as on a page of its own.
const liftRange = { low: -4, high: Math.min(8, Math.max(3, Math.ceil(Math.log2(longestRow)))) };
/** Takes a question back that nobody waits for any more. */
let asking = new AbortController();

/** @param {string} what @param {Object<string, number | string>} numbers @param {AbortSignal} [signal] */
async function ask(what, numbers, signal) {
  const given = new URLSearchParams(Object.entries(numbers).map(([k, v]) => [k, String(v)]));
  const answer = await fetch(`${what}?${given}`, { signal, cache: "no-store" });
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

/** Which view was asked for, and which pair was read. */
const asked = { view: "", cell: "" };

/** @param {Partial<typeof state>} change */
function select(change) {
  Object.assign(state, change);
  const clamp = (x, count) => Math.max(0, Math.min(count - 1, Math.trunc(x) || 0));
  state.layer = clamp(state.layer, page.layers.length);
  const layer = page.layers[state.layer];
  state.head = clamp(state.head, layer.heads);
  state.i = clamp(state.i, layer.n);
  state.j = clamp(state.j, layer.m);
  if ("i" in change || "j" in change || "layer" in change) follow();
  else state.view = state.view && kept(layer, state.view);
  drawBar(layer);
  markHead();
  const { head, i, j, view } = state;
  const wanted = JSON.stringify([state.layer, head, view]);
  if (asked.view !== wanted) {
    asked.view = wanted;
    standIn();
    asking.abort();
    element("quality").textContent = "computing the first queries …";
    element("quality").dataset.exact = "";
    clearTimeout(refine.timer);
    // A drag asks where it rests.
    refine.timer = setTimeout(refine, grip ? 80 : 0);
  }
  drawMap();
  if ("plane" in change && shown && shown.told) drawQuality(shown.told);
  const pair = JSON.stringify([state.layer, head, i, j]);
  if (asked.cell !== pair) readCell();
  asked.cell = pair;
  document.body.dataset.state = JSON.stringify(state);
  putHash(hashOf());
}

function readHash() {
  // Without a word of the address: the last query, which under a causal mask sees all keys.
  if (!new URLSearchParams(location.hash.slice(1)).has("i")) {
    state.i = page.layers[state.layer].n - 1;
  }
  readPlace();
  if (state.scale === "value") state.scale = "lift";  // which this page does not have
  select({ layer: state.layer });
  drawLegend();
}

/** Ask for the view, and again for as long as more queries are on their way. */
async function refine() {
  asking.abort();
  const mine = asking = new AbortController();
  const layer = page.layers[state.layer], { head } = state;
  const { top, left, span } = viewOf(layer);
  let seen = 0;
  try {
    while (!mine.signal.aborted) {
      const told = await ask("map", { layer: layer.number, head, top, left, span, seen }, mine.signal);
      const progress = /** @type {HTMLProgressElement} */ (element("progress"));
      progress.value = told.taken / told.of;
      if (!told.mean) continue;
      seen = told.taken;
      keepLabels(told);
      shown = { layer, head, origin: { top: told.top, left: told.left }, told, planes: planesOf(told) };
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
/** @type {any} */
refine.timer = 0;

/** @param {any} told */
function drawQuality(told) {
  element("quality").textContent = qualityWords(told);
  element("quality").dataset.exact = String(told.exact);
  element("quality").dataset.taken = String(told.taken);
}

/** One button for each head; the server draws queries for their pictures, one head after another. */
async function buildHeads() {
  page.layers.forEach((layer, l) => {
    for (let h = 0; h < layer.heads; h++) {
      const button = make("button", { type: "button", className: "thumb" }, make("canvas", {}),
        make("b", { textContent: `L${layer.number} H${h}` }));
      button.dataset.layer = String(l);
      button.dataset.head = String(h);
      button.title = `L${layer.number} H${h}\n${layer.name}`;
      button.setAttribute("aria-label", `Layer ${layer.number} head ${h}`);
      button.addEventListener("click", () => select({ layer: l, head: h }));
      headButtons.push(button);
    }
  });
  element("heads").replaceChildren(...headButtons);
  sizeHeads();
  addEventListener("resize", soon(() => { if (sizeHeads()) paintHeads(); }));
  for (let of = headButtons.length; thumbs.size < of;) {
    const told = await ask("heads", { seen: thumbs.size }).catch(() => null);
    if (!told) return;
    of = told.of;
    for (const one of told.thumbs) {
      thumbs.set(`${one.layer} ${one.head}`, { layer: one.layer, head: one.head, told: one,
        planes: planesOf(one), origin: { top: 0, left: 0 } });
    }
    const [first] = thumbs.values();
    element("heads-hint").textContent = first ? `${thumbs.size} of ${of} heads. Each dot is the mean of `
      + `${first.told.size} × ${first.told.size} cells, ${first.told.exact ? "all computed" : "estimated from "
      + `${first.told.taken.toLocaleString("en")} queries of the head`}.` : "";
    paintHeads();
    drawMini(page.layers[state.layer]);
  }
}

/** The next token that holds the words; it becomes the query, or with Shift the key.
 * @param {KeyboardEvent} event */
async function findToken(event) {
  if (event.key !== "Enter") return;
  event.preventDefault();
  const asKey = event.shiftKey, words = /** @type {HTMLInputElement} */ (element("find")).value;
  const { at, count } = await ask("find", { words, start: asKey ? state.j : state.i });
  element("found").textContent = count ? `${count.toLocaleString("en")} found` : "not found";
  if (at !== null) select({ [asKey ? "j" : "i"]: at });
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
    if (layer.n === page.labelled) known.set(i, told.labels[0]);
    if (layer.m === page.labelled) known.set(j, told.labels[1]);
    keepBeside(told, i, j);
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

function repaint() {
  drawLegend();
  paintHeads();
  select({});
}

function start() {
  const [first] = page.layers, size = (count) => count.toLocaleString("en");
  element("title").textContent = page.title;
  element("facts").textContent = `${page.layers.length} ${page.layers.length === 1 ? "layer" : "layers"} × `
    + `${first.heads} heads · ${size(first.n)} queries × ${size(first.m)} keys · computed where it is looked at`;
  element("proof").textContent = page.change === null
    ? (page.arrays ? "No model ran here: these are arrays." : "Recorded while the model ran; its output was not compared.")
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
  const canvas = element("map");
  buildView(canvas);
  canvas.addEventListener("pointermove", (event) => {
    if (pan(event)) return;
    const cell = cellAt(event);
    if (cell) tip(event, cellWords(cell));
    else hideTip();
  });
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("click", (event) => {
    const cell = wasDragged() ? null : cellAt(event);
    if (cell) select({ i: cell.i, j: cell.j });
  });
  element("find-label").hidden = !page.labelled;
  element("find").addEventListener("keydown", findToken);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", readHash);
  addEventListener("resize", soon(drawMap));
  dark.addEventListener("change", () => { tone = dark.matches ? "dark" : "light"; repaint(); });
  buildScale();
  buildSaving();
  buildHeads();
  buildBeside();
  readHash();
}

start();
