// The steps of the worked output, in the order in which attention is taught.

const AROUND = 8;       // outputs shown on each side of the query, where all are computed at once
const SIDE_BY_SIDE = 32; // heads whose outputs are shown beside each other

/** What a step does, in words; null where this layer has no such step.
 * @type {[string, (layer: Layer) => string | null][]} */
const TAUGHT = [
  ["inputs", (layer) => `A sequence goes in: one vector a for each of the ${layer.n} tokens`
    + `${layer.inputs ? "" : " (not in this page)"}. ${memoryWords(layer)}Token ${tokenName(state.i, layer.n)} is the `
    + `query: what will its output see?`],
  ["q, k, v", (layer) => (layer.d ? "Every input is multiplied by three learned matrices: "
    + `qᵢ = W^q aᵢ asks, kⱼ = W^k aⱼ answers, vⱼ = W^v aⱼ is what is handed on. ${makers(layer)}`
    : null)],
  ["rotary", (layer) => rotaryWords(layer)],
  ["α = q · k", (layer) => (layer.scale ? "Relevance is a dot product: multiply qᵢ and kⱼ number by "
    + "number and add up. Open a number to see its products." : null)],
  ["scale", (layer) => (layer.scale ? `Times ${number(layer.scale)}`
    + `${Math.abs(layer.scale - layer.d ** -0.5) < 1e-6 ? `, which is 1/√${layer.d}` : ""}, so that `
    + "sums of many products do not grow with their number."
    + (layer.softcap ? ` Then tanh keeps it between −${layer.softcap} and ${layer.softcap}.` : "")
    : null)],
  ["position", (layer) => (layer.bias ? (layer.formula ? `Here the score is ${layer.formula}.`
    : "A bias is added that this pair has by itself, such as its distance.") : null)],
  ["mask", (layer) => (layer.spans || layer.bits ? "Keys that the query may not see are crossed out"
    + `${layer.causal ? ": those of the future" : ""}; their weight will be 0.` : null)],
  ["softmax", (layer) => "Exponentials make all of them positive; dividing by their sum makes "
    + `them shares of 1. ${layer.sinks ? "A sink takes its share and gives nothing." : ""}`],
  ["α′ v", (layer) => (layer.value ? "Every value vector is taken as many times as its weight says."
    : null)],
  ["sum", (layer) => (layer.value ? "Their sum is the output b of the query: it has seen the whole "
    + "input, in one step." : null)],
  ["check", (layer) => (layer.value ? "Is this what the model itself computed?" : null)],
  ["all at once", (layer) => (layer.value ? "The same for every query, in parallel: as matrices "
    + "A = softmax(scale · Q Kᵀ) and B = A V." : null)],
  ["heads", (layer) => (layer.value && layer.heads > 1 ? `${layer.heads} heads do this side by side, `
    + `each with matrices of its own. Their outputs stand one after the other, ${layer.heads} × `
    + `${layer.e} = ${layer.heads * layer.e} numbers, ${mixingWords(layer)}` : null)],
];

/** Where keys and values come from, if not from the queries' own sequence. @param {Layer} layer */
function memoryWords(layer) {
  const named = layer.memoryOf ? `the output of “${layer.memoryOf}”` : "another sequence that the layer was given";
  if (layer.memoryWidth) {
    return `Keys and values come from ${named}: ${layer.m} vectors of ${layer.memoryWidth} numbers`
      + `${layer.memory ? "" : " (not in this page)"}. `;
  }
  return layer.n !== layer.m && layer.route !== "arrays"
    ? `The ${layer.m} keys come from elsewhere (another sequence, or a cache), which this record does not hold. ` : "";
}

/** Which linear layers made q, k and v of the inputs, as far as that was found. @param {Layer} layer */
function makers(layer) {
  const made = ["q", "k", "v"].flatMap((name, at) =>
    (layer.madeBy[at] ? [`${name} by “${layer.madeBy[at]}”`] : []));
  return made.length ? `Recomputed from a and found equal: ${made.join(", ")}.`
    : layer.inputs ? "(Here q, k and v are no plain product of one matrix and a: they are rotated, or "
      + "normalized, or their heads lie mixed in it.)" : "";
}

/** The numbers of the steps that a layer has. @param {Layer} layer */
function stepsOf(layer) {
  return TAUGHT.flatMap(([, words], at) => (words(layer) === null ? [] : [at + 1]));
}

/** A node that belongs to a step: not shown yet, shown as the one at hand, or simply shown.
 * @template {HTMLElement} T @param {number} number_ @param {T} node @returns {T} */
function atStep(number_, node) {
  node.classList.toggle("later", state.step > 0 && number_ > state.step);
  node.classList.toggle("now", number_ === state.step);
  return node;
}

/** @param {number} by */
function goStep(by) {
  const steps = [0, ...stepsOf(page.layers[state.layer])];
  const at = steps.findLastIndex((step) => step <= state.step);
  select({ step: steps[(at + by + steps.length) % steps.length] });
}

/** @param {Layer} layer */
function drawSteps(layer) {
  const steps = stepsOf(layer);
  const button = (text, label, act, pressed = false) => {
    const node = make("button", { type: "button", textContent: text });
    node.setAttribute("aria-label", label);
    node.setAttribute("aria-pressed", String(pressed));
    node.addEventListener("click", act);
    return node;
  };
  const focused = document.activeElement?.closest("#steps")
    ? document.activeElement.getAttribute("aria-label") : null;
  element("steps").replaceChildren(
    button("‹ b", "Step back, key b", () => goStep(-1)),
    ...steps.map((step) => button(`${step} ${TAUGHT[step - 1][0]}`, `Step ${step}: ${TAUGHT[step - 1][0]}`,
      () => select({ step: state.step === step ? 0 : step }), state.step === step)),
    button("n ›", "Next step, key n", () => goStep(1)),
    button("all", "All steps at once", () => select({ step: 0 }), state.step === 0));
  for (const node of element("steps").children) {
    if (focused && node.getAttribute("aria-label") === focused) /** @type {HTMLElement} */ (node).focus();
  }
  const words = state.step ? TAUGHT[state.step - 1][1](layer) : "";
  element("step-words").textContent = words || "";
}

/** The outputs of all queries near this one, and of all heads for this one.
 * @param {Layer} layer @param {number} head @param {number} i */
function wholeLines(layer, head, i) {
  if (!layer.value) return [];
  const start = Math.max(0, i - AROUND), stop = Math.min(layer.n, i + AROUND + 1);
  const rows = Array.from({ length: stop - start }, (_, at) => start + at);
  const outputs = rows.map((at) => outputOf(layer, head, at));
  const most = Math.max(...outputs.map(largestOf));
  const all = make("div", { className: "together" },
    make("h3", { textContent: rows.length < layer.n ? `B = A V, rows ${start} to ${stop - 1}`
      : "B = A V, all rows" }), ...outputs.map((numbers, at) => make("p", {
      className: `vector${rows[at] === i ? " chosen" : ""}` },
    make("span", { className: "what", textContent: tokenName(rows[at], layer.n) }),
    strip(numbers, most, "b"))));
  if (layer.heads === 1) return [atStep(12, all)];
  const heads = Array.from({ length: Math.min(layer.heads, SIDE_BY_SIDE) }, (_, h) =>
    outputOf(layer, h, i));
  const largest = Math.max(...heads.map(largestOf));
  const beside = make("div", { className: "together" },
    make("h3", { textContent: `All heads, b of ${tokenName(i, layer.n)}` }),
    ...heads.map((numbers, h) => make("p", { className: `vector${h === head ? " chosen" : ""}` },
      make("span", { className: "what", textContent: `head ${h}` }), strip(numbers, largest, "b"))));
  if (layer.heads > SIDE_BY_SIDE) {
    beside.append(make("p", { className: "hint",
      textContent: `and ${layer.heads - SIDE_BY_SIDE} more heads` }));
  }
  beside.append(...mixedLines(layer, heads));
  return [make("div", { className: "halves" }, atStep(12, all), atStep(13, beside))];
}

/** b of one query. @param {Layer} layer @param {number} head @param {number} i */
function outputOf(layer, head, i) {
  const weights = rowWeights(layer, head, i), values = /** @type {Float32Array} */ (layer.value);
  const output = new Float64Array(layer.e), start = keyHead(layer, head) * layer.m * layer.e;
  for (let j = 0; j < layer.m; j++) {
    if (!(weights[j] > 0)) continue;
    for (let c = 0; c < layer.e; c++) output[c] += weights[j] * values[start + j * layer.e + c];
  }
  return output;
}
