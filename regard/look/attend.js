// The arithmetic of the page: weights from query, key and logsumexp, in double precision.

/**
 * One attention call. Arrays are flat, row-major: query [heads, n, d], key [kvHeads, m, d],
 * value [kvHeads, m, e], output [heads, n, e], logsumexp [heads, n]; received [heads, m] is the sum
 * over the queries, moved [heads, n] is sum_j alpha_ij |v_j|.
 * memory is the other sequence of cross-attention; turned are the angles of rotary encoding; mixing is W^o
 * [width, heads * e], if the page carries it.
 * @typedef {{layout: string, pairs: number, query: Float32Array, key: Float32Array | null, factors: number[],
 *   gap: number, madeBy: string[], own: boolean}} Turned
 * @typedef {{name: string, width: number, numbers: number, weight: Float32Array | null,
 *   bias: Float32Array | null}} Mixing
 * @typedef {{memory: Float32Array | null, memoryOf: string, memoryWidth: number,
 *   turned: Turned | null, unturned: string, mixing: Mixing | null, name: string, number: number, route: string, heads: number, kvHeads: number, n: number, m: number,
 *   d: number, e: number, scale: number, softcap: number | null, causal: boolean, formula: string,
 *   query: Float32Array, key: Float32Array, value: Float32Array | null,
 *   output: Float32Array | null, logsumexp: Float32Array, sinks: Float32Array | null,
 *   spans: Int32Array | null, bits: Uint8Array | null, bias: Float32Array | null,
 *   biasToeplitz: boolean, received: Float32Array | null,
 *   inputs: Float32Array | null, width: number, madeBy: string[], steps: number[], moved: Float32Array | null, gap: Float32Array | null, sums: {received: Float64Array, moved: Float64Array}[],
 *   statistics: any, planes: any, counts: Int32Array[], norms: Float64Array[]}} Layer
 * Weights in blocks of size x size cells; NaN where every cell of a block is masked.
 * @typedef {{size: number, rows: number, columns: number, weight: Float32Array,
 *   lift: Float32Array}} Plane
 */

const SIGNS = Array.from({ length: 94 }, (_, at) => String.fromCharCode(33 + at))
  .filter((sign) => !'"\\<'.includes(sign)).join("");
/** The number of each sign by its code. */
const SIGN_NUMBERS = new Uint8Array(128);
[...SIGNS].forEach((sign, at) => { SIGN_NUMBERS[sign.charCodeAt(0)] = at; });

/** Bytes from text: 16 signs are eight numbers of 13 bits, 13 bytes (store.py).
 * @param {string} text @param {number} length */
function read(text, length) {
  const bytes = new Uint8Array(Math.ceil(text.length / 16) * 13 + 2);
  for (let at = 0, bit = 0; at < text.length; at += 2, bit += 13) {
    const value = SIGN_NUMBERS[text.charCodeAt(at)] * SIGNS.length
      + SIGN_NUMBERS[text.charCodeAt(at + 1)];
    const three = value << (bit & 7), place = bit >> 3;
    bytes[place] |= three;
    bytes[place + 1] |= three >> 8;
    bytes[place + 2] |= three >> 16;
  }
  return bytes.subarray(0, length);
}

/** @param {{type: string, bytes: number, data: string}} packed @returns {Promise<Uint8Array>} */
async function inflate(packed) {
  const stream = new Blob([read(packed.data, packed.bytes)]).stream()
    .pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** An array whose bytes of one place stand together. @param {string} type
 * @param {Uint8Array} planes */
function unpack(type, planes) {
  if (type === "u1") return planes;
  if (type === "f2") return fromHalf(planes);
  const count = planes.length / 4, bytes = new Uint8Array(planes.length);
  for (let at = 0; at < count; at++) {
    for (let place = 0; place < 4; place++) bytes[4 * at + place] = planes[place * count + at];
  }
  return type === "f4" ? new Float32Array(bytes.buffer) : new Int32Array(bytes.buffer);
}

/** IEEE 754 binary16, low bytes and then high bytes, by table: Float16Array is not in every
 * browser. @param {Uint8Array} planes */
function fromHalf(planes) {
  fromHalf.table ||= Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  });
  const table = fromHalf.table, count = planes.length / 2, numbers = new Float32Array(count);
  for (let at = 0; at < count; at++) numbers[at] = table[planes[at] | planes[count + at] << 8];
  return numbers;
}
/** @type {Float32Array | null} */
fromHalf.table = null;

/** @param {any} raw @param {(index: number | null) => any} array @returns {Layer} */
function openLayer(raw, array) {
  const layer = { ...raw };
  for (const name of ["query", "key", "value", "output", "logsumexp", "sinks", "spans", "bits",
    "bias", "received", "moved", "gap",
    "inputs", "memory"]) layer[name] = array(raw[name]);
  if (raw.turned) layer.turned = { ...raw.turned, query: array(raw.turned.query), key: array(raw.turned.key) };
  if (raw.mixing) layer.mixing = { ...raw.mixing, weight: array(raw.mixing.weight), bias: array(raw.mixing.bias) };
  layer.counts = [];
  layer.norms = [];
  layer.sums = [];
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
  if (!ofValues || !layer.value) return weight;
  const moved = movedBy(layer, head, i);
  return moved > 0 ? weight * valueNorms(layer, head)[j] / moved : weight;
}

/** The sums over a whole head: what each key receives, and sum_j alpha_ij |v_j| of each query.
 * A page of pooled maps carries them; of others they are computed once.
 * @param {Layer} layer @param {number} head */
function headSums(layer, head) {
  layer.sums[head] ||= (() => {
    const received = new Float64Array(layer.m), moved = new Float64Array(layer.n);
    const norms = layer.value ? valueNorms(layer, head) : null;
    const row = new Float64Array(layer.m);
    for (let i = 0; i < layer.n; i++) {
      segment(layer, head, i, 0, layer.m, row);
      for (let j = 0; j < layer.m; j++) {
        const weight = row[j];
        if (Number.isNaN(weight)) continue;
        received[j] += weight;
        if (norms) moved[i] += weight * norms[j];
      }
    }
    return { received, moved };
  })();
  return layer.sums[head];
}
/** @param {Layer} layer @param {number} head @param {number} i */
function movedBy(layer, head, i) {
  return layer.moved ? layer.moved[head * layer.n + i] : headSums(layer, head).moved[i];
}
/** @param {Layer} layer @param {number} head */
function receivedBy(layer, head) {
  return layer.received ? layer.received.subarray(head * layer.m, (head + 1) * layer.m)
    : headSums(layer, head).received;
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

/**
 * Weights of one row from key `from` to before `to`, as weightAt gives them, in one loop: most of
 * what the page computes is this. NaN if masked.
 * @param {Layer} layer @param {number} head @param {number} i @param {number} from
 * @param {number} to @param {Float64Array} out filled from its start
 */
function segment(layer, head, i, from, to, out) {
  const { query, key, d, m, n, scale, softcap, bias, spans, bits } = layer;
  const start = spans ? Math.max(from, spans[2 * i]) : from;
  const end = spans ? Math.min(to, spans[2 * i + 1]) : to;
  out.fill(NaN, 0, to - from);
  const q = (head * n + i) * d, keys = keyHead(layer, head) * m, whole = d - d % 4;
  const sum = layer.logsumexp[head * n + i];
  const most = layer.biasToeplitz ? n + m - 1 : n * m;
  const first = bias ? (bias.length === most ? 0 : head * most)
    + (layer.biasToeplitz ? n - 1 - i : i * m) : 0;
  for (let j = start; j < end; j++) {
    if (bits && !isVisible(layer, head, i, j)) continue;
    const k = (keys + j) * d;
    let a = 0, b = 0, c = 0, e = 0;  // four sums, so that no addition waits for the one before
    for (let at = 0; at < whole; at += 4) {
      a += query[q + at] * key[k + at];
      b += query[q + at + 1] * key[k + at + 1];
      c += query[q + at + 2] * key[k + at + 2];
      e += query[q + at + 3] * key[k + at + 3];
    }
    for (let at = whole; at < d; at++) a += query[q + at] * key[k + at];
    let logit = (a + b + c + e) * scale;
    if (softcap) logit = softcap * Math.tanh(logit / softcap);
    if (bias) logit += bias[first + j];
    out[j - from] = Math.exp(logit - sum);
  }
  return out;
}

/** A segment as parts: weights, or in the view of values shares of sum_j alpha_ij |v_j|.
 * @param {Layer} layer @param {number} head @param {number} i @param {number} from
 * @param {number} to @param {boolean} ofValues @param {Float64Array} out */
function partSegment(layer, head, i, from, to, ofValues, out) {
  segment(layer, head, i, from, to, out);
  const moved = ofValues && layer.value ? movedBy(layer, head, i) : 0;
  if (!(moved > 0)) return out;
  const norms = valueNorms(layer, head);
  for (let j = from; j < to; j++) out[j - from] *= norms[j] / moved;
  return out;
}

/** @param {Layer} layer @param {number} head @param {number} i @param {boolean} ofValues */
function rowWeights(layer, head, i, ofValues = false) {
  return partSegment(layer, head, i, 0, layer.m, ofValues, new Float64Array(layer.m));
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
