// Linked highlighting: what the pointer or the focus rests on is marked wherever else it stands.

/** @param {string} axis "query" or "key" @param {number} at */
function highlight(axis, at) {
  clearHighlight();
  for (const node of document.querySelectorAll(`[data-${axis}="${at}"]`)) node.classList.add("hot");
  const layer = page.layers[state.layer], line = element("map-hot");
  if (!shown || shown.layer !== layer) return;
  const { plane, origin, box, cell } = shown, rows = axis === "query";
  const place = Math.floor((at - (rows ? origin.top : origin.left)) / plane.size);
  if (place < 0 || place >= (rows ? plane.rows : plane.columns)) return;
  const width = rows ? box.width : cell, height = rows ? cell : box.height;
  line.style.left = `${box.x + (rows ? 0 : place * cell)}px`;
  line.style.top = `${box.y + (rows ? place * cell : 0)}px`;
  line.style.width = `${Math.max(2, width)}px`;
  line.style.height = `${Math.max(2, height)}px`;
  line.hidden = false;
}

function clearHighlight() {
  for (const node of document.querySelectorAll(".hot")) node.classList.remove("hot");
  element("map-hot").hidden = true;
}

function buildHighlight() {
  const over = (event) => {
    const target = event.target instanceof Element
      ? event.target.closest("[data-key], [data-query]") : null;
    if (!target) return clearHighlight();
    const { key, query } = /** @type {HTMLElement} */ (target).dataset;
    if (query !== undefined) highlight("query", Number(query));
    else highlight("key", Number(key));
  };
  document.addEventListener("pointerover", over);
  document.addEventListener("focusin", over);
}

/** The next token that holds the words, after the query; it becomes the query, or with Shift the
 * key. @param {KeyboardEvent} event */
function findToken(event) {
  if (event.key !== "Enter") return;
  event.preventDefault();
  const words = /** @type {HTMLInputElement} */ (element("find")).value.toLowerCase();
  const layer = page.layers[state.layer], asKey = event.shiftKey;
  const length = asKey ? layer.m : layer.n, from = asKey ? state.j : state.i;
  const found = Array.from({ length }, (_, step) => (from + 1 + step) % length)
    .filter((at) => words && tokenLabel(at, length).toLowerCase().includes(words));
  element("found").textContent = found.length ? `${found.length} found` : "not found";
  if (found.length) select({ [asKey ? "j" : "i"]: found[0], pinned: true });
}

function buildFind() {
  element("find-label").hidden = !page.tokens.labels.length;
  element("find").addEventListener("keydown", findToken);
}
