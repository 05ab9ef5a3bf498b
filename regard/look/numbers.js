// The numbers that the page carries.

const raw = JSON.parse(element("data").textContent || "");
/** @type {Map<number, any>} */
const unpacked = new Map();
const page = {
  ...raw,
  /** An array of the page by index, unpacked when first used. @param {number | null} index */
  array(index) {
    if (index === null) return null;
    if (!unpacked.has(index)) unpacked.set(index, unpack(raw.arrays[index]));
    return unpacked.get(index);
  },
};
/** @type {Layer[]} */
page.layers = raw.layers.map((layer) => openLayer(layer, page.array));
