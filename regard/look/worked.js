// One output b^i from q_i to the weighted sum, with the model's numbers, and the check at its end.

const ALL_UP_TO = 16;   // up to so many keys, all of them are written down
const ROWS_AT_MOST = 512;
/** Which key's products are written out. @type {number | null} */
let opened = null;

function buildWorked() {
  element("all-keys").addEventListener("click", () => {
    state.allKeys = !state.allKeys;
    drawWorked();
  });
}

function drawWorked() {
  const layer = page.layers[state.layer], { head, i } = state;
  const result = work(layer, head, i), keys = listedKeys(layer, result);
  const button = element("all-keys");
  button.hidden = layer.m <= ALL_UP_TO;
  button.setAttribute("aria-pressed", String(state.allKeys));
  button.textContent = state.allKeys ? "Show only the largest weights"
    : `Show ${layer.m > ROWS_AT_MOST ? `the ${ROWS_AT_MOST} largest` : `all ${layer.m} keys`}`;
  element("worked-title").textContent =
    `One output, worked: b of ${tokenName(i, layer.n)}`;
  element("worked").replaceChildren(
    make("p", { className: "formula" }, formula(layer)),
    ...(layer.inputs ? [atStep(1, inputLine(layer, i))] : []),
    ...(layer.d ? [atStep(2, queryLine(layer, head, i))] : []), ...rotaryLines(layer, head, i, state.j),
    make("div", { className: "scroll" }, workedTable(layer, head, i, result, keys)),
    ...outputLines(layer, head, i, result), ...wholeLines(layer, head, i));
  drawSteps(layer);
}

/** @param {Layer} layer */
function formula(layer) {
  const inner = `${number(layer.scale)} · q·k`, sink = layer.sinks ? " + exp(sink)" : "";
  const weight = `b = Σⱼ α′ⱼ vⱼ,   α′ⱼ = exp(lⱼ) / (Σ exp(l)${sink})`;
  if (layer.formula) return `${weight},   lⱼ by ${layer.formula}`;
  if (!layer.scale) return `${weight},   lⱼ = bias, which positions alone decide`;
  const logit = (layer.softcap ? `${layer.softcap} tanh(${inner} / ${layer.softcap})` : inner)
    + (layer.bias ? " + bias" : "");
  return `${weight},   lⱼ = ${logit}`;
}

/** The keys that get a line: all of a short text, else the largest weights and the chosen key.
 * @param {Layer} layer @param {any} result */
function listedKeys(layer, result) {
  const all = Array.from({ length: layer.m }, (_, j) => j);
  if (layer.m <= ALL_UP_TO) return all;
  if (state.allKeys && layer.m <= ROWS_AT_MOST) return all;
  const best = all.filter((j) => result.logits[j] > -Infinity)
    .sort((a, b) => result.weights[b] - result.weights[a])
    .slice(0, state.allKeys ? ROWS_AT_MOST : 10);
  return best.includes(state.j) ? best : [...best, state.j];
}

/** @param {Layer} layer @param {number} head @param {number} i */
function queryLine(layer, head, i) {
  const query = beforeTurn(layer, "query", head, i);
  return make("p", { className: "vector" },
    make("span", { className: "what", textContent: `q of ${tokenLabel(i, layer.n)}` }),
    strip(query, largestOf(query), "q"),
    make("span", { className: "hint",
      textContent: `${layer.d} numbers, ${signedRange(query)}` }));
}

/** The vector that the module was given for the query. @param {Layer} layer @param {number} i */
function inputLine(layer, i) {
  const all = /** @type {Float32Array} */ (layer.inputs);
  const input = all.subarray(i * layer.width, (i + 1) * layer.width);
  return make("p", { className: "vector" },
    make("span", { className: "what", textContent: `a of ${tokenLabel(i, layer.n)}` }),
    make("span", { className: "scroll" }, strip(input, largestOf(input), "a")),
    make("span", { className: "hint",
      textContent: `${layer.width} numbers, ${signedRange(input)}` }));
}

/** @param {ArrayLike<number>} numbers */
function signedRange(numbers) {
  const all = Array.from(numbers);
  return `from ${number(Math.min(...all))} to ${number(Math.max(...all))}`;
}

/** The columns of the table, left to right the steps of the computation.
 * @param {Layer} layer @param {number} head @param {number} i @param {any} result
 * @param {number[]} keys */
function columns(layer, head, i, result, keys) {
  const key = (j) => vector(layer.key, keyHead(layer, head), layer.m, layer.d, j);
  const scale = keys.reduce((most, j) => Math.max(most, largestOf(key(j))), 0);
  const seen = (j) => isVisible(layer, head, i, j);
  /** @type {any[]} */
  const list = [];
  const step = (number_, title, words, cell, more = {}) =>
    list.push({ step: number_, title, words, cell, ...more });
  step(1, "key j", "token", (j) => tokenName(j, layer.m), { className: "name" });
  const [source, sourceWidth] = layer.memory ? [layer.memory, layer.memoryWidth]
    : [layer.n === layer.m ? layer.inputs : null, layer.width];
  if (source) {
    const each = (j) => source.subarray(j * sourceWidth, (j + 1) * sourceWidth);
    const most = keys.reduce((largest, j) => Math.max(largest, largestOf(each(j))), 0);
    const of = layer.memory ? (layer.memoryOf ? ` of “${layer.memoryOf}”` : " of the other sequence") : "";
    step(1, "aⱼ", `${sourceWidth} numbers${of}, ±${number(most)}`, (j) => strip(each(j), most, "a", 96));
  }
  if (layer.d) {
    const words = `${layer.d} numbers, ±${number(scale)}`;
    step(2, "kⱼ", words, (j) => strip(beforeTurn(layer, "key", head, j), scale, "k"));
    if (layer.turned?.key) step(3, "R kⱼ", "turned by its position", (j) => strip(key(j), scale, "R k"));
  }
  if (layer.scale) {
    step(4, "αⱼ = q · kⱼ", `open for the ${layer.d} products`, (j) => dotButton(j, result.dots[j]));
    step(5, `× ${number(layer.scale)}`,
      layer.softcap ? `scale, then cap at ${layer.softcap}` : "scale",
      (j) => number(result.scores[j]));
  }
  if (layer.bias) {
    step(6, layer.formula ? "score" : "+ bias", layer.formula.split("(")[0] || "of this pair",
      (j) => number(biasAt(layer, head, i, j)));
  }
  if (layer.spans || layer.bits) {
    step(7, "mask", "may q see k?",
      (j) => (seen(j) ? "visible" : maskWords(layer, i, j).split(" ").pop()));
  }
  step(8, `exp(lⱼ − ${number(result.peak)})`, "the largest l taken off",
    (j) => number(result.exponentials[j]), { isExp: true });
  step(8, `÷ ${number(result.sum)} = α′ⱼ`, "softmax: sums to 1", (j) => weightCell(result.weights[j]));
  if (layer.value && result.output) {
    const values = layer.value, width = layer.e;
    const own = (j) => vector(values, keyHead(layer, head), layer.m, width, j);
    const tallest = keys.reduce((m, j) => Math.max(m, largestOf(own(j))), 0);
    step(9, "vⱼ", `${width} numbers, ±${number(tallest)}`, (j) => strip(own(j), tallest, "v"));
    const mixed = (j) => Array.from(own(j), (x) => x * result.weights[j]);
    const most = keys.reduce((m, j) => Math.max(m, largestOf(mixed(j))), largestOf(result.output));
    step(9, "α′ⱼ vⱼ", `weighted value, ±${number(most)}`, (j) => strip(mixed(j), most, "α′v"));
    if (layer.mixing?.weight) {
      const through = new Map(keys.map((j) => [j, mixedBy(layer, head, mixed(j))]));
      const far = keys.reduce((m, j) => Math.max(m, largestOf(through.get(j) || [])), 0);
      step(9, "W^o α′ⱼ vⱼ", `${layer.mixing.width} numbers, ±${number(far)}`,
        (j) => strip(through.get(j) || [], far, "W^o α′v", 96));
    }
  }
  return list;
}

/** @param {number} weight */
function weightCell(weight) {
  const bar = make("i", {});
  bar.style.width = `${Math.round(60 * weight)}px`;
  return make("span", { className: "weight" }, number(weight), bar);
}

/** @param {number} j @param {number} dot */
function dotButton(j, dot) {
  const button = make("button", { type: "button", className: "dot", textContent: number(dot) });
  button.setAttribute("aria-expanded", String(opened === j));
  button.setAttribute("aria-label", `${number(dot)}: show the products`);
  button.addEventListener("click", () => {
    opened = opened === j ? null : j;
    drawWorked();
    const again = document.querySelector(`#worked tr[data-key="${j}"] .dot`);
    if (again instanceof HTMLElement) again.focus();
  });
  return button;
}

/** @param {Layer} layer @param {number} head @param {number} i @param {any} result
 * @param {number[]} keys */
function workedTable(layer, head, i, result, keys) {
  const steps = columns(layer, head, i, result, keys), body = make("tbody");
  for (const j of keys) {
    const line = make("tr", {}, ...steps.map(({ cell, className, step }) =>
      atStep(step, make("td", { className: className || "" }, cell(j)))));
    line.dataset.key = String(j);
    line.classList.toggle("masked", !isVisible(layer, head, i, j));
    line.classList.toggle("chosen", j === state.j);
    line.addEventListener("click", (event) => {
      if (!(event.target instanceof HTMLButtonElement)) select({ j, pinned: true });
    });
    body.append(line);
    if (opened === j) {
      body.append(make("tr", { className: "products" },
        make("td", { colSpan: steps.length }, ...products(layer, head, i, j, result.dots[j]))));
    }
  }
  const before = steps.findIndex(({ isExp }) => isExp);
  const note = (name, exponential, weight, last, /** @type {string | Node} */ whole = "") => body.append(make("tr", { className: "total" },
    atStep(8, make("td", { colSpan: before, textContent: name })),
    atStep(8, make("td", { textContent: number(exponential) })),
    atStep(8, make("td", {}, weightCell(weight))),
    ...(layer.value ? [make("td"), atStep(10, make("td", {}, last))] : []),
    ...(layer.value && layer.mixing?.weight ? [atStep(10, make("td", {}, whole))] : [])));
  if (keys.length < layer.m) {
    const listed = new Set(keys);
    const rest = (numbers) => numbers.reduce((sum, x, j) => (listed.has(j) ? sum : sum + x), 0);
    note(`the other ${layer.m - keys.length} keys together`, rest(result.exponentials),
      rest(result.weights), "included in the sum");
  }
  const share = result.sum > 0 ? result.sink / result.sum : 0;
  if (layer.sinks) note("sink, which has no key and no value", result.sink, share, "nothing");
  const weights = result.weights.reduce((sum, x) => sum + x, 0) + share;
  note(result.sum > 0 ? "sum" : "sum: no key is visible, so the output is 0", result.sum, weights,
    result.output ? strip(result.output, largestOf(result.output), "b") : "",
    result.output && layer.mixing?.weight ? wholeStrip(mixedBy(layer, head, result.output), "W^o b") : "");
  const titles = steps.map((step) => atStep(step.step,
    make("th", { scope: "col" }, step.title, make("small", { textContent: step.words }))));
  return make("table", {}, make("thead", {}, make("tr", {}, ...titles)), body);
}

/** The d products of q_i and k_j, and their sum.
 * @param {Layer} layer @param {number} head @param {number} i @param {number} j
 * @param {number} dot */
function products(layer, head, i, j, dot) {
  const query = vector(layer.query, head, layer.n, layer.d, i);
  const key = vector(layer.key, keyHead(layer, head), layer.m, layer.d, j);
  const each = Array.from(query, (x, c) => x * key[c]);
  const line = (name, numbers) => make("p", { className: "vector" },
    make("span", { className: "what", textContent: name }),
    strip(numbers, largestOf(numbers), name), make("span", { className: "hint",
      textContent: signedRange(numbers) }));
  return [line("q", query), line("k", key), line("q × k", each),
    make("p", { className: "sum" }, ...each.map((x, c) => make("span", {
      textContent: `${c && x >= 0 ? "+" : ""}${number(x)} `,
      title: `${number(query[c])} × ${number(key[c])}` })),
    make("b", { textContent: `= ${number(dot)}` }))];
}

/** b^i, the model's own vector, and whether they are equal.
 * @param {Layer} layer @param {number} head @param {number} i @param {any} result */
function outputLines(layer, head, i, result) {
  if (!result.output) {
    return [atStep(11,
      check("none", "No check: the file has no value, so there is no output to compare."))];
  }
  const most = largestOf(result.output);
  const line = (name, numbers, words) => make("p", { className: "vector" },
    make("span", { className: "what", textContent: name }), strip(numbers, most, name),
    make("span", { className: "hint", textContent: words }));
  const lines = [atStep(10, line("b", result.output,
    `${layer.e} numbers, ${signedRange(result.output)}`))];
  if (layer.gap) {
    const gap = layer.gap[head * layer.n + i];
    return [...lines, atStep(11, checkLine(layer, head, i, result, gap))];
  }
  if (!layer.output) {
    return [...lines, atStep(11, check("none",
      layer.route === "arrays" ? "No check: arrays hold no output of a model."
        : "No check: the model never held this head’s output as one tensor."))];
  }
  const own = vector(layer.output, head, layer.n, layer.e, i);
  const difference = own.reduce(
    (worst, x, c) => Math.max(worst, Math.abs(x - result.output[c])), 0);
  lines.push(atStep(11, line("model", own, "what the model computed here itself")));
  return [...lines, atStep(11, checkLine(layer, head, i, result, difference))];
}

/** Equal means: no further apart than rounding explains, with a factor of 4 to spare. Rounding
 * every q and k by a relative error u moves a dot product by about u times the root of the sum of
 * its squared products, once for each of the two; rounding a logit l moves it by u |l|; moving
 * logits by x moves the output by about x times the weighted mean of |v|.
 * @param {Layer} layer @param {number} head @param {number} i @param {any} result
 * @param {number} difference */
function checkLine(layer, head, i, result, difference) {
  // A gap was measured in Python, before any rounding for the page.
  const own = UNITS[page.dtype], carried = layer.gap ? own : UNITS[page.precision.travels];
  const unit = Math.max(own, carried);
  const query = vector(layer.query, head, layer.n, layer.d, i);
  const width = layer.e, all = /** @type {Float32Array} */ (layer.value);
  let peak = 0, spread = 0, values = 0;
  for (let j = 0; j < layer.m; j++) {
    if (!(result.weights[j] > 0)) continue;
    const key = vector(layer.key, keyHead(layer, head), layer.m, layer.d, j);
    const squares = query.reduce((sum, x, c) => sum + (x * key[c]) ** 2, 0);
    spread += result.weights[j] * Math.sqrt(squares) * Math.abs(layer.scale);
    values += result.weights[j] * largestOf(vector(all, keyHead(layer, head), layer.m, width, j));
    peak = Math.max(peak, Math.abs(result.logits[j]));
  }
  const allowed = 4 * values * (unit * (1 + 2 * spread) + own * peak);
  const rounding = unit === UNITS.float32 ? "" : `; ${unit === UNITS.bfloat16 ? "bfloat16"
    : "float16"} numbers explain up to ${number(allowed)}`;
  const words = difference <= allowed
    ? `equals the model’s own output, largest difference ${number(difference)}${rounding}`
      + (layer.gap ? "; compared when this page was made" : "")
    : `DIFFERS from the model’s own output: largest difference ${number(difference)}, while `
      + `rounding explains ${number(allowed)}. Do not trust this page for this layer.`;
  const node = check(difference <= allowed ? "good" : "bad", words);
  node.dataset.difference = String(difference);
  return node;
}
const UNITS = { float64: 2 ** -24, float32: 2 ** -24, float16: 2 ** -11, bfloat16: 2 ** -8 };

/** @param {string} kind @param {string} words */
function check(kind, words) {
  const sign = { good: "✓", bad: "✗", none: "–" }[kind];
  const mark = make("b", { textContent: `${sign} ` });
  const node = make("p", { className: `check ${kind}`, id: "check" }, mark, words);
  return node;
}
