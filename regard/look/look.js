// The page: one selection (layer, head, query i, key j) that every panel shows, and its controls.

/** The whole state of the page. view: what a zoomed map shows; plane: which pooled cells show;
 * allKeys: of the worked table; step: of the worked output that is at hand, 0 for all. */
const state = {
  layer: 0, head: 0, i: 0, j: 0, pinned: false, scale: "lift", plane: "mean",
  /** @type {View | null} */ view: null, allKeys: false, step: 0,
  /** @type {any} */ arcs: { share: 50, each: true, sinks: false },
};

// log2(lift) from 1/16 of uniform to the largest lift that the longest row allows, at most 256.
const longestRow = Math.max(...page.layers.map((layer) => layer.m));
const liftRange = { low: -4, high: Math.min(8, Math.max(3, Math.ceil(Math.log2(longestRow)))) };

/** @param {number} at @param {number} length */
function tokenLabel(at, length) {
  return hasLabels(length) ? page.tokens.labels[at] : `#${at}`;
}
/** A token with its position. @param {number} at @param {number} length */
function tokenName(at, length) {
  return hasLabels(length) ? `${page.tokens.labels[at]} (${at})` : `#${at}`;
}
/** Whether an axis of this length has tokens. @param {number} length */
function hasLabels(length) { return page.tokens.labels.length === length; }
/** @param {number} at @param {number} length */
function isJoined(at, length) {
  return hasLabels(length) && page.tokens.joined[at];
}

let waiting = false, passing = false;
/** Change the selection; panels are drawn once per frame.
 * @param {Partial<typeof state>} change
 * @param {boolean} hover the pointer may move on at once, so the worked table waits for it to rest
 */
function select(change, hover = false) {
  Object.assign(state, change);
  passing = hover;
  const clamp = (x, count) => Math.max(0, Math.min(count - 1, Math.trunc(x) || 0));
  state.layer = clamp(state.layer, page.layers.length);
  const layer = page.layers[state.layer];
  state.head = clamp(state.head, layer.heads);
  state.i = clamp(state.i, layer.n);
  state.j = clamp(state.j, layer.m);
  if ("i" in change || "j" in change || "layer" in change) follow();
  if (!waiting) requestAnimationFrame(() => { waiting = false; draw(); });
  waiting = true;
}

function draw() {
  drawBar();
  markHead();
  drawMap();
  drawKinds();
  if (passing) {
    if (isShort()) drawTokens();
    drawRestSoon();
  } else drawRest();
  writeHash();
  document.body.dataset.state = JSON.stringify(state);
  performance.mark("drawn");
}

function drawBar() {
  const layer = page.layers[state.layer];
  const heads = /** @type {HTMLSelectElement} */ (element("head"));
  if (heads.length !== layer.heads) {
    heads.replaceChildren(...Array.from({ length: layer.heads }, (_, h) =>
      make("option", { value: String(h), textContent: String(h) })));
  }
  const values = { layer: state.layer, head: state.head, query: state.i, key: state.j };
  for (const [id, value] of Object.entries(values)) {
    const control = /** @type {HTMLInputElement} */ (element(id));
    control.value = String(value);
    if (id === "query") control.max = String(layer.n - 1);
    if (id === "key") control.max = String(layer.m - 1);
  }
  element("query-token").textContent = tokenLabel(state.i, layer.n);
  element("key-token").textContent = tokenLabel(state.j, layer.m);
  element("readout").textContent = weightWords(layer, state.head, state.i, state.j);
  const pin = element("pin");
  pin.setAttribute("aria-pressed", String(state.pinned));
  pin.textContent = state.pinned ? "Unpin (Esc)" : "Pin (p)";
}

function writeHeader() {
  const { layers, tokens, notes, change, pooling, dtype, precision } = page, first = layers[0];
  element("title").textContent = page.title;
  const heads = [...new Set(layers.map((layer) => layer.heads))].join(" or ");
  const shown = tokens.labels.length || first.m;
  const facts = [`${layers.length} ${layers.length === 1 ? "layer" : "layers"} × ${heads} heads`,
    shown < tokens.total ? `${shown} of ${tokens.total} tokens` : `${shown} tokens`,
    first.d ? `${first.d} numbers per query and key` : "no queries or keys, positions alone"];
  if (pooling) facts.push(`the model’s sentence vector is ${pooling}`);
  element("facts").textContent = facts.join(" · ");
  element("proof").textContent = change === null ? unproved()
    : change === 0
      ? "The model’s output was bit-identical with and without this capture (both were run)."
      : `The model’s output changed by at most ${number(change)} under this capture `
        + "(both were run).";
  if (change !== null) element("proof").dataset.change = String(change);
  const all = [...notes];
  if (precision.weightError !== null) {
    all.push("Numbers in this page are rounded to float16; the largest error of any weight is "
      + `${number(precision.weightError)}${precision.allRows ? "" : ", in evenly spread rows"}.`);
  }
  if (layers.some((layer) => layer.planes)) {
    all.push(`The whole maps are pooled in blocks of ${first.planes.size} × ${first.planes.size} `
      + "cells; rows, columns and single cells are exact.");
  }
  element("notes").replaceChildren(...all.map((textContent) =>
    make("p", { className: "note", textContent })));
  const ran = change === null ? "" : ` The model computed in ${dtype}.`;
  element("made").textContent = `Made by regard look.${ran} This page `
    + `carries ${precision.travels} and computes in double precision.`;
}

/** Why there is no comparison of outputs. */
function unproved() {
  return page.layers.every((layer) => layer.route === "arrays") ? "No model ran here: these are arrays."
    : "Recorded while the model ran; its output was not compared with a run without the capture.";
}

function writeHash() {
  const { pinned, arcs } = state;
  const edges = `${arcs.share}${arcs.each ? "" : ",all"}${arcs.sinks ? ",nosinks" : ""}`;
  putHash(`${hashOf(`&pin=${Number(pinned)}`)}${state.step ? `&step=${state.step}` : ""}`
    + (edges === "50" ? "" : `&arcs=${edges}`));
}

function readHash() {
  const given = readPlace();
  state.pinned = given.get("pin") === "1";
  state.step = Math.max(0, Math.min(TAUGHT.length, Math.trunc(Number(given.get("step"))) || 0));
  const [edges, ...options] = (given.get("arcs") || "50").split(",");
  Object.assign(state.arcs, { share: Math.max(5, Math.min(95, Number(edges) || 50)),
    each: !options.includes("all"), sinks: options.includes("nosinks") });
}

/** Where a first look is best spent: the largest lift between two tokens three or more apart and
 * not the tokenizer's own; in a long text, among those of its last token. */
function firstSelection() {
  const ordinary = (at, length) => !(hasLabels(length) && page.tokens.special[at]);
  let most = -1;
  page.layers.forEach((layer, l) => {
    const rows = Array.from({ length: layer.n }, (_, i) => i).filter((i) => ordinary(i, layer.n));
    for (const i of layer.n <= 64 ? rows : rows.slice(-1)) {
      for (let h = 0; h < layer.heads; h++) {
        const keys = visibleKeys(layer, h, i);
        rowWeights(layer, h, i).forEach((weight, j) => {
          const apart = Math.abs(i - j) >= 3 && ordinary(j, layer.m);
          if (!apart || !(weight * keys > most)) return;
          most = weight * keys;
          Object.assign(state, { layer: l, head: h, i, j });
        });
      }
    }
  });
}

Object.assign(STEPS, { p: () => ({ pinned: !state.pinned }), Enter: () => ({ pinned: true }),
  Escape: () => ({ pinned: false }) });
Object.assign(ACTS, { n: () => goStep(1), b: () => goStep(-1) });

/** Whether the words are so few that they may follow every step of the pointer. */
function isShort() {
  const layer = page.layers[state.layer];
  return Math.max(layer.n, layer.m) <= 128;
}

/** What takes longer than a passing pointer should wait for, and where it stands.
 * @type {[() => void, string][]} */
const REST = [[drawTokens, "sent"], [drawTotals, "totals"], [drawImage, "image-part"],
  [drawRollout, "rollout"], [drawBeside, "beside-part"], [drawArcs, "arcs"], [drawWorked, "worked"]];
const REST_AFTER = 120;    // milliseconds without a move: panels that are in the window
const UNSEEN_AFTER = 450;  // and all others
/** Ids of panels that are in the window, kept by an observer: asking would lay out the page. */
const inWindow = new Set();

function drawRest() {
  clearTimeout(drawRestSoon.timer);
  for (const [panel] of REST) panel();
}
/** Once the pointer rests, a panel at a time: if it moves on, it waits for one of them at most. */
function drawRestSoon() {
  clearTimeout(drawRestSoon.timer);
  const unseen = REST.filter(([, id]) => !inWindow.has(id));
  const left = [...REST.filter(([, id]) => inWindow.has(id)), ...unseen];
  const next = () => {
    const first = left.shift();
    if (first) first[0]();
    const pause = left.length === unseen.length ? UNSEEN_AFTER - REST_AFTER : 0;
    if (left.length) drawRestSoon.timer = setTimeout(next, pause);
  };
  drawRestSoon.timer = setTimeout(next, unseen.length < left.length ? REST_AFTER : UNSEEN_AFTER);
}
drawRestSoon.timer = 0;

/** Keep `inWindow`. */
function watchRest() {
  const watching = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) inWindow.add(target.id);
      else inWindow.delete(target.id);
    }
  });
  for (const [, id] of REST) watching.observe(element(id));
}

function repaint() {
  drawLegend();
  paintHeads();
  draw();
}

function start() {
  writeHeader();
  firstSelection();
  readHash();
  const layers = /** @type {HTMLSelectElement} */ (element("layer"));
  layers.append(...page.layers.map((layer, l) =>
    make("option", { value: String(l), textContent: String(layer.number), title: layer.name })));
  const names = { layer: "layer", head: "head", query: "i", key: "j" };
  for (const [id, name] of Object.entries(names)) {
    element(id).addEventListener("change", (event) => {
      const control = /** @type {HTMLInputElement} */ (event.target);
      select({ [name]: Number(control.value) });
    });
  }
  element("pin").addEventListener("click", () => select({ pinned: !state.pinned }));
  buildScale();
  element("scale-value").hidden = !page.layers.some((layer) => layer.value);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => { readHash(); select({ layer: state.layer }); });
  dark.addEventListener("change", () => { tone = dark.matches ? "dark" : "light"; repaint(); });
  drawLegend();
  buildHeads();
  buildMap();
  buildWorked();
  buildArcs();
  buildImage();
  buildBeside();
  buildSaving();
  buildHighlight();
  buildFind();
  watchRest();
  select({ layer: state.layer }, !isShort());
}

start();
