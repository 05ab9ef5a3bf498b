// The panels of a page of any length that can be saved.

/** The lines above a figure. @param {string} what */
function headOf(what) {
  const layer = page.layers[state.layer];
  return [`${what}: layer ${layer.number}, head ${state.head}`, `${page.title} · ${layer.name}`];
}

/** The map as a line per block, with what each is worth. */
function mapRows() {
  const { plane, origin: { top, left }, told } = shown, { mean, largest, error } = told || { mean: [] };
  return [["query", "key", "size", "mean_weight", "standard_error", "largest_weight"],
    ...mean.map((weight, at) => [top + Math.floor(at / plane.columns) * plane.size,
      left + at % plane.columns * plane.size, plane.size, weight,
      weight === null ? null : error ? error[at] : 0, weight === null ? null : largest[at]])];
}

/** The small pictures as lines: where each block begins and its mean weight. */
function headRows() {
  return [["layer", "head", "query", "key", "size", "mean_weight"],
    ...[...thumbs.values()].flatMap(({ layer, head, told: { mean, columns, size } }) =>
      mean.map((weight, at) => [layer, head, Math.floor(at / columns) * size, at % columns * size,
        size, weight]))];
}

/** All weights of the query that is selected. */
async function rowRows() {
  const layer = page.layers[state.layer], { head, i } = state;
  const { weights, labels } = await ask("row", { layer: layer.number, head, i });
  return [["key", "token", "weight"], ...weights.map((weight, j) =>
    [j, labels ? labels[j] : `#${j}`, weight])];
}

/** @type {Object<string, {words: string, bar: boolean, title: () => string[],
 *   body: () => {nodes: Element[], width: number, height: number},
 *   rows: () => any[][] | Promise<any[][]>}>} */
const PANELS = {
  heads: { words: "every head", bar: true, rows: headRows, body: () => traced(element("heads")),
    title: () => [`Every head: ${page.title}`, element("heads-hint").textContent || ""] },
  map: { words: "the map", bar: true, rows: mapRows, body: () => mapFigure(),
    title: () => [...headOf("Attention"), "Rows are queries, columns are keys.",
      ...(element("quality").textContent || "").match(/[^.]+(\.\d[^.]*)*\.?/g)?.map((x) => x.trim()) || []] },
  row: { words: "the query's largest weights", bar: false, rows: rowRows,
    body: () => traced(element("row")), title: () => [...headOf("One row"),
      `query ${tokenName(state.i, page.layers[state.layer].n)}`,
      element("row-hint").textContent || ""] },
  beside: besidePanel(),
};
