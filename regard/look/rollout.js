// Rollout: what the last layer's output of a token comes from, through all layers.

const ROLLOUT_UNASKED = 128;  // tokens up to which it is computed without being asked for
/** The query that it was asked for in a long text. */
let rolledFor = -1;

/** Whether all layers are self-attention of one sequence. */
function canRoll() {
  const n = page.layers[0].n;
  return page.layers.length > 1 && page.layers.every((layer) => layer.n === n && layer.m === n);
}

/** r <- r (mean over heads of A + I) / 2, from the last layer down. @param {number} query
 * @returns {Float64Array} */
function rollout(query) {
  const n = page.layers[0].n, row = new Float64Array(n);
  let shares = new Float64Array(n);
  shares[query] = 1;
  for (const layer of [...page.layers].reverse()) {
    const below = shares.map((x) => x / 2);
    for (let i = 0; i < n; i++) {
      if (!shares[i]) continue;
      for (let h = 0; h < layer.heads; h++) {
        segment(layer, h, i, 0, n, row);
        const part = shares[i] / (2 * layer.heads);
        for (let j = 0; j < n; j++) if (row[j] > 0) below[j] += part * row[j];
      }
    }
    shares = below;
  }
  return shares;
}

function drawRollout() {
  const box = element("rollout"), n = page.layers[0].n, { i } = state;
  element("rollout-part").hidden = !canRoll();
  if (!canRoll()) return;
  if (n > ROLLOUT_UNASKED && rolledFor !== i) {
    const button = make("button", { type: "button",
      textContent: `Compute for ${tokenName(i, n)}: ${page.layers.length} layers of ${n} × ${n}` });
    button.addEventListener("click", () => { rolledFor = i; drawRollout(); });
    return box.replaceChildren(make("h3", { textContent: "Through all layers" }), button);
  }
  const shares = rollout(i);
  box.replaceChildren(...side({
    weights: shares, lifts: shares.map((x) => x * n), length: n, chosen: state.j, axis: "key",
    title: `Through all layers: the last output of ${tokenName(i, n)} comes from`,
    pick: (at) => select({ j: at, pinned: true }),
    pair: (at) => `${tokenName(at, n)}: ${number(shares[at])}, ${liftWords(shares[at] * n)}`,
    rest: "Rollout (Abnar and Zuidema 2020): all heads count alike, and half of each layer’s output "
      + "is taken to come along the residual connection. An assumption, not a measurement; it was "
      + "meant for encoders.",
  }));
}
