// The arithmetic of the page: weights from query, key and logsumexp, in double precision.

/**
 * One attention call. Arrays are flat, row-major: query [heads, n, d], key [kvHeads, m, d],
 * value [kvHeads, m, e], output [heads, n, e], logsumexp [heads, n]; received [heads, m] is the sum
 * over the queries, moved [heads, n] is sum_j alpha_ij |v_j|.
 * @typedef {{name: string, route: string, heads: number, kvHeads: number, n: number, m: number,
 *   d: number, e: number, scale: number, softcap: number | null, causal: boolean, formula: string,
 *   query: Float32Array, key: Float32Array, value: Float32Array | null,
 *   output: Float32Array | null, logsumexp: Float32Array, sinks: Float32Array | null,
 *   spans: Int32Array | null, bits: Uint8Array | null, bias: Float32Array | null,
 *   biasToeplitz: boolean, received: Float32Array, moved: Float32Array | null,
 *   statistics: any, planes: any, counts: Int32Array[], norms: Float64Array[]}} Layer
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
    "bias", "received", "moved"]) layer[name] = array(raw[name]);
  layer.counts = [];
  layer.norms = [];
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

/** How many keys each query may see, counted once per layer and head.
 * @param {Layer} layer @param {number} head @returns {Int32Array} */
function visibleCounts(layer, head) {
  const shared = !layer.bits || layer.bits.length === layer.n * Math.ceil(layer.m / 8);
  const at = shared ? 0 : head;
  layer.counts[at] ||= Int32Array.from({ length: layer.n }, (_, i) => {
    if (layer.spans) return layer.spans[2 * i + 1] - layer.spans[2 * i];
    if (!layer.bits) return layer.m;
    let count = 0;
    for (let j = 0; j < layer.m; j++) if (isVisible(layer, head, i, j)) count++;
    return count;
  });
  return layer.counts[at];
}
/** @param {Layer} layer @param {number} head @param {number} i */
function visibleKeys(layer, head, i) { return visibleCounts(layer, head)[i]; }

/** |v_j| of every key that a head reads, measured once. @param {Layer} layer
 * @param {number} head @returns {Float64Array} */
function valueNorms(layer, head) {
  const at = keyHead(layer, head), values = layer.value;
  if (!values) throw new Error("this layer has no value");
  layer.norms[at] ||= Float64Array.from({ length: layer.m }, (_, j) => {
    let sum = 0;
    for (const x of vector(values, at, layer.m, layer.e, j)) sum += x * x;
    return Math.sqrt(sum);
  });
  return layer.norms[at];
}

/** What a pair counts for: its weight, or in the view of values its part of sum_j alpha_ij |v_j|.
 * @param {Layer} layer @param {number} head @param {number} i @param {number} j
 * @param {boolean} ofValues */
function partAt(layer, head, i, j, ofValues) {
  const weight = weightAt(layer, head, i, j);
  if (!ofValues || !layer.moved) return weight;
  const moved = layer.moved[head * layer.n + i];
  return moved > 0 ? weight * valueNorms(layer, head)[j] / moved : weight;
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

/** @param {Layer} layer @param {number} head @param {number} i @param {boolean} ofValues */
function rowWeights(layer, head, i, ofValues = false) {
  return Float64Array.from({ length: layer.m }, (_, j) => partAt(layer, head, i, j, ofValues));
}

/** @param {Layer} layer @param {number} head @param {number} j @param {boolean} ofValues */
function columnWeights(layer, head, j, ofValues = false) {
  return Float64Array.from({ length: layer.n }, (_, i) => partAt(layer, head, i, j, ofValues));
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
