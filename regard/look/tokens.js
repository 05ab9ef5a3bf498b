// One token: what its query attends to (a row), and who attends to a key (a column).

const BARS_IN_ORDER = 20;  // up to so many tokens, bars stand in reading order
const TEXT_AROUND = 150;  // tokens of text shown on each side of the selection

function drawTokens() {
  const layer = page.layers[state.layer], { head, i, j } = state;
  const ofValues = state.scale === "value" && Boolean(layer.value);
  const row = rowWeights(layer, head, i, ofValues), keys = visibleKeys(layer, head, i);
  const sent = {
    weights: row, lifts: row.map((weight) => weight * keys), length: layer.m, chosen: j, axis: "key",
    title: `Sent: query ${tokenName(i, layer.n)} ${ofValues ? "moves by α |v| of" : "attends to"}`,
    pick: (at) => select({ j: at, pinned: true }),
    pair: (at) => pairWords(layer, head, i, at),
    rest: `${rowSinkShare(layer, row)} ${layer.sinks ? sinkWords(layer, head, i) : ""}`,
  };
  const column = columnWeights(layer, head, j, ofValues);
  const received = {
    weights: column, length: layer.n, chosen: i, axis: "query", rest: "",
    lifts: column.map((weight, at) => weight * visibleKeys(layer, head, at)),
    title: `Received: key ${tokenName(j, layer.m)} ${ofValues ? "moves" : "is attended to by"}`,
    pick: (at) => select({ i: at, pinned: true }),
    pair: (at) => pairWords(layer, head, at, j),
  };
  element("sent").replaceChildren(...side(sent));
  element("received").replaceChildren(...side(received));
  for (const chosen of document.querySelectorAll(".word.chosen")) {
    // Within its box only: scrollIntoView would move the page under the reader's hand.
    const word = /** @type {HTMLElement} */ (chosen);
    const box = /** @type {HTMLElement} */ (word.offsetParent);
    box.scrollTop = word.offsetTop - box.clientHeight / 2;
  }
}

/** @param {Layer} layer @param {number} head @param {number} i */
function sinkWords(layer, head, i) {
  const sinks = /** @type {Float32Array} */ (layer.sinks);
  const weight = Math.exp(sinks[head] - layer.logsumexp[head * layer.n + i]);
  return `The sink, which has no token, takes ${number(weight)}.`;
}

/** @param {any} view */
function side(view) {
  const nodes = [make("h3", { textContent: view.title })];
  if (hasLabels(view.length)) nodes.push(text(view));
  if (view.length > BARS_IN_ORDER) nodes.push(profile(view));
  nodes.push(...bars(view));
  if (view.rest) nodes.push(make("p", { className: "hint", textContent: view.rest }));
  return nodes;
}

/** The text itself, coloured by weight. @param {any} view */
function text(view) {
  const box = make("p", { className: "text" });
  const start = Math.max(0, view.chosen - TEXT_AROUND);
  const stop = Math.min(view.length, view.chosen + TEXT_AROUND);
  if (start > 0) box.append(`… ${start} before `);
  for (let at = start; at < stop; at++) {
    const span = make("button",
      { type: "button", tabIndex: -1, textContent: tokenLabel(at, view.length) });
    const masked = Number.isNaN(view.weights[at]);
    span.dataset[view.axis] = String(at);
    span.className = `word${masked ? " masked" : ""}${at === view.chosen ? " chosen" : ""}`;
    if (!masked) {
      const colour = rampColour(share(view.weights[at], view.lifts[at]));
      span.style.backgroundColor = css(colour);
      span.style.color = inkOn(colour);
    }
    if (at > start && !isJoined(at, view.length)) box.append(" ");
    box.append(span);
  }
  if (stop < view.length) box.append(` … ${view.length - stop} after`);
  // One listener for hundreds of words, which are made anew at every change.
  const told = (event, act) => {
    const word = event.target instanceof Element ? event.target.closest(".word") : null;
    if (word) act(Number(/** @type {HTMLElement} */ (word).dataset[view.axis]));
    else hideTip();
  };
  box.addEventListener("click", (event) => told(event, view.pick));
  box.addEventListener("mousemove", (event) => told(event, (at) => tip(event, view.pair(at))));
  box.addEventListener("mouseleave", hideTip);
  return box;
}

/** All weights of a long row or column over position; where several share a pixel, the largest.
 * @param {any} view */
function profile(view) {
  const canvas = /** @type {HTMLCanvasElement} */ (make("canvas", { className: "profile" }));
  const width = Math.max(200, widthOf("sent") - 2), height = 56, all = view.weights;
  const context = fit(canvas, width, height);
  const largest = all.reduce((most, weight) => Math.max(most, weight || 0), 1e-30);
  context.fillStyle = colourOf("--fill");
  const column = Math.max(1, width / all.length);
  all.forEach((weight, at) => {
    const tall = (height - 2) * (weight || 0) / largest;
    context.fillRect(at * width / all.length, height - tall, column, tall);
  });
  context.fillStyle = colourOf("--accent");
  context.fillRect((view.chosen + 0.5) * width / all.length - 1, 0, 2, 5);
  const position = (event) => Math.max(0, Math.min(all.length - 1,
    Math.floor(event.offsetX / width * all.length)));
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label",
    `Weights over all ${all.length} positions, up to ${number(largest)}`);
  canvas.addEventListener("mousemove", (event) => tip(event, view.pair(position(event))));
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("click", (event) => view.pick(position(event)));
  return canvas;
}

/** A weight as a list shows it; the tooltip has the digits of small ones. @param {number} weight */
function shortWeight(weight) { return weight < 5e-4 ? "< 0.001" : weight.toFixed(3); }

/** @param {any} view */
function bars(view) {
  const all = Array.from(view.weights, (weight, at) => ({ weight, at }));
  const seen = all.filter(({ weight }) => !Number.isNaN(weight));
  const ordered = view.length <= BARS_IN_ORDER;
  const best = ordered ? all : seen.sort((a, b) => b.weight - a.weight).slice(0, 12);
  const largest = Math.max(...best.map(({ weight }) => weight || 0), 1e-30);
  const list = make("div", { className: "bars" }, ...best.map(({ weight, at }) => {
    const masked = Number.isNaN(weight);
    const fill = make("i", {});
    fill.style.width = masked ? "0" : `${100 * weight / largest}%`;
    const bar = make("button", { type: "button", tabIndex: -1,
      className: at === view.chosen ? "chosen" : "" },
      make("span", { className: "name", textContent: tokenLabel(at, view.length) }),
      make("span", { className: "index", textContent: String(at) }),
      make("span", { className: masked ? "track masked" : "track" }, fill),
      make("span", { className: "amount", textContent: masked ? "masked" : shortWeight(weight) }));
    bar.dataset[view.axis] = String(at);
    bar.addEventListener("click", () => view.pick(at));
    bar.addEventListener("mousemove", (event) => tip(event, view.pair(at)));
    bar.addEventListener("mouseleave", hideTip);
    return bar;
  }));
  const nodes = [list];
  if (!ordered && seen.length > best.length) {
    const rest = seen.slice(best.length).reduce((sum, { weight }) => sum + weight, 0);
    nodes.push(make("p", { className: "hint", textContent: `The 12 largest; the other `
      + `${seen.length - best.length} have ${number(rest)} together.` }));
  }
  return nodes;
}
