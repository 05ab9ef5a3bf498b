// The panels that can be saved: what each draws, its title, and its numbers.

/** The lines above a figure: what, where from, what is selected. @param {string} what */
function headOf(what) {
  const layer = page.layers[state.layer];
  return [`${what}: layer ${layer.number}, head ${state.head}`,
    `${page.title} · ${layer.name} · kind ${kindOf(layer, state.head)}`,
    sinkShare(layer, state.head)];
}

/** The weights of a row or a column with their positions. @param {"sent" | "received"} which */
function sideRows(which) {
  const layer = page.layers[state.layer], { head, i, j } = state, sent = which === "sent";
  const weights = sent ? rowWeights(layer, head, i) : columnWeights(layer, head, j);
  const length = sent ? layer.m : layer.n;
  return [[sent ? "key" : "query", "token", "weight", "lift"], ...Array.from(weights, (weight, at) =>
    [at, tokenLabel(at, length), weight, weight * visibleKeys(layer, head, sent ? i : at)])];
}

/** The blocks that the map shows: a line per row, a column per column; empty where masked. */
function mapRows() {
  const { layer, plane, origin } = shown;
  const name = (at, length) => (plane.size === 1 ? tokenName(at, length)
    : `${at}-${Math.min(at + plane.size, length) - 1}`);
  const head = Array.from({ length: plane.columns }, (_, c) =>
    name(origin.left + c * plane.size, layer.m));
  const word = plane.size === 1 ? "query \\ key" : `query \\ key, ${shown.which} of a block`;
  return [[word, ...head], ...Array.from({ length: plane.rows }, (_, r) => [
    name(origin.top + r * plane.size, layer.n),
    ...plane.weight.subarray(r * plane.columns, (r + 1) * plane.columns)])];
}

function headRows() {
  const names = ["entropy", "keys", "distance", "first", "special", "sink"];
  const scored = page.kinds.map(({ name }) => name);
  const rows = page.layers.flatMap((layer) => Array.from({ length: layer.heads }, (_, h) => {
    const told = layer.statistics, kind = kindOf(layer, h);
    const score = (id) => (told.scores[id] ? told.scores[id].score[h] : null);
    return [layer.number, h, layer.name, layer.n, layer.m,
      ...names.map((id) => (told[id] ? told[id][h] : null)), kind, score(kind),
      ...scored.map(score)];
  }));
  return [["layer", "head", "name", "queries", "keys", "entropy", "effective_keys", "distance",
    "first", "special", "learned_sink", "kind", "score", ...scored], ...rows];
}

/** Every number on the way to b: a line per key, then the sum. */
function workedRows() {
  const layer = page.layers[state.layer], { head, i } = state, told = work(layer, head, i);
  const width = layer.value ? layer.e : 0, values = layer.value || new Float32Array(0);
  const index = Array.from({ length: width }, (_, c) => c);
  const lines = Array.from(told.weights, (weight, j) => [j, tokenLabel(j, layer.m), told.dots[j],
    told.scores[j], biasAt(layer, head, i, j), Number(isVisible(layer, head, i, j)),
    told.exponentials[j], weight,
    ...index.map((c) => weight * values[(keyHead(layer, head) * layer.m + j) * width + c])]);
  const own = layer.output ? [["model", "", "", "", "", "", "", "",
    ...vector(layer.output, head, layer.n, width, i)]] : [];
  return [["key", "token", "dot", "scaled", "bias", "visible", "exp", "weight",
    ...index.map((c) => `av_${c}`)], ...lines,
    ["b", "", "", "", "", "", told.sum, 1, ...(told.output || [])], ...own];
}

/** @type {Object<string, {words: string, bar: boolean, title: () => string[],
 *   body: () => {nodes: Element[], width: number, height: number}, rows: () => any[][] | Promise<any[][]>}>} */
const PANELS = {
  heads: { words: "every head", bar: true, body: () => traced(element("heads")), rows: headRows,
    title: () => [`Every head: ${page.title}`, element("facts").textContent || "",
      "Thumbnails are the mean over blocks of cells."] },
  map: { words: "the map", bar: true, body: () => mapFigure(), rows: mapRows,
    title: () => [...headOf("Attention"), shown.plane.size === 1
      ? "Rows are queries, columns are keys."
      : `Rows are queries, columns are keys; ${shown.which} of ${shown.plane.size} × `
        + `${shown.plane.size} cells.`] },
  kinds: { words: "the kind's scores", bar: false, body: () => traced(element("kinds")),
    title: () => headOf("Kind"), rows: () => {
      const layer = page.layers[state.layer];
      return [["kind", "score", "threshold", "chance", "queries", "earned"],
        ...kindRows(layer, state.head).map((row) => [row.kind, row.score, row.threshold,
          row.chance, row.queries, Number(row.earned)])];
    } },
  sent: { words: "what the query attends to", bar: true, body: () => traced(element("sent")),
    title: () => headOf("One row"), rows: () => sideRows("sent") },
  received: { words: "who attends to the key", bar: true,
    body: () => traced(element("received")), title: () => headOf("One column"),
    rows: () => sideRows("received") },
  arcs: { words: "the strongest edges", bar: false, body: () => {
    const picture = /** @type {SVGSVGElement} */ (element("arcs").firstElementChild);
    return { nodes: [...picture.cloneNode(true).childNodes].map((node) =>
      /** @type {Element} */ (node)), width: Number(picture.getAttribute("width")),
      height: Number(picture.getAttribute("height")) };
  }, title: () => [...headOf("Strongest edges"), element("arcs-hint").textContent || ""],
  rows: () => [["query", "query_token", "key", "key_token", "weight"],
    ...drawArcs.edges.map(({ i, j, weight }) => [i, tokenLabel(i, page.layers[state.layer].n), j,
      tokenLabel(j, page.layers[state.layer].m), weight])] },
  totals: { words: "what each key receives", bar: true, body: () => traced(element("totals")),
    title: () => headOf("Received in all"), rows: () => {
      const layer = page.layers[state.layer], { head } = state, even = evenReceived(layer, head);
      const sums = receivedBy(layer, head);
      return [["key", "token", "received", "even_share"], ...Array.from(even, (x, j) =>
        [j, tokenLabel(j, layer.m), sums[j], x])];
    } },
  image: { words: "the picture", bar: false, body: () => traced(element("image-box")),
    title: () => [...headOf("On the picture"), element("image-hint").textContent || ""],
    rows: imageRows },
  rollout: { words: "the rollout", bar: true, body: () => traced(element("rollout")),
    title: () => [`Rollout: ${page.title}`, `query ${tokenName(state.i, page.layers[0].n)}, `
      + `${page.layers.length} layers`], rows: () => [["key", "token", "share"],
      ...Array.from(rollout(state.i), (x, j) => [j, tokenLabel(j, page.layers[0].m), x])] },
  beside: besidePanel(),
  worked: { words: "the worked output", bar: false, rows: workedRows,
    body: () => traced(element("worked")),
    title: () => [...headOf("One output, worked"), `query ${tokenName(state.i,
      page.layers[state.layer].n)}`] },
};
