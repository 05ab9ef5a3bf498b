// Keys, the choice of a scale, and the address that holds what is selected.

/** Keys that change the selection. @type {Object<string, () => any>} */
const STEPS = {
  ArrowUp: () => ({ i: state.i - 1 }), ArrowDown: () => ({ i: state.i + 1 }),
  ArrowLeft: () => ({ j: state.j - 1 }), ArrowRight: () => ({ j: state.j + 1 }),
  "[": () => ({ head: state.head - 1 }), "]": () => ({ head: state.head + 1 }),
  "{": () => ({ layer: state.layer - 1 }), "}": () => ({ layer: state.layer + 1 }),
};
/** Keys that act at once. @type {Object<string, () => any>} */
const ACTS = {
  "+": () => element("zoom-in").click(), "=": () => element("zoom-in").click(),
  "-": () => element("zoom-out").click(), "0": () => element("zoom-whole").click(),
  "1": () => element("zoom-cells").click(), e: focusSaving, "/": () => element("find").focus(),
};

/** Put the focus on the buttons that save the panel at hand, the map's if none is. */
function focusSaving() {
  const section = document.activeElement?.closest("section, .halves > div");
  const box = section?.querySelector(".save") || document.querySelector('.save[data-panel="map"]');
  /** @type {HTMLElement | null} */ (box && box.querySelector("button"))?.focus();
}

/** @param {KeyboardEvent} event */
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (!(event.key in STEPS) && !(event.key in ACTS)) return;
  const target = /** @type {HTMLElement} */ (event.target);
  if (event.key !== "Escape" && target.matches("input, select, summary")) return;
  if (event.key === "Enter" && target.matches("button, a")) return;
  event.preventDefault();
  hideTip();
  if (event.key in ACTS) ACTS[event.key]();
  else select(STEPS[event.key]());
}

/** A handler that runs once things have been quiet for a moment. @param {() => void} action */
function soon(action) {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(action, 120); };
}

function buildScale() {
  for (const radio of document.querySelectorAll('input[name="scale"]')) {
    radio.addEventListener("change", () => {
      state.scale = /** @type {HTMLInputElement} */ (radio).value;
      repaint();
    });
  }
}

/** What is selected, as the address says it. @param {string} more of the selection */
function hashOf(more = "") {
  const { layer, head, i, j, scale, view, plane } = state;
  return `#layer=${layer}&head=${head}&i=${i}&j=${j}${more}&scale=${scale}`
    + (plane === "max" ? "&plane=max" : "")
    + (view ? `&top=${view.top}&left=${view.left}&span=${view.span}` : "");
}

/** @param {string} hash */
function putHash(hash) {
  clearTimeout(putHash.timer);
  // Browsers refuse more than about 200 changes in 30 s, and a page inside a notebook (srcdoc)
  // has no address of its own.
  if (location.protocol === "about:") return;
  putHash.timer = setTimeout(() => {
    // An address this page neither wrote nor read is a link just followed: "hashchange" is on its
    // way, and would find this older place instead.
    if (location.hash !== putHash.known || location.hash === hash) return;
    history.replaceState(null, "", hash);
    putHash.known = location.hash;
  }, 200);
}
/** @type {any} */
putHash.timer = 0;
/** The address as last written or read. */
putHash.known = "";

/** Take what the address says into the state; gives all of its words. */
function readPlace() {
  putHash.known = location.hash;
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of ["layer", "head", "i", "j"]) {
    if (given.has(name)) state[name] = Number(given.get(name));
  }
  const scale = given.get("scale") || "";
  state.scale = ["weight", "value"].includes(scale) ? scale : "lift";
  state.plane = given.get("plane") === "max" ? "max" : "mean";
  const [top, left, span] = ["top", "left", "span"].map((name) => Number(given.get(name)));
  state.view = span > 0 ? { top: top || 0, left: left || 0, span } : null;
  const radio = document.querySelector(`input[name="scale"][value="${state.scale}"]`);
  if (radio instanceof HTMLInputElement) radio.checked = true;
  return given;
}
