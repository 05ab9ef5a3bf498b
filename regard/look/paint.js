// Colours, numbers in words, and drawing on canvases.

const dark = matchMedia("(prefers-color-scheme: dark)");

// Lightness changes in one direction only, so that more is always further from the page's
// background, also for readers who do not tell blue from other hues.
const RAMPS = {
  light: ["#fbfbf8", "#dde8f0", "#b3d0e4", "#7fb0d3", "#4a8abd", "#24649f", "#12437a", "#0a2347"],
  dark: ["#15181d", "#1a2c40", "#1e4467", "#246294", "#3b86bd", "#6fb0da", "#b0d8ef", "#f4fbff"],
};
const SIGNED = {
  light: { below: [179, 86, 11], zero: [244, 243, 239], above: [31, 95, 158] },
  dark: { below: [244, 164, 84], zero: [34, 38, 44], above: [108, 180, 238] },
};
const HATCH = {
  light: { ground: [240, 237, 230], line: [203, 196, 182] },
  dark: { ground: [33, 31, 28], line: [74, 68, 58] },
};

/** @type {"light" | "dark"} */
let tone = dark.matches ? "dark" : "light";

/** @param {string} hex */
function channels(hex) { return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)); }

/** @param {string[]} stops */
function table(stops) {
  const points = stops.map(channels);
  return Array.from({ length: 256 }, (_, index) => {
    const at = index / 255 * (points.length - 1), low = Math.min(Math.floor(at), points.length - 2);
    return points[low].map((x, c) => Math.round(x + (at - low) * (points[low + 1][c] - x)));
  });
}
const TABLES = { light: table(RAMPS.light), dark: table(RAMPS.dark) };

/** Colour of a number between 0 and 1. @param {number} share */
function rampColour(share) {
  return TABLES[tone][Math.round(255 * Math.min(1, Math.max(0, share)))];
}

/** Where a cell lies on the colour scale, 0 to 1. @param {number} weight @param {number} lift */
function share(weight, lift) {
  if (state.scale === "weight") return weight;
  return (Math.log2(lift) - liftRange.low) / (liftRange.high - liftRange.low);
}

/** @param {number[]} rgb */
function css(rgb) { return `rgb(${rgb.join(" ")})`; }

/** Black or white, whichever is readable on a colour (WCAG relative luminance).
 * @param {number[]} rgb */
function inkOn(rgb) {
  const linear = rgb.map((x) => ((x / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return luminance > 0.179 ? "#111" : "#fff";
}

/** A canvas of this size in CSS pixels, sharp on dense screens.
 * @param {HTMLCanvasElement} canvas @param {number} width @param {number} height */
function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

/** Cells as device pixels; masked cells are hatched, which no weight is.
 * @param {CanvasRenderingContext2D} context @param {Plane} plane
 * @param {{width: number, height: number}} box in CSS pixels
 * @param {(weight: number, at: number) => number[]} colour of a cell */
function planeImage(context, plane, box,
  colour = (weight, at) => rampColour(share(weight, plane.lift[at]))) {
  const ratio = window.devicePixelRatio || 1, hatch = HATCH[tone];
  const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const ground = packed(hatch.ground), line = packed(hatch.line);
  const colours = Uint32Array.from(plane.weight, (weight, cell) =>
    (Number.isNaN(weight) ? 0 : packed(colour(weight, cell))));
  const columns = Uint32Array.from({ length: width },
    (_, x) => Math.floor(x * plane.columns / width));
  const stripe = Math.max(4, Math.round(5 * ratio));
  for (let y = 0, at = 0; y < height; y++) {
    const row = Math.floor(y * plane.rows / height) * plane.columns;
    for (let x = 0; x < width; x++, at++) {
      // Every colour is opaque, so 0 is free to mean masked.
      pixels[at] = colours[row + columns[x]] || ((x + y) % stripe < ratio ? line : ground);
    }
  }
  return image;
}

/** A colour as a pixel of ImageData on a little-endian machine. @param {number[]} rgb */
function packed([red, green, blue]) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

/** A vector as a strip of signed colours; hovering tells a number. Where `most` cells are fewer than
 * the numbers, a cell is the largest of its group.
 * @param {ArrayLike<number>} numbers @param {number} largest full colour @param {string} name
 * @param {number} most */
function strip(numbers, largest, name, most = Infinity) {
  const canvas = document.createElement("canvas"), group = Math.ceil(numbers.length / most) || 1;
  const count = Math.ceil(numbers.length / group);
  const cell = Math.max(1, Math.floor(144 / count)), palette = SIGNED[tone];
  const context = fit(canvas, cell * count, 14);
  const place = (c) => {
    let best = c * group;
    for (let at = best; at < Math.min(numbers.length, (c + 1) * group); at++) {
      if (Math.abs(numbers[at]) > Math.abs(numbers[best])) best = at;
    }
    return best;
  };
  for (let c = 0; c < count; c++) {
    const value = numbers[place(c)], amount = Math.min(1, Math.abs(value) / (largest || 1));
    const end = value < 0 ? palette.below : palette.above;
    context.fillStyle = css(palette.zero.map((x, k) => Math.round(x + amount * (end[k] - x))));
    context.fillRect(c * cell, 0, cell, 14);
  }
  canvas.className = "strip";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${name}: ${numbers.length} numbers up to ${number(largestOf(numbers))}`);
  canvas.addEventListener("mousemove", (event) => {
    const at = place(Math.min(count - 1, Math.max(0, Math.floor(event.offsetX / cell))));
    tip(event, `${name}[${at}] = ${number(numbers[at])}`);
  });
  canvas.addEventListener("mouseleave", hideTip);
  return canvas;
}

/** @param {ArrayLike<number>} numbers */
function largestOf(numbers) {
  let largest = 0;
  for (let at = 0; at < numbers.length; at++) largest = Math.max(largest, Math.abs(numbers[at]));
  return largest;
}

/** Three digits, or a power of ten where those would not show it. @param {number} x */
function number(x) {
  if (x === 0) return "0";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : x < 0 ? "−∞" : "none";
  const size = Math.abs(x), text = size < 1e-3 || size >= 1e5 ? x.toExponential(1)
    : size >= 1000 ? x.toFixed(0) : size >= 100 ? x.toFixed(1) : size >= 10 ? x.toFixed(2)
    : x.toFixed(3);
  return text.replaceAll("-", "−");
}

/** @param {number} lift */
function liftWords(lift) {
  if (lift === 0) return "0× uniform";
  return lift >= 1 ? `${number3(lift)}× uniform` : `1/${number3(1 / lift)} of uniform`;
}
/** @param {number} x */
function number3(x) { return x >= 1e6 ? x.toExponential(0).replace("+", "") : String(Number(x.toPrecision(2))); }

/** Colours of the style sheet by tone and name. @type {Map<string, string>} */
const colours = new Map();
/** A colour of the style sheet. Asking the browser again would lay out the page that a moving pointer
 * has just changed. @param {string} name */
function colourOf(name) {
  const key = `${tone} ${name}`, found = colours.get(key)
    || getComputedStyle(document.body).getPropertyValue(name).trim();
  colours.set(key, found);
  return found;
}

/** Widths of boxes that were asked for, kept by an observer, for the same reason.
 * @type {Map<string, number>} */
const widths = new Map();
const resized = new ResizeObserver((entries) => {
  const changed = entries.filter(({ target }) => widths.get(target.id) !== target.clientWidth);
  for (const { target } of changed) widths.set(target.id, target.clientWidth);
  // A scroll bar that comes or goes narrows the boxes, and the window does not say so.
  if (changed.length) dispatchEvent(new Event("resize"));
});
/** The width inside a box that never changes its place in the page. @param {string} id */
function widthOf(id) {
  const known = widths.get(id);
  if (known !== undefined) return known;
  const box = element(id), width = box.clientWidth;
  widths.set(id, width);
  resized.observe(box);
  return width;
}
addEventListener("resize", () => widths.clear());

/** What the pointer may cover of the window, read when it changes. */
const viewport = { width: innerWidth, height: innerHeight };
addEventListener("resize", () => Object.assign(viewport, { width: innerWidth, height: innerHeight }));

/** Words beside the pointer, on the side that has more room: so nothing need be measured.
 * @param {MouseEvent} event @param {string} text */
function tip(event, text) {
  const box = element("tip"), { clientX: x, clientY: y } = event, { width, height } = viewport;
  box.textContent = text;
  box.hidden = false;
  const right = x > width / 2, above = y > 0.75 * height;
  box.style.left = right ? "" : `${x + 14}px`;
  box.style.right = right ? `${width - x + 10}px` : "";
  box.style.top = above ? "" : `${y + 18}px`;
  box.style.bottom = above ? `${height - y + 10}px` : "";
}
function hideTip() { element("tip").hidden = true; }

/** @param {string} id @returns {HTMLElement} */
function element(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element ${id}`);
  return found;
}

/** @param {string} tag @param {Object<string, any>} properties
 * @param {(Node | string)[]} children */
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
