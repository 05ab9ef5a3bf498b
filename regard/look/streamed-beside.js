// Two runs of any length: the answers of the server about both.

/** Words of the other run's tokens, as far as answers named them. @type {Map<number, string>} */
const knownBeside = new Map();
/** What the server said of the selected pair. @type {any} */
let readPair = null;

/** Blocks of both runs, from the answer that the map shows; null until there is one.
 * @param {any} before what was shown last */
function besidePlanes(before) {
  const told = shown && shown.told;
  if (!told || !told.beside) return null;
  if (before && before.key === told) return before;
  const { beside, size, rows, columns } = told;
  const quality = told.exact ? "" : ` Both are estimated from the same ${told.taken.toLocaleString("en")} queries; `
    + `the standard error of the difference is ${(100 * beside.typicalError).toPrecision(2)} % of it (root mean `
    + "squares over the map).";
  return { key: told, origin: shown.origin, size, quality,
    planes: [shown.planes.mean, planeOf({ ...beside, size, rows, columns }, beside.mean)] };
}

/** @param {number} at @param {number} length */
function otherLabel(at, length) {
  return (length === page.labelled && knownBeside.get(at)) || `#${at}`;
}

/** The exact weights of the selected pair, or those of single cells; null while they are on their way.
 * @param {number} i @param {number} j @param {number} at of a cell that is hovered */
function weightsOfPair(i, j, at) {
  if (at >= 0) return pair.planes.map((plane) => plane.weight[at]);
  return readPair && readPair.i === i && readPair.j === j ? readPair.weights : null;
}

/** @param {number} at */
function errorOfBlock(at) {
  const { error } = shown.told.beside;
  return error ? error[at] : 0;
}

/** Take down what a read pair says of the other run. @param {any} told @param {number} i @param {number} j */
function keepBeside(told, i, j) {
  if (!told.beside) return;
  const layer = page.layers[state.layer];
  if (layer.n === page.labelled) knownBeside.set(i, told.beside.labels[0]);
  if (layer.m === page.labelled) knownBeside.set(j, told.beside.labels[1]);
  readPair = { i, j, weights: [told.weight, told.beside.weight].map((x) => (x === null ? NaN : x)) };
  drawBesideWords();
}

/** Take down the words of both runs where single cells are shown. @param {any} told */
function keepLabels(told) {
  for (const [names, words] of [[known, told.labels], [knownBeside, told.beside?.labels || []]]) {
    (words[0] || []).forEach((label, at) => names.set(told.top + at, label));
    (words[1] || []).forEach((label, at) => names.set(told.left + at, label));
  }
}
