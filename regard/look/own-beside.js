// The numbers of two runs that one page carries.

const BESIDE = 128;  // blocks per side, at most

/** The mean blocks of both runs in the view of the map. @param {any} before what was shown last */
function besidePlanes(before) {
  const key = JSON.stringify([state.layer, state.head, state.view]);
  if (before && before.key === key) return before;
  const both = [page.layers[state.layer], page.beside?.layers[state.layer] || page.layers[0]];
  const { n, m, planes } = both[0], view = state.view;
  const origin = { top: view ? view.top : 0, left: view ? view.left : 0 };
  const span = view ? view.span : Math.max(n, m);
  const rows = Math.min(span, n - origin.top), columns = Math.min(span, m - origin.left);
  const whole = planes && !view;
  const size = whole ? planes.size : Math.ceil(span / BESIDE);
  const found = both.map((layer) => (whole ? bakedPlane(layer, state.head, "mean", page.array)
    : blocks(layer, state.head, false, { ...origin, rows, columns }, size).mean));
  return { key, planes: found, origin, size };
}

/** @param {number} at @param {number} length */
function otherLabel(at, length) {
  return page.beside && page.beside.labels.length === length ? page.beside.labels[at] : `#${at}`;
}

/** @param {number} i @param {number} j @param {number} _at */
function weightsOfPair(i, j, _at) {
  const both = [page.layers[state.layer], page.beside?.layers[state.layer] || page.layers[0]];
  return both.map((layer) => weightAt(layer, state.head, i, j));
}

/** All cells of a block are there. @param {number} _at */
function errorOfBlock(_at) { return 0; }
