// Two runs of the same shape: one head of each, and the difference of their weights. Where the numbers
// come from (besidePlanes, otherLabel, weightsOfPair, errorOfBlock) is of the page.

/** What the three maps show; null while nothing is known. @type {any} */
let pair = null;

function buildBeside() {
  element("beside-part").hidden = !page.beside;
  if (!page.beside) return;
  for (const at of [0, 1, 2]) {
    const canvas = element(`beside-${at}`);
    canvas.addEventListener("mousemove", (event) => {
      const cell = besideAt(event, at);
      if (cell) tip(event, besideWords(cell));
      else hideTip();
    });
    canvas.addEventListener("mouseleave", hideTip);
    canvas.addEventListener("click", (event) => {
      const cell = besideAt(event, at);
      if (cell) select({ i: cell.i, j: cell.j, pinned: true });
    });
  }
  addEventListener("resize", soon(drawBeside));
}

/** What the three canvases show, and where: this run, the other, and this minus the other. */
function besideFrames() {
  pair = besidePlanes(pair);
  if (!pair) return null;
  const { planes: [here, there], origin, size } = pair, layer = page.layers[state.layer];
  const side = widthOf("beside-part"), columns = side > 800 ? 3 : 1;
  const room = Math.max(160, Math.min(420, side / columns - 24)), count = Math.max(here.rows, here.columns);
  const labels = (label) => Array.from({ length: Math.min(layer.n, 48) }, (_, at) => label(at, layer.n));
  const widest = Math.max(...[...labels(tokenLabel), ...labels(otherLabel)].map(measure));
  let ruler = Math.min(96, widest) + 8;
  const words = size === 1 && (room - ruler) / count >= 12;
  if (!words) ruler = 8 + measure(String(Math.max(layer.n, layer.m)));
  const cell = (room - ruler - 2) / count;
  const box = { x: ruler, y: ruler, width: cell * here.columns, height: cell * here.rows };
  const weight = here.weight.map((x, at) => x - there.weight[at]);
  const largest = largestOf(weight.map((x) => (Number.isNaN(x) ? 0 : x)));
  Object.assign(pair, { layer, difference: weight, largest });
  return [here, there, { ...here, weight }].map((plane, at) => ({ layer, plane, origin, box, cell,
    words, label: at === 1 ? otherLabel : tokenLabel,
    colour: at === 2 ? (x) => signedColour(x, largest) : undefined,
    title: besideTitles()[at] }));
}

function besideTitles() {
  const [here, there] = page.beside?.names || ["", ""];
  return [`This run: ${here}`, `Beside it: ${there}`, "This run − the one beside it"];
}

function drawBeside() {
  if (!page.beside) return;
  const frames = besideFrames();
  element("beside-part").classList.toggle("waiting", !frames);
  if (!frames) {
    [0, 1, 2].forEach((at) => { element(`beside-${at}`).dataset.shown = ""; });
    element("beside-words").textContent = "both runs are being computed …";
    return;
  }
  pair.frames = frames;
  const { layer, largest, size } = pair;
  frames.forEach((frame, at) => {
    const { box, cell, origin, plane, title, colour } = frame;
    const canvas = /** @type {HTMLCanvasElement} */ (element(`beside-${at}`));
    const context = fit(canvas, box.x + box.width + 2, box.y + box.height + 2);
    const ratio = window.devicePixelRatio || 1;
    context.putImageData(planeImage(context, plane, box, colour), Math.round(box.x * ratio),
      Math.round(box.y * ratio));
    drawRulers(context, frame);
    drawSelection(context, frame);
    element(`beside-${at}-title`).textContent = title;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${title}, layer ${layer.number}, head ${state.head}`);
    canvas.dataset.shown = JSON.stringify({ rows: plane.rows, columns: plane.columns, size,
      ...origin, box, cell, largest });
  });
  drawBesideWords();
  element("beside-legend").replaceChildren(...[["below", "more weight beside it, −"],
    ["above", "more weight in this run, +"]].flatMap(([end, words]) => {
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = css(SIGNED[tone][end]);
    return [swatch, make("span", { textContent: `${words}${number(largest)}` })];
  }));
  element("beside-hint").textContent = `Rows are queries, columns are keys${size > 1
    ? `; one dot is the mean of ${size} × ${size} cells` : ""}. The difference is of weights, not of `
    + `lift, and its colours reach to the largest difference shown. Tokens are compared by position.${pair.quality || ""}`;
}
function drawBesideWords() {
  if (pair) element("beside-words").textContent = besideWords({ i: state.i, j: state.j, at: -1 });
}

/** @param {number} x @param {number} largest that has the full colour */
function signedColour(x, largest) {
  const { below, zero, above } = SIGNED[tone], end = x < 0 ? below : above;
  const amount = Math.abs(x) / (largest || 1);
  return zero.map((c, at) => Math.round(c + amount * (end[at] - c)));
}

/** The three maps beside each other, and the colour bar of the last. */
function besideFigure() {
  const frames = besideFrames(), top = 22;
  if (!frames) return { nodes: [], width: 0, height: 0 };
  const { largest } = pair;
  let left = 0, deep = 0;
  const nodes = frames.map((frame) => {
    const { colour } = frame;
    const image = colour ? (plane) => pixels(plane, plane.weight, colour) : pixelImage;
    const drawn = mapFigure(frame, image), group = svg("g", { transform: `translate(${left} ${top})` },
      svgText(shorten(frame.title, frame.box.width), frame.box.x, -8,
        { "font-size": 12, fill: colourOf("--quiet") }), ...drawn.nodes);
    left += drawn.width + 28;
    deep = Math.max(deep, drawn.height + top);
    return /** @type {Element} */ (group);
  });
  const { below, zero, above } = SIGNED[tone];
  nodes.push(...barNodes(left - 28 - 240, deep + MARGIN, { name: "signed", unit: "difference of weights",
    colours: [below, zero, above].map(css),
    ticks: [[0, `−${number(largest)}`], [0.5, "0"], [1, number(largest)]] }));
  return { nodes, width: left - 28, height: deep };
}

/** Both weights and their difference, a line per pair or block. */
function besideRows() {
  if (!pair) return [["query", "key", "weight", "weight_beside", "difference"]];
  const { planes: [here, there], origin, size, difference, layer } = pair;
  const name = (at, length) => (size === 1 ? tokenName(at, length)
    : `${at}-${Math.min(at + size, length) - 1}`);
  return [["query", "key", "weight", "weight_beside", "difference"],
    ...Array.from(difference, (x, at) => [
      name(origin.top + Math.floor(at / here.columns) * size, layer.n),
      name(origin.left + at % here.columns * size, layer.m), here.weight[at], there.weight[at], x])];
}

/** @param {MouseEvent} event @param {number} which */
function besideAt(event, which) {
  const cell = pair && cellAt(event, pair.frames[which]);
  return cell && { ...cell, at: cell.row * pair.planes[0].columns + cell.column };
}

/** Both weights and their difference, of a pair or of a block. @param {any} cell */
function besideWords({ i, j, at }) {
  const { layer, planes, size } = pair, block = at >= 0 && size > 1;
  const both = block ? planes.map((plane) => plane.weight[at]) : weightsOfPair(i, j, at);
  const where = block ? `block at query ${i}, key ${j}: mean ` : `${tokenName(i, layer.n)} → `
    + `${tokenName(j, layer.m)}, beside it ${otherLabel(i, layer.n)} → ${otherLabel(j, layer.m)}: `;
  if (!both) return `${where}being computed`;
  const [here, there] = both, off = block ? errorOfBlock(at) : 0;
  const told = (weight) => (Number.isNaN(weight) ? "masked" : number(weight));
  const more = Number.isNaN(here - there) ? "" : `, difference ${number(here - there)}`
    + (off ? ` ± ${number(off)} (standard error)` : "");
  return `${where}weight ${told(here)} and ${told(there)}${more}`;
}

/** The panel, as it can be saved. */
function besidePanel() {
  return { words: "the two runs", bar: true, body: besideFigure, rows: besideRows,
    title: () => [`Two runs: layer ${page.layers[state.layer].number}, head ${state.head}`,
      `${page.beside?.title} · ${page.layers[state.layer].name}`, element("beside-hint").textContent || ""] };
}
