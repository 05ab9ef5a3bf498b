// Blocks of the map, computed where they are looked at and kept while there is room.

const TILE = 64;        // blocks per side of a tile
const TILES_KEPT = 600; // 64 kB each
/** @type {Map<string, {mean: Plane, max: Plane}>} */
const tiles = new Map();

/**
 * Blocks of size x size exact cells; a mean is over the visible cells of its block.
 * @param {Layer} layer @param {number} head @param {boolean} ofValues
 * @param {{top: number, left: number, rows: number, columns: number}} window in cells
 * @param {number} size @returns {{mean: Plane, max: Plane}}
 */
function blocks(layer, head, ofValues, { top, left, rows, columns }, size) {
  const down = Math.ceil(rows / size), across = Math.ceil(columns / size), all = down * across;
  const empty = () => ({ size, rows: down, columns: across,
    weight: new Float32Array(all), lift: new Float32Array(all) });
  const mean = empty(), max = empty(), seen = new Uint32Array(all);
  const counts = visibleCounts(layer, head), { spans } = layer;
  const row = new Float64Array(columns);
  for (let r = 0; r < rows; r++) {
    const i = top + r, start = Math.floor(r / size) * across;
    const first = spans ? Math.max(left, spans[2 * i]) : left;
    const end = Math.min(left + columns, spans ? spans[2 * i + 1] : layer.m);
    if (first >= end) continue;
    partSegment(layer, head, i, first, end, ofValues, row);
    for (let j = first; j < end; j++) {
      const weight = row[j - first];
      if (Number.isNaN(weight)) continue;
      const block = start + Math.floor((j - left) / size), lift = weight * counts[i];
      seen[block]++;
      mean.weight[block] += weight;
      mean.lift[block] += lift;
      if (weight > max.weight[block]) max.weight[block] = weight;
      if (lift > max.lift[block]) max.lift[block] = lift;
    }
  }
  for (let block = 0; block < all; block++) {
    mean.weight[block] /= seen[block];
    mean.lift[block] /= seen[block];
    if (!seen[block]) max.weight[block] = max.lift[block] = NaN;
  }
  return { mean, max };
}

/** Pool blocks into larger blocks, a mean of means. @param {Plane} plane @param {number} size
 * @returns {Plane} */
function pool(plane, size) {
  if (size === 1) return plane;
  const rows = Math.ceil(plane.rows / size), columns = Math.ceil(plane.columns / size);
  const weight = new Float32Array(rows * columns), lift = new Float32Array(rows * columns);
  const seen = new Uint32Array(rows * columns);
  for (let r = 0, at = 0; r < plane.rows; r++) {
    for (let c = 0; c < plane.columns; c++, at++) {
      if (Number.isNaN(plane.weight[at])) continue;
      const block = Math.floor(r / size) * columns + Math.floor(c / size);
      seen[block]++;
      weight[block] += plane.weight[at];
      lift[block] += plane.lift[at];
    }
  }
  for (let block = 0; block < seen.length; block++) {
    weight[block] /= seen[block];
    lift[block] /= seen[block];
  }
  return { size: size * plane.size, rows, columns, weight, lift };
}

/** A tile by its place in the grid of tiles, from the store if it is there.
 * @param {Layer} layer @param {number} head @param {boolean} ofValues @param {number} size
 * @param {number} row @param {number} column @param {boolean} compute
 * @returns {{mean: Plane, max: Plane} | null} */
function tileAt(layer, head, ofValues, size, row, column, compute) {
  const key = [layer.number, head, ofValues, size, row, column].join(" ");
  let tile = tiles.get(key) || null;
  if (!tile && !compute) return null;
  if (!tile) {
    const top = row * TILE * size, left = column * TILE * size;
    tile = blocks(layer, head, ofValues, { top, left, rows: Math.min(TILE * size, layer.n - top),
      columns: Math.min(TILE * size, layer.m - left) }, size);
  } else tiles.delete(key);
  tiles.set(key, tile);  // the last one used is the last one to go
  if (tiles.size > TILES_KEPT) tiles.delete(tiles.keys().next().value || "");
  return tile;
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
