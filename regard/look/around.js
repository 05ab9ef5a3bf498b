// What stands before and after the heads: rotary encoding, and the matrix W^o that mixes them.

/** A query or key as it was before it was turned by its position, by the angles that the record
 * found; the vector itself where nothing turned it.
 * @param {Layer} layer @param {"query" | "key"} which @param {number} head @param {number} at */
function beforeTurn(layer, which, head, at) {
  const after = which === "query" ? vector(layer.query, head, layer.n, layer.d, at)
    : vector(layer.key, keyHead(layer, head), layer.m, layer.d, at);
  const angles = layer.turned && layer.turned[which];
  if (!layer.turned || !angles) return after;
  const { pairs, layout } = layer.turned, before = Float64Array.from(after);
  const factor = layer.turned.factors[which === "query" ? 0 : 1];
  for (let c = 0; c < pairs; c++) {
    const [a, b] = layout === "halves" ? [c, c + pairs] : [2 * c, 2 * c + 1];
    const cosine = Math.cos(angles[at * pairs + c]) / factor, sine = Math.sin(angles[at * pairs + c]) / factor;
    before[a] = cosine * after[a] + sine * after[b];
    before[b] = cosine * after[b] - sine * after[a];
  }
  return before;
}

/** The query and the chosen key: before, by which angles, and after.
 * @param {Layer} layer @param {number} head @param {number} i @param {number} j */
function rotaryLines(layer, head, i, j) {
  const { turned } = layer;
  if (!turned) return [];
  /** @type {any[][]} */
  const lines = [["query", "q", i, layer.n], ...(turned.key ? [["key", "k", j, layer.m]] : [])];
  return lines.map(([which, name, at, length]) => {
    const before = beforeTurn(layer, which, head, at), { pairs } = turned;
    const factor = turned.factors[which === "query" ? 0 : 1];
    const angles = /** @type {Float32Array} */ (turned[which]).subarray(at * pairs, (at + 1) * pairs);
    const after = which === "query" ? vector(layer.query, head, layer.n, layer.d, at)
      : vector(layer.key, keyHead(layer, head), layer.m, layer.d, at);
    const most = Math.max(largestOf(before), largestOf(after));
    const word = (textContent) => make("span", { className: "hint", textContent });
    return atStep(3, make("p", { className: "vector turn" },
      make("span", { className: "what", textContent: `R ${name} of ${tokenLabel(at, length)}` }),
      strip(before, most, name), word("turned by"), strip(angles, Math.PI, "angle"),
      ...(factor === 1 ? [] : [word(`and times ${number(factor)}`)]), word("gives"), strip(after, most, `R ${name}`),
      word(`${pairs} angles in radians, ${signedRange(angles)}`)));
  });
}

/** What is known of rotary encoding, in words; null where nothing speaks for one. @param {Layer} layer */
function rotaryWords(layer) {
  const { turned, d, unturned } = layer;
  if (!turned) {
    return unturned ? `Position: this layer’s q and k may be turned by it, for ${unturned}. But none of the tensors that its `
      + "own layers made, turned in a way known here, is the q that it multiplied; so the angles are not known, and "
      + "q and k are shown as they were multiplied." : null;
  }
  const { pairs, layout, factors, madeBy } = turned;
  const which = 2 * pairs < d ? `of the first ${2 * pairs} of ${d} numbers, each pair` : "each pair of numbers";
  const mates = layout === "halves" ? `c and c + ${pairs}` : "2c and 2c + 1";
  const times = factors.every((x) => x === 1) ? "" : factors[0] === factors[1] || !turned.key
    ? ` and multiplied by ${number(factors[0])}`
    : ` (q is also multiplied by ${number(factors[0])}, k by ${number(factors[1])})`;
  const names = madeBy.filter(Boolean).map((name) => `“${name}”`).filter((x, at, all) => all.indexOf(x) === at);
  const missing = turned.key ? "" : layer.m > layer.n ? " (Keys of a cache were turned in earlier steps.)"
    : " (How the keys were turned was not found.)";
  return `Position: ${which} (${mates}) of q and k is turned by an angle that `
    + `grows with the token’s position${times}, so that q · k depends on how far apart the two tokens are. The angles `
    + (turned.own ? "are those of the cosines and sines that the layer was given. "
      : "were found by comparing what the layer made with what it multiplied. ")
    + `What ${names.length ? names.join(" and ") : "the layer"} made, turned by them, is what was multiplied, largest difference `
    + `${number(turned.gap)}; q and k before are turned back by them.${missing}`;
}

/** The part of W^o that a head's numbers go through. @param {Layer} layer @param {number} head
 * @param {ArrayLike<number>} numbers b, or a part of it */
function mixedBy(layer, head, numbers) {
  const { mixing, heads, e } = layer;
  if (!mixing || !mixing.weight) return new Float64Array(0);
  const { weight, width } = mixing, mixed = new Float64Array(width);
  for (let o = 0, at = head * e; o < width; o++, at += heads * e) {
    for (let c = 0; c < e; c++) mixed[o] += weight[at + c] * numbers[c];
  }
  return mixed;
}
/** @param {Float64Array} numbers @param {string} name */
function wholeStrip(numbers, name) { return strip(numbers, largestOf(numbers), name, 96); }

/** What becomes of all heads: W^o b of each, and their sum with the bias.
 * @param {Layer} layer @param {Float64Array[]} outputs b of each head */
function mixedLines(layer, outputs) {
  const { mixing } = layer;
  if (!mixing?.weight || outputs.length < layer.heads) return [];
  const parts = outputs.map((numbers, h) => mixedBy(layer, h, numbers));
  const sum = Float64Array.from({ length: mixing.width }, (_, c) =>
    parts.reduce((total, part) => total + part[c], mixing.bias ? mixing.bias[c] : 0));
  const most = Math.max(...parts.map(largestOf)), size = (x) => Math.sqrt(x.reduce((s, y) => s + y * y, 0));
  const line = (name, numbers, largest, className = "vector") => make("p", { className },
    make("span", { className: "what", textContent: name }), strip(numbers, largest, name, 96),
    make("span", { className: "hint", textContent: `length ${number(size(numbers))}` }));
  return [make("h3", { textContent: "What W^o makes of each head" }),
    ...parts.map((part, h) => line(`W^o b, head ${h}`, part, most,
      `vector${h === state.head ? " chosen" : ""}`)),
    ...(mixing.bias ? [line("bias", mixing.bias, most)] : []),
    line("sum: o", sum, largestOf(sum))];
}

/** What is known of W^o, in words. @param {Layer} layer */
function mixingWords(layer) {
  const { mixing } = layer;
  if (!mixing) return "which a last matrix W^o (not seen here) mixes.";
  const name = `which “${mixing.name}” mixes: W^o, ${mixing.width} × ${mixing.numbers / mixing.width}`;
  if (mixing.weight) return `${name} numbers, rounded to float16 in this page.`;
  return `${name} numbers. They are not in this page, which would be too large with them; in Python they `
    + "are a call’s mixing.weight.";
}
