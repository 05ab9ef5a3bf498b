// The numbers that the page carries.

const raw = JSON.parse(element("data").textContent || "");
if (!("DecompressionStream" in window)) {
  const words = "This page needs a browser of 2023 or later.";  // Chrome 80, Firefox 113, Safari 16.4
  element("facts").textContent = words;
  throw new Error(words);
}
/** @type {Uint8Array[]} */
const inflated = await Promise.all(raw.arrays.map(inflate));
/** @type {Map<number, any>} */
const unpacked = new Map();
const page = {
  ...raw,
  /** An array of the page by index, unpacked when first used. @param {number | null} index */
  array(index) {
    if (index === null) return null;
    if (!unpacked.has(index)) unpacked.set(index, unpack(raw.arrays[index].type, inflated[index]));
    return unpacked.get(index);
  },
};
/** @type {Layer[]} */
page.layers = raw.layers.map((layer) => openLayer(layer, page.array));
/** Another run of the same shape beside this one. @type {{title: string, names: string[], labels: string[], layers: Layer[]} | null} */
page.beside = raw.beside && { ...raw.beside,
  layers: raw.beside.layers.map((layer) => openLayer(layer, page.array)) };
