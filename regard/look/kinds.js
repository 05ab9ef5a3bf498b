// What kind of head it is: every kind's score beside its threshold and beside chance.

/** The kinds in their order, and the answer for a head that earns none. */
const KIND_NAMES = [...raw.kinds.map(({ name }) => name), "none"];

/** @param {Layer} layer @param {number} head @returns {string} */
function kindOf(layer, head) { return layer.statistics.kinds[head]; }

/** A kind as a word with its colour; the colour alone says nothing. @param {string} kind */
function kindChip(kind) {
  const chip = make("span", { className: "kind" }, make("i"), kind);
  chip.dataset.kind = kind;
  return chip;
}

/** Whether a score earns its kind's name. @param {any} kind @param {any} scores
 * @param {number} head */
function isEarned(kind, scores, head) {
  const score = scores.score[head], chance = scores.chance[head];
  return score >= kind.threshold && (kind.name === "broad"
    || score >= Math.max(page.aboveChance * chance, chance + page.errorsAbove * scores.error[head]));
}

/** The kinds of the selected head as rows of numbers, also for its CSV.
 * @param {Layer} layer @param {number} head */
function kindRows(layer, head) {
  return page.kinds.map((kind) => {
    const scores = layer.statistics.scores[kind.name];
    return { kind: kind.name, words: kind.words, threshold: kind.threshold,
      score: scores ? scores.score[head] : null,
      chance: scores && kind.name !== "broad" ? scores.chance[head] : null,
      queries: scores ? scores.queries : 0,
      earned: Boolean(scores) && isEarned(kind, scores, head) };
  });
}

function drawKinds() {
  const layer = page.layers[state.layer], { head } = state, own = kindOf(layer, head);
  element("kinds-title").replaceChildren("Kind: ", kindChip(own));
  const body = make("tbody", {}, ...kindRows(layer, head).map((row) => {
    const line = make("tr", { title: `weight ${row.words}` },
      make("td", {}, kindChip(row.kind)), make("td", {}, meter(row)),
      make("td", { className: "amount", textContent: row.score === null ? "–" : percent(row.score) }),
      make("td", { className: "amount", textContent: percent(row.threshold) }),
      make("td", { className: "amount",
        textContent: row.chance === null ? "–" : percent(row.chance) }));
    line.classList.toggle("leading", row.kind === own);
    return line;
  }));
  const heads = ["kind", "", "score", "needs", "chance"].map((textContent) =>
    make("th", { scope: "col", textContent }));
  element("kinds").replaceChildren(
    make("table", { className: "kinds" }, make("thead", {}, make("tr", {}, ...heads)), body));
  element("kinds-hint").textContent = "Score: the share of a query’s weight that lies on the "
    + "pattern (hover for its words), averaged over the queries that have it. A head is named "
    + `after the first kind whose score reaches what it needs and ${page.aboveChance}× chance, which is the `
    + `score of equal weights, and lies ${page.errorsAbove} standard errors above it. ${sinkShare(layer, head)}`;
}

/** @param {any} row */
function meter(row) {
  const box = make("div", { className: "meter" }), fill = make("i", {}), mark = make("u", {});
  fill.style.width = `${100 * (row.score || 0)}%`;
  fill.classList.toggle("earned", row.earned);
  mark.style.left = `${100 * row.threshold}%`;
  box.append(fill, mark);
  if (row.chance !== null) {
    const chance = make("s", {});
    chance.style.left = `${100 * Math.min(1, row.chance)}%`;
    box.append(chance);
  }
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", row.score === null ? `${row.kind}: not scored, too few queries`
    : `${row.kind}: ${percent(row.score)}, needs ${percent(row.threshold)}`);
  return box;
}

/** How much of a head's weight its sinks take, in words. @param {Layer} layer
 * @param {number} head */
function sinkShare(layer, head) {
  const { special, first, sink } = layer.statistics;
  const parts = [`${percent((special || first)[head])} on ${sinkNames(layer)}`];
  if (sink) parts.push(`${percent(sink[head])} on the learned sink`);
  return `Sinks take ${parts.join(" and ")} of this head’s weight.`;
}

/** Which tokens are counted as sinks. @param {Layer} layer */
function sinkNames(layer) {
  if (!layer.statistics.special) return "the first token";
  return page.image ? "the tokens before the patches" : "the tokenizer’s own tokens";
}

/** The share of one row's weight on sinks, in words. @param {Layer} layer
 * @param {ArrayLike<number>} weights */
function rowSinkShare(layer, weights) {
  const marked = hasLabels(layer.m) && page.tokens.special.some(Boolean);
  let share = 0;
  for (let j = 0; j < layer.m; j++) {
    if (marked ? page.tokens.special[j] : j === 0) share += weights[j] || 0;
  }
  return `${percent(share)} of this row lies on ${sinkNames(layer)}.`;
}
