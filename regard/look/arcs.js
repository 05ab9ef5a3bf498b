// The strongest edges of one head, drawn between two columns of tokens, and what each key receives.

const ARC_ROWS = 40;     // tokens in a column; of a longer text, those around the selection
const ARC_STEP = 19;     // pixels from one token to the next
const EDGES_AT_MOST = 2000;
const ARC_WIDTH = 460;   // at most

/** @typedef {{i: number, j: number, weight: number}} Edge */

/** The first of the tokens that a column shows. @param {number} at @param {number} length */
function columnStart(at, length) {
  return Math.max(0, Math.min(length - ARC_ROWS, at - (ARC_ROWS >> 1)));
}

/** Whether a key is left out with the sinks. @param {Layer} layer @param {number} j */
function isSink(layer, j) {
  const marked = hasLabels(layer.m) && page.tokens.special.some(Boolean);
  return marked ? page.tokens.special[j] : j === 0;
}

/** The smallest sets of edges that hold a share of the weight: of each row, or of all together.
 * @param {Layer} layer @param {number} head @param {number[]} rows */
function strongest(layer, head, rows) {
  const { arcs } = state;
  let left = 0;
  const each = rows.map((i) => {
    /** @type {Edge[]} */
    const edges = [];
    rowWeights(layer, head, i, state.scale === "value").forEach((weight, j) => {
      if (!(weight > 0)) return;
      if (arcs.sinks && isSink(layer, j)) left += weight;
      else edges.push({ i, j, weight });
    });
    return edges;
  });
  const take = (edges) => {
    const total = edges.reduce((sum, { weight }) => sum + weight, 0), goal = arcs.share / 100 * total;
    edges.sort((a, b) => b.weight - a.weight);
    let sum = 0, count = 0;
    while (count < edges.length && sum < goal - 1e-9) sum += edges[count++].weight;
    return edges.slice(0, count);
  };
  const groups = arcs.each ? each : [each.flat()];
  return { edges: groups.flatMap(take), all: each.reduce((sum, edges) => sum + edges.length, 0),
    left: left / rows.length };
}

function drawArcs() {
  const layer = page.layers[state.layer], { head, i, j } = state;
  const top = columnStart(i, layer.n), left = columnStart(layer.n === layer.m ? i : j, layer.m);
  const rows = Array.from({ length: Math.min(ARC_ROWS, layer.n) }, (_, at) => top + at);
  const count = Math.min(ARC_ROWS, layer.m);
  const { edges, all, left: hidden } = strongest(layer, head, rows);
  const inside = edges.filter((edge) => edge.j >= left && edge.j < left + count);
  const drawn = inside.sort((a, b) => a.weight - b.weight).slice(-EDGES_AT_MOST);
  const height = ARC_STEP * Math.max(rows.length, count) + 26;
  const width = Math.max(240, Math.min(ARC_WIDTH, widthOf("arcs") || ARC_WIDTH));
  const room = Math.min(width / 3.5, labelRoom(layer) + 12);
  const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`,
    class: "arcs", role: "img", "font-family": FIGURE_FONT, "font-size": 12,
    "aria-label": `${drawn.length} edges from queries on the left to keys on the right` });
  const y = (at, start) => 30 + ARC_STEP * (at - start);
  const x0 = room, x1 = width - room, bend = (x1 - x0) / 2;
  picture.append(svgText("query i", x0, 12, { "text-anchor": "end", fill: colourOf("--quiet") }),
    svgText("key j", x1, 12, { fill: colourOf("--quiet") }));
  for (const edge of drawn) {
    const a = y(edge.i, top), b = y(edge.j, left), own = edge.i === i;
    picture.append(svg("path", { d: `M${x0 + 5} ${a}C${x0 + bend} ${a} ${x1 - bend} ${b} ${x1 - 5} ${b}`,
      fill: "none", stroke: colourOf(own ? "--accent" : "--fill"), class: "edge",
      "stroke-width": round(0.6 + 3.4 * edge.weight), "stroke-opacity": own ? 0.95
        : round(0.15 + 0.7 * edge.weight), "data-query": edge.i, "data-key": edge.j }));
  }
  const label = (at, length, x, height_, more, choose) => {
    const node = svgText(shorten(tokenLabel(at, length), room - 6), x, height_, {
      "dominant-baseline": "central", fill: colourOf("--ink"), class: "end", ...more });
    node.addEventListener("click", () => select({ ...choose, pinned: true }));
    picture.append(node);
  };
  for (const at of rows) {
    label(at, layer.n, x0, y(at, top), { "text-anchor": "end", "data-query": at,
      ...(at === i ? { fill: colourOf("--accent"), "font-weight": 600 } : {}) }, { i: at });
  }
  for (let at = left; at < left + count; at++) {
    label(at, layer.m, x1, y(at, left), { "data-key": at,
      ...(at === j ? { fill: colourOf("--accent"), "font-weight": 600 } : {}) }, { j: at });
  }
  element("arcs").replaceChildren(picture);
  drawArcs.edges = edges;
  element("arcs-hint").textContent = arcWords(edges, inside.length, drawn.length, all, hidden);
}
/** The edges that are drawn, for the CSV. @type {Edge[]} */
drawArcs.edges = [];

/** @param {Edge[]} edges @param {number} inside @param {number} drawn @param {number} all
 * @param {number} hidden */
function arcWords(edges, inside, drawn, all, hidden) {
  const { arcs } = state, layer = page.layers[state.layer];
  const rows = layer.n > ARC_ROWS ? `the ${ARC_ROWS} queries around the selection` : "all queries";
  return `The ${edges.length} strongest of ${all} edges hold ${arcs.share}% of the weight of `
    + `${arcs.each ? "each row" : "all rows together"}, for ${rows}. `
    + (inside < edges.length ? `${edges.length - inside} of them end outside this part. ` : "")
    + (drawn < inside ? `Only the ${drawn} strongest are drawn. ` : "")
    + (arcs.sinks ? `Left out: ${percent(hidden)} of the weight, which lies on `
      + `${sinkNames(layer)}.` : "");
}

/** What each key would receive from equal weights, counted once per layer and head.
 * @param {Layer} layer @param {number} head @returns {Float64Array} */
function evenReceived(layer, head) {
  const counts = visibleCounts(layer, head), even = new Float64Array(layer.m + 1);
  for (let i = 0; i < layer.n; i++) {
    if (!counts[i]) continue;
    if (layer.bits) {
      for (let j = 0; j < layer.m; j++) if (isVisible(layer, head, i, j)) even[j] += 1 / counts[i];
    } else {
      even[layer.spans ? layer.spans[2 * i] : 0] += 1 / counts[i];
      even[layer.spans ? layer.spans[2 * i + 1] : layer.m] -= 1 / counts[i];
    }
  }
  if (!layer.bits) for (let j = 1; j < layer.m; j++) even[j] += even[j - 1];
  return even.subarray(0, layer.m);
}

/** The total that every key receives, as a text and its largest bars. */
function drawTotals() {
  const layer = page.layers[state.layer], { head, j } = state;
  const totals = receivedBy(layer, head);
  const even = evenReceived(layer, head), lifts = totals.map((x, at) => (even[at] ? x / even[at] : 0));
  element("totals").replaceChildren(...side({
    weights: totals, lifts, length: layer.m, chosen: j, axis: "key",
    title: "Received in all, summed over the queries",
    pick: (at) => select({ j: at, pinned: true }),
    pair: (at) => `${tokenName(at, layer.m)} receives ${number(totals[at])} from ${layer.n} queries, `
      + `${number3(lifts[at])}× an even share`,
    rest: "What a cache of keys could do without is where this is small.",
  }));
}

function buildArcs() {
  const share = /** @type {HTMLInputElement} */ (element("arc-share"));
  const words = () => { element("arc-share-words").textContent = `${share.value}%`; };
  share.value = String(state.arcs.share);
  words();
  share.addEventListener("input", () => {
    state.arcs.share = Number(share.value);
    words();
    drawArcs();
    writeHash();
  });
  for (const [id, name] of [["arc-each", "each"], ["arc-sinks", "sinks"]]) {
    const box = /** @type {HTMLInputElement} */ (element(id));
    box.checked = state.arcs[name];
    box.addEventListener("change", () => {
      state.arcs[name] = box.checked;
      drawArcs();
      writeHash();
    });
  }
}
