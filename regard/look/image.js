// The picture that a vision model was given, under the weights of one query or key.

const PICTURE_SIDE = 420;
/** The decoded picture. @type {HTMLImageElement | null} */
let picture = null;

/** Whether an axis of this length is the patches of the picture. @param {number} length */
function hasPatches(length) { return Boolean(page.image) && page.image.length === length; }

function buildImage() {
  element("image-part").hidden = !page.image;
  if (!page.image) return;
  picture = new Image();
  picture.src = `data:image/png;base64,${page.image.png}`;
  picture.decode().then(drawImage);
  const canvas = element("image");
  canvas.addEventListener("mousemove", (event) => {
    const at = patchAt(event), layer = page.layers[state.layer];
    if (at === null) hideTip();
    else tip(event, pairWords(layer, state.head, state.i, at));
  });
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("click", (event) => {
    const at = patchAt(event);
    if (at !== null) select({ [event.shiftKey ? "j" : "i"]: at, pinned: true });
  });
  for (const id of ["image-smooth", "image-received"]) {
    element(id).addEventListener("change", drawImage);
  }
}

/** @param {MouseEvent} event */
function patchAt(event) {
  const { rows, columns, prefix } = page.image, box = element("image");
  const r = Math.floor(event.offsetY / box.clientHeight * rows);
  const c = Math.floor(event.offsetX / box.clientWidth * columns);
  return r >= 0 && c >= 0 && r < rows && c < columns ? prefix + r * columns + c : null;
}

/** @param {string} id */
function isChecked(id) { return /** @type {HTMLInputElement} */ (element(id)).checked; }

function drawImage() {
  const layer = page.layers[state.layer], { head, i, j } = state;
  element("image-part").hidden = !page.image || !hasPatches(layer.m) || !hasPatches(layer.n);
  if (!picture || !picture.complete || element("image-part").hidden) return;
  const { rows, columns, prefix } = page.image, received = isChecked("image-received");
  const ofValues = state.scale === "value" && Boolean(layer.value);
  const weights = received ? columnWeights(layer, head, j, ofValues)
    : rowWeights(layer, head, i, ofValues);
  const scale = Math.min(1, (element("image-box").clientWidth || PICTURE_SIDE) / PICTURE_SIDE);
  const longest = Math.max(picture.naturalWidth, picture.naturalHeight);
  const width = PICTURE_SIDE * scale * picture.naturalWidth / longest;
  const height = PICTURE_SIDE * scale * picture.naturalHeight / longest;
  const canvas = /** @type {HTMLCanvasElement} */ (element("image"));
  const context = fit(canvas, width, height), layer_ = document.createElement("canvas");
  layer_.width = columns;
  layer_.height = rows;
  const cells_ = /** @type {CanvasRenderingContext2D} */ (layer_.getContext("2d"));
  const image = cells_.createImageData(columns, rows);
  for (let at = 0; at < rows * columns; at++) {
    const weight = weights[prefix + at];
    const lift = weight * visibleKeys(layer, head, received ? prefix + at : i);
    const amount = Number.isNaN(weight) ? 0 : Math.max(0, Math.min(1, share(weight, lift)));
    // Dark where there is little weight, clear where there is much: the picture keeps its colours.
    image.data.set([0, 0, 0, Math.round(235 * (1 - amount))], 4 * at);
  }
  cells_.putImageData(image, 0, 0);
  context.drawImage(picture, 0, 0, width, height);
  context.imageSmoothingEnabled = isChecked("image-smooth");
  context.drawImage(layer_, 0, 0, width, height);
  const chosen = (received ? j : i) - prefix;
  if (chosen >= 0) {
    context.strokeStyle = colourOf("--accent");
    context.lineWidth = 2;
    context.strokeRect(chosen % columns * width / columns, Math.floor(chosen / columns) * height / rows,
      width / columns, height / rows);
  }
  let before = 0;
  for (let at = 0; at < prefix; at++) before += weights[at] || 0;
  element("image-hint").textContent = (received
    ? `Bright patches attend to key ${tokenName(j, layer.m)}. `
    : `Bright patches are what query ${tokenName(i, layer.n)} attends to. `)
    + (prefix ? `${received ? "Queries" : "Keys"} before the patches (${prefix}) have `
      + `${number(before)}. ` : "") + "Click a patch to make it the query, with Shift the key.";
}

/** The weights on the patches as rows of a grid. */
function imageRows() {
  const layer = page.layers[state.layer], { rows, columns, prefix } = page.image;
  const weights = isChecked("image-received") ? columnWeights(layer, state.head, state.j)
    : rowWeights(layer, state.head, state.i);
  return Array.from({ length: rows }, (_, r) =>
    [...weights.subarray(prefix + r * columns, prefix + (r + 1) * columns)]);
}
