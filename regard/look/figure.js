// Panels as figures: text as text, cells as embedded pictures, and a colour bar with its unit.

const SVG = "http://www.w3.org/2000/svg";
const FIGURE_FONT = "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif";
const MARGIN = 16;

/** @param {string} tag @param {Object<string, any>} attributes @param {(Node | string)[]} children */
function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}
/** @param {string} text @param {number} x of the start @param {number} y of the baseline
 * @param {Object<string, any>} more */
function svgText(text, x, y, more = {}) {
  return svg("text", { x: round(x), y: round(y), "xml:space": "preserve", ...more },
    // XML has no place for control characters, which a token may hold.
    text.replace(/[\u0000-\u001f\ufffe\uffff]/g, "\ufffd"));
}
/** @param {number} x */
function round(x) { return Math.round(x * 100) / 100; }

/** @param {HTMLCanvasElement} canvas @param {Object<string, any>} place */
function svgPicture(canvas, place) {
  return svg("image", { ...place, href: canvas.toDataURL("image/png"),
    preserveAspectRatio: "none", style: "image-rendering: pixelated" });
}

/**
 * What an element shows, drawn again as SVG: words, backgrounds, and canvases as pictures.
 * @param {HTMLElement} root @returns {{nodes: Element[], width: number, height: number}}
 */
function traced(root) {
  /** @type {Element[]} */
  const nodes = [];
  const origin = root.getBoundingClientRect(), clear = "rgba(0, 0, 0, 0)";
  let width = 0, height = 0;
  const place = (box) => {
    const at = { x: round(box.left - origin.left + root.scrollLeft), y: round(box.top - origin.top),
      width: round(box.width), height: round(box.height) };
    width = Math.max(width, at.x + at.width);
    height = Math.max(height, at.y + at.height);
    return at;
  };
  const words = (node, style, clip) => {
    const range = document.createRange(), size = parseFloat(style.fontSize);
    for (const { text, box } of lines(node, range)) {
      if (clip && (box.bottom < clip.top + 2 || box.top > clip.bottom - 2)) continue;
      const at = place(box);
      nodes.push(svgText(text, at.x, at.y + at.height / 2 + size * 0.35, {
        "font-size": size, fill: style.color, "font-weight": style.fontWeight }));
    }
  };
  const visit = (node, clip) => {
    if (node.nodeType === Node.TEXT_NODE) {
      return words(node, getComputedStyle(node.parentElement), clip);
    }
    if (!(node instanceof HTMLElement) || node.matches(".save, .hidden, [hidden]")) return;
    const style = getComputedStyle(node), box = node.getBoundingClientRect();
    if (style.display === "none" || !box.width || !box.height) return;
    if (clip && (box.bottom < clip.top || box.top > clip.bottom)) return;
    if (node instanceof HTMLCanvasElement) return nodes.push(svgPicture(node, place(box)));
    if (node instanceof HTMLSelectElement || node instanceof HTMLInputElement) return;
    const hatched = style.backgroundImage.startsWith("repeating");
    if (hatched || style.backgroundColor !== clear || node.matches(".kind i")) {
      nodes.push(svg("rect", { ...place(box), rx: parseFloat(style.borderRadius) || 0,
        ...(parseFloat(style.borderTopWidth) && node.matches(".kind i")
          ? { stroke: style.borderTopColor } : {}),
        fill: hatched ? "url(#hatch)"
          : style.backgroundColor === clear ? "none" : style.backgroundColor }));
    }
    const scrolls = style.overflowY !== "visible" && node.scrollHeight > node.clientHeight + 1;
    for (const child of node.childNodes) visit(child, scrolls ? box : clip);
  };
  visit(root, null);
  return { nodes, width, height };
}

/** The lines that a text node is broken into on the screen. @param {Node} node
 * @param {Range} range */
function lines(node, range) {
  /** @type {{text: string, box: DOMRect}[]} */
  const found = [];
  for (const { 0: text, index } of (node.textContent || "").matchAll(/\S+\s*/g)) {
    range.setStart(node, index);
    range.setEnd(node, index + text.length);
    const box = range.getBoundingClientRect(), last = found.at(-1);
    if (!box.width) continue;
    if (last && Math.abs(last.box.top - box.top) < 2) {
      last.text += text;
      last.box = DOMRect.fromRect({ x: last.box.x, y: last.box.y, height: box.height,
        width: box.right - last.box.x });
    } else found.push({ text, box });
  }
  return found;
}

/** What a colour means, in words. */
function unitWords() {
  if (state.scale === "weight") return "weight";
  return state.scale === "value" ? "α |v|, times the even share of all visible keys, log scale"
    : "weight, times the even weight of all visible keys, log scale";
}

/** The colour bar, with its ticks and its unit. @param {number} x @param {number} y */
function colourBar(x, y) {
  const { low, high } = liftRange, log = state.scale !== "weight";
  return barNodes(x, y, { name: "ramp", unit: unitWords(), colours: RAMPS[tone],
    ticks: log ? [[0, "≤ 1/16"], [-low / (high - low), "1"], [1, `≥ ${2 ** high}`]]
      : [[0, "0"], [0.5, "0.5"], [1, "1"]] });
}

/** A ramp with ticks and a unit. @param {number} x @param {number} y
 * @param {{name: string, unit: string, colours: string[], ticks: (string | number)[][]}} bar */
function barNodes(x, y, { name, unit, colours, ticks }) {
  const width = 220, stops = colours.map((colour, at, all) =>
    svg("stop", { offset: round(at / (all.length - 1)), "stop-color": colour }));
  return [svg("linearGradient", { id: name }, ...stops),
    svg("rect", { x, y, width, height: 10, fill: `url(#${name})`, stroke: colourOf("--line") }),
    ...ticks.map(([at, text]) => svgText(String(text), x + Number(at) * width, y + 23,
      { "font-size": 11, fill: colourOf("--ink"), "text-anchor": "middle" })),
    svgText(unit, x, y + 38, { "font-size": 11, fill: colourOf("--quiet") })];
}

/** A panel as one SVG element. @param {string} name of the panel */
function figureOf(name) {
  const { body, title, bar } = PANELS[name], drawn = body(), [heading, ...rest] = title();
  const top = MARGIN + 22 + 16 * rest.length, ground = colourOf("--ground");
  const barHeight = bar ? 52 : 0;
  const widest = Math.max(drawn.width, 560) + 2 * MARGIN;
  const height = top + drawn.height + barHeight + 2 * MARGIN;
  const hatch = HATCH[tone], words = { fill: colourOf("--ink"), "font-size": 15, "font-weight": 600 };
  const pattern = svg("pattern", { id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse",
    patternTransform: "rotate(45)" }, svg("rect", { width: 5, height: 5, fill: css(hatch.ground) }),
    svg("rect", { width: 1, height: 5, fill: css(hatch.line) }));
  return svg("svg", { xmlns: SVG, width: Math.ceil(widest), height: Math.ceil(height),
    viewBox: `0 0 ${Math.ceil(widest)} ${Math.ceil(height)}`, "font-family": FIGURE_FONT },
    svg("defs", {}, pattern), svg("rect", { width: "100%", height: "100%", fill: ground }),
    svgText(heading, MARGIN, MARGIN + 14, words),
    ...rest.map((line, at) => svgText(line, MARGIN, MARGIN + 32 + 16 * at,
      { fill: colourOf("--quiet"), "font-size": 12 })),
    svg("g", { transform: `translate(${MARGIN} ${top})` }, ...drawn.nodes),
    ...(bar ? colourBar(MARGIN + 20, top + drawn.height + MARGIN) : []));
}

/** @param {string} name @param {"svg" | "png" | "csv"} kind */
async function savePanel(name, kind) {
  const layer = page.layers[state.layer];
  const whole = name === "heads" ? "" : `-L${layer.number}-H${state.head}`;
  const file = `regard-${name}${whole}.${kind}`;
  if (kind === "csv") return hand(file, new Blob([csv(await PANELS[name].rows())], { type: "text/csv" }));
  const figure = figureOf(name), text = new XMLSerializer().serializeToString(figure);
  if (kind === "svg") return hand(file, new Blob([text], { type: "image/svg+xml" }));
  const picture = new Image();
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await picture.decode();
  const canvas = document.createElement("canvas");
  canvas.width = 2 * Number(figure.getAttribute("width"));
  canvas.height = 2 * Number(figure.getAttribute("height"));
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => { if (blob) hand(file, blob); }, "image/png");
}

/** Give the reader a file. @param {string} name @param {Blob} blob */
function hand(name, blob) {
  const link = /** @type {HTMLAnchorElement} */ (make("a", { download: name }));
  link.href = URL.createObjectURL(blob);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  const said = element("saved"), framed = window.self !== window.top;
  // A sandbox that forbids downloads tells nobody but its console, so every frame says what to do then.
  said.textContent = `saved ${name}${framed ? ". If no file came, the page around this view forbids downloads; "
    + "in Python, seen.figure(…).save(…) and seen.save(…) write files" : ""}`;
  if (!framed) return;
  said.className = "toast";
  clearTimeout(hand.timer);
  hand.timer = setTimeout(() => { said.className = "hidden"; }, 10000);
}
/** @type {any} */
hand.timer = 0;

/** @param {(string | number | null)[][]} rows */
function csv(rows) {
  const cell = (x) => {
    const text = x === null || Number.isNaN(x) ? "" : String(x);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return `${rows.map((row) => row.map(cell).join(",")).join("\n")}\n`;
}

/** The three buttons of every panel. */
function buildSaving() {
  for (const box of document.querySelectorAll(".save")) {
    const name = /** @type {HTMLElement} */ (box).dataset.panel || "";
    box.append(...["svg", "png", "csv"].map((kind) => {
      const button = make("button", { type: "button", textContent: kind.toUpperCase() });
      button.setAttribute("aria-label", `Save ${PANELS[name].words} as ${kind.toUpperCase()}`);
      button.addEventListener("click", () => savePanel(name, /** @type {any} */ (kind)));
      return button;
    }));
  }
}
