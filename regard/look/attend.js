// The arithmetic of the page: weights from query, key and logsumexp, in double precision.

/**
 * One attention call. Arrays are flat, row-major: query [heads, n, d], key [kvHeads, m, d],
 * value [kvHeads, m, e], output [heads, n, e], logsumexp [heads, n].
 * @typedef {{name: string, route: string, heads: number, kvHeads: number, n: number, m: number,
 *   d: number, e: number, scale: number, softcap: number | null, causal: boolean,
 *   query: Float32Array, key: Float32Array, value: Float32Array | null,
 *   output: Float32Array | null, logsumexp: Float32Array, sinks: Float32Array | null,
 *   spans: Int32Array | null, bits: Uint8Array | null, bias: Float32Array | null,
 *   biasToeplitz: boolean, statistics: Object<string, number[] | null>, planes: any}} Layer
 * Weights in blocks of size x size cells; NaN where every cell of a block is masked.
 * @typedef {{size: number, rows: number, columns: number, weight: Float32Array,
 *   lift: Float32Array}} Plane
 */

/** @param {{type: string, data: string}} packed */
function unpack(packed) {
  const text = atob(packed.data);
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  switch (packed.type) {
    case "f4": return new Float32Array(bytes.buffer);
    case "i4": return new Int32Array(bytes.buffer);
    case "u1": return bytes;
    case "f2": return fromHalf(new Uint16Array(bytes.buffer));
    default: throw new Error(`unknown array type ${packed.type}`);
  }
}

/** IEEE 754 binary16, by table: Float16Array is not in every browser. @param {Uint16Array} half */
function fromHalf(half) {
  if (!fromHalf.table) {
    fromHalf.table = Float32Array.from({ length: 65536 }, (_, bits) => {
      const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
      if (exponent === 31) return fraction ? NaN : sign * Infinity;
      if (exponent === 0) return sign * fraction * 2 ** -24;
      return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
    });
  }
  const table = fromHalf.table;
  return Float32Array.from(half, (bits) => table[bits]);
}
/** @type {Float32Array | null} */
fromHalf.table = null;

/** @param {any} raw @param {(index: number | null) => any} array @returns {Layer} */
function openLayer(raw, array) {
  const layer = { ...raw };
  for (const name of ["query", "key", "value", "output", "logsumexp", "sinks", "spans", "bits",
    "bias"]) layer[name] = array(raw[name]);
  return layer;
}

/** The key head that query head `head` reads. @param {Layer} layer @param {number} head */
function keyHead(layer, head) {
  return Math.floor(head / (layer.heads / layer.kvHeads));
}

/** @param {Layer} layer @param {number} head @param {number} i @param {number} j */
function isVisible(layer, head, i, j) {
  if (layer.spans) return j >= layer.spans[2 * i] && j < layer.spans[2 * i + 1];
  if (!layer.bits) return true;
  const width = Math.ceil(layer.m / 8);
  const shared = layer.bits.length === layer.n * width;
  const at = ((shared ? 0 : head) * layer.n + i) * width + (j >> 3);
  return Boolean((layer.bits[at] >> (j & 7)) & 1);
}

/** How many keys a query may see. @param {Layer} layer @param {number} head @param {number} i */
function visibleKeys(layer, head, i) {
  if (layer.spans) return layer.spans[2 * i + 1] - layer.spans[2 * i];
  if (!layer.bits) return layer.m;
  let count = 0;
  for (let j = 0; j < layer.m; j++) if (isVisible(layer, head, i, j)) count++;
  return count;
}

/** q_i . k_j @param {Layer} layer @param {number} head @param {number} i @param {number} j */
function dotProduct(layer, head, i, j) {
  const { query, key, d } = layer;
  let at = (head * layer.n + i) * d, other = (keyHead(layer, head) * layer.m + j) * d, sum = 0;
  for (const end = at + d; at < end; at++, other++) sum += query[at] * key[other];
  return sum;
}

/** @param {Layer} layer @param {number} head @param {number} i @param {number} j */
function biasAt(layer, head, i, j) {
  if (!layer.bias) return 0;
  const length = layer.biasToeplitz ? layer.n + layer.m - 1 : layer.n * layer.m;
  const start = layer.bias.length === length ? 0 : head * length;
  return layer.bias[start + (layer.biasToeplitz ? layer.n - 1 + j - i : i * layer.m + j)];
}

/** The score after scale and softcap, before bias. @param {Layer} layer @param {number} dot */
function scaled(layer, dot) {
  const score = dot * layer.scale;
  return layer.softcap ? layer.softcap * Math.tanh(score / layer.softcap) : score;
}

/** The weight alpha'_ij, NaN if masked.
 * @param {Layer} layer @param {number} head @param {number} i @param {number} j */
function weightAt(layer, head, i, j) {
  if (!isVisible(layer, head, i, j)) return NaN;
  const logit = scaled(layer, dotProduct(layer, head, i, j)) + biasAt(layer, head, i, j);
  return Math.exp(logit - layer.logsumexp[head * layer.n + i]);
}

/** @param {Layer} layer @param {number} head @param {number} i */
function rowWeights(layer, head, i) {
  return Float64Array.from({ length: layer.m }, (_, j) => weightAt(layer, head, i, j));
}

/** @param {Layer} layer @param {number} head @param {number} j */
function columnWeights(layer, head, j) {
  return Float64Array.from({ length: layer.n }, (_, i) => weightAt(layer, head, i, j));
}

/** Exact cells of a window of the map. @param {Layer} layer @param {number} head
 * @param {{top: number, left: number, rows: number, columns: number}} window @returns {Plane} */
function cells(layer, head, { top, left, rows, columns }) {
  const weight = new Float32Array(rows * columns), lift = new Float32Array(rows * columns);
  for (let r = 0, at = 0; r < rows; r++) {
    const count = visibleKeys(layer, head, top + r);
    for (let c = 0; c < columns; c++, at++) {
      weight[at] = weightAt(layer, head, top + r, left + c);
      lift[at] = weight[at] * count;
    }
  }
  return { size: 1, rows, columns, weight, lift };
}

/** Pool exact cells into blocks; a mean is over the visible cells of its block.
 * @param {Plane} plane @param {number} size @param {"mean" | "max"} which @returns {Plane} */
function pool(plane, size, which) {
  if (size === 1) return plane;
  const rows = Math.ceil(plane.rows / size), columns = Math.ceil(plane.columns / size);
  const weight = new Float32Array(rows * columns), lift = new Float32Array(rows * columns);
  const seen = new Uint32Array(rows * columns);
  for (let r = 0, at = 0; r < plane.rows; r++) {
    for (let c = 0; c < plane.columns; c++, at++) {
      if (Number.isNaN(plane.weight[at])) continue;
      const block = Math.floor(r / size) * columns + Math.floor(c / size);
      seen[block]++;
      if (which === "max") {
        weight[block] = Math.max(weight[block], plane.weight[at]);
        lift[block] = Math.max(lift[block], plane.lift[at]);
      } else {
        weight[block] += plane.weight[at];
        lift[block] += plane.lift[at];
      }
    }
  }
  for (let block = 0; block < seen.length; block++) {
    const share = which === "max" ? Math.min(seen[block], 1) : seen[block];
    weight[block] /= share;
    lift[block] /= share;
  }
  return { size, rows, columns, weight, lift };
}

/** A plane that Python pooled; lift = weight x the mean number of keys its rows may see.
 * @param {Layer} layer @param {number} head @param {"mean" | "max"} which
 * @param {(index: number) => Float32Array} array @returns {Plane} */
function bakedPlane(layer, head, which, array) {
  const { size, rows, columns } = layer.planes, all = array(layer.planes[which]);
  const weight = all.subarray(head * rows * columns, (head + 1) * rows * columns);
  const lift = new Float32Array(weight.length);
  for (let r = 0; r < rows; r++) {
    const end = Math.min((r + 1) * size, layer.n);
    let keys = 0;
    for (let i = r * size; i < end; i++) keys += visibleKeys(layer, head, i);
    keys /= end - r * size;
    for (let c = 0; c < columns; c++) lift[r * columns + c] = weight[r * columns + c] * keys;
  }
  return { size, rows, columns, weight, lift };
}

/**
 * Every number on the way from q_i to b^i.
 * @param {Layer} layer @param {number} head @param {number} i
 */
function work(layer, head, i) {
  const { m, e } = layer;
  const dots = new Float64Array(m), scores = new Float64Array(m), logits = new Float64Array(m);
  let peak = layer.sinks ? layer.sinks[head] : -Infinity;
  for (let j = 0; j < m; j++) {
    dots[j] = dotProduct(layer, head, i, j);
    scores[j] = scaled(layer, dots[j]);
    const seen = isVisible(layer, head, i, j);
    logits[j] = seen ? scores[j] + biasAt(layer, head, i, j) : -Infinity;
    peak = Math.max(peak, logits[j]);
  }
  const exponentials = logits.map((logit) => (logit === -Infinity ? 0 : Math.exp(logit - peak)));
  const sink = layer.sinks ? Math.exp(layer.sinks[head] - peak) : 0;
  const sum = exponentials.reduce((total, x) => total + x, sink);
  // A row that sees nothing has no denominator; its output is 0 by definition.
  const weights = exponentials.map((x) => (sum > 0 ? x / sum : 0));
  const output = layer.value ? new Float64Array(e) : null;
  if (output && layer.value) {
    const start = keyHead(layer, head) * m * e;
    for (let j = 0; j < m; j++) {
      for (let c = 0; c < e; c++) output[c] += weights[j] * layer.value[start + j * e + c];
    }
  }
  return { dots, scores, logits, peak, exponentials, sink, sum, weights, output };
}

/** One vector of an array [heads, length, width]. @param {Float32Array} array
 * @param {number} head @param {number} length @param {number} width @param {number} at */
function vector(array, head, length, width, at) {
  return array.subarray((head * length + at) * width, (head * length + at + 1) * width);
}
