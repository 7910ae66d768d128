// Two images over each other with a line between them that moves, zoom and pan: for the evaluation report and the server.
"use strict";
// root carries the custom properties --split, --zoom, --x and --y that compare.css reads; stage holds the images, split is
// the range input beside it. width() is the width of the image in its pixels, labels() are the names of left and right,
// moved(percent) is told the size at which it is shown, keys are further actions by the name of the key.
function createComparison({ root, stage, split, width, labels, moved = () => {}, keys = {} }) {
  const MAX_ZOOM = 32;
  const NEAR_HANDLE = 28; // pixels
  const PAN_STEP = 10; // percent of the stage
  const view = { zoom: 1, x: 0, y: 0, split: 50 };
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  function place() {
    view.zoom = clamp(view.zoom, 1, MAX_ZOOM);
    view.x = clamp(view.x, -100 * (view.zoom - 1), 0);
    view.y = clamp(view.y, -100 * (view.zoom - 1), 0);
    for (const [name, value] of [["--zoom", view.zoom], ["--x", view.x], ["--y", view.y]]) {
      root.style.setProperty(name, String(value));
    }
    stage.classList.toggle("zoomed", view.zoom > 1);
    moved(Math.round((100 * view.zoom * stage.clientWidth) / width()));
  }

  // Zoom so that the point (across, down), as shares of the stage, stays where it is.
  function zoomTo(zoom, across = 0.5, down = 0.5) {
    const wanted = clamp(zoom, 1, MAX_ZOOM);
    const ratio = wanted / view.zoom;
    view.x = 100 * across - ratio * (100 * across - view.x);
    view.y = 100 * down - ratio * (100 * down - view.y);
    view.zoom = wanted;
    place();
  }

  const zoomBy = (factor, across, down) => zoomTo(view.zoom * factor, across, down);
  const zoomExact = () => zoomTo(width() / stage.clientWidth);

  function pan(x, y) {
    view.x += x;
    view.y += y;
    place();
  }

  function setSplit(percent) {
    view.split = clamp(percent, 0, 100);
    split.value = String(view.split);
    root.style.setProperty("--split", String(view.split));
    describe();
  }

  function describe() {
    const [left, right] = labels();
    split.setAttribute("aria-valuetext", `${Math.round(view.split)} % ${left}, the rest ${right}`);
  }

  const share = (event) => {
    const box = stage.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };

  // One pointer moves the line, or the images once they are zoomed; two zoom.
  const pointers = new Map();
  let pans = false;
  const apart = () => {
    const [a, b] = [...pointers.values()];
    return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
  };
  stage.addEventListener("pointerdown", (event) => {
    const box = stage.getBoundingClientRect();
    const fromHandle = Math.abs(event.clientX - box.left - (view.split / 100) * box.width);
    pans = view.zoom > 1 && fromHandle > NEAR_HANDLE;
    pointers.set(event.pointerId, event);
    stage.setPointerCapture(event.pointerId);
    if (pointers.size === 1) {
      move(event);
    }
  });
  function move(event) {
    const last = pointers.get(event.pointerId);
    if (last === undefined) {
      return;
    }
    if (pointers.size === 2) {
      const before = apart();
      pointers.set(event.pointerId, event);
      const [[ax, ay], [bx, by]] = [...pointers.values()].map(share);
      zoomBy(apart() / Math.max(1, before), (ax + bx) / 2, (ay + by) / 2);
      return;
    }
    pointers.set(event.pointerId, event);
    const box = stage.getBoundingClientRect();
    if (pans) {
      pan((100 * (event.clientX - last.clientX)) / box.width, (100 * (event.clientY - last.clientY)) / box.height);
    } else {
      setSplit((100 * (event.clientX - box.left)) / box.width);
    }
  }
  const stop = (event) => {
    pointers.delete(event.pointerId);
  };
  stage.addEventListener("pointermove", move);
  stage.addEventListener("pointerup", stop);
  stage.addEventListener("pointercancel", stop);
  stage.addEventListener("dblclick", (event) => zoomBy(2, ...share(event)));
  stage.addEventListener("wheel", (event) => {
    if (event.ctrlKey || event.metaKey) { // a wheel alone scrolls the page; pinching arrives with ctrlKey
      event.preventDefault();
      zoomBy(Math.exp(-event.deltaY / 300), ...share(event));
    }
  }, { passive: false });

  const actions = {
    "+": () => zoomBy(1.5),
    "=": () => zoomBy(1.5),
    "-": () => zoomBy(1 / 1.5),
    "0": () => zoomTo(1),
    "ArrowLeft": () => pan(PAN_STEP, 0),
    "ArrowRight": () => pan(-PAN_STEP, 0),
    "ArrowUp": () => pan(0, PAN_STEP),
    "ArrowDown": () => pan(0, -PAN_STEP),
    ...keys,
  };
  stage.addEventListener("keydown", (event) => {
    const arrow = event.key.startsWith("Arrow");
    if (event.key in actions && !event.ctrlKey && !event.metaKey && !event.altKey && !(arrow && view.zoom === 1)) {
      event.preventDefault();
      actions[event.key]();
    }
  });
  split.addEventListener("input", () => setSplit(Number(split.value)));
  addEventListener("resize", place);
  return { place, zoomTo, zoomBy, zoomExact, setSplit, describe };
}
