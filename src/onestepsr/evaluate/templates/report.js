// The page's behaviour: sorting, filtering, the viewer with its slider and zoom. Nothing is fetched and nothing is kept.
"use strict";
(() => {
  const MAX_ZOOM = 32;
  const NEAR_HANDLE = 28; // pixels
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  function setUpTheme() {
    const dark = () => {
      const chosen = document.documentElement.dataset.theme;
      return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    };
    $("theme").addEventListener("click", () => {
      document.documentElement.dataset.theme = dark() ? "light" : "dark";
    });
  }

  // Numbers carry their full value in data-value, words are compared as people do; rows without a value come last.
  function compareCells(first, second, down) {
    const [a, b] = [first.dataset.value, second.dataset.value];
    if (a === undefined || b === undefined) {
      const [s, t] = [first.textContent.trim(), second.textContent.trim()];
      if (first.classList.contains("word")) {
        return (down ? -1 : 1) * s.localeCompare(t, undefined, { numeric: true, sensitivity: "base" });
      }
      return (a === undefined) - (b === undefined);
    }
    return (down ? -1 : 1) * (Number(a) - Number(b));
  }

  function sortBy(heading) {
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) {
      other.removeAttribute("aria-sort");
    }
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => compareCells(a.cells[column], b.cells[column], down));
    body.append(...rows);
  }

  function setUpTables() {
    for (const button of document.querySelectorAll("thead button")) {
      button.addEventListener("click", () => sortBy(button.closest("th")));
    }
    const filter = $("filter");
    const rows = [...document.querySelectorAll("#all tbody tr")];
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
        shown += row.hidden ? 0 : 1;
      }
      $("shown").textContent = `${shown} of ${rows.length} images`;
    });
  }

  const view = { image: 0, left: null, right: null, zoom: 1, x: 0, y: 0, split: 50 };

  function show(number) {
    view.image = (number + data.images.length) % data.images.length;
    const image = data.images[view.image];
    const viewer = $("viewer");
    viewer.style.setProperty("--shape", String(image.width / image.height));
    $("image-name").textContent = image.name;
    $("image-number").textContent = `${view.image + 1} of ${data.images.length}`;
    $("image-part").textContent = image.part;
    for (const side of ["left", "right"]) {
      for (const option of $(side).options) {
        option.disabled = !(option.value in image.files);
      }
      choose(side, view[side] in image.files ? view[side] : preferredRole(image, side));
    }
    fillPanes(image);
    for (const row of document.querySelectorAll("#all tbody tr")) {
      row.classList.toggle("current", row.dataset.image === String(view.image));
    }
    place();
  }

  // Before and after: on the right what the last method made, on the left the first of the others (LR where there is one).
  function preferredRole(image, side) {
    const there = data.roles.filter((role) => role.key in image.files);
    const right = there.filter((role) => role.method !== null).pop();
    return side === "right" ? right.key : (there.find((role) => role !== right) ?? right).key;
  }

  function choose(side, role) {
    const image = data.images[view.image];
    const label = data.roles.find((item) => item.key === role).label;
    view[side] = role;
    $(side).value = role;
    const img = document.querySelector(`.layer.${side} img`);
    img.src = image.files[role];
    img.alt = `${label} of ${image.name}`;
    img.classList.toggle("lr", role === "lr");
    document.querySelector(`.tag.${side}`).textContent = label;
    describeSplit();
  }

  function fillPanes(image) {
    const panes = data.roles.filter((role) => role.key in image.files).map((role) => {
      const figure = document.createElement("figure");
      const pane = document.createElement("div");
      const img = document.createElement("img");
      const caption = document.createElement("figcaption");
      pane.className = "pane";
      img.src = image.files[role.key];
      img.alt = `${role.label} of ${image.name}`;
      img.className = role.key === "lr" ? "lr" : "";
      pane.append(img);
      const values = role.method === null ? [] : image.values[role.method];
      caption.textContent = [role.label, ...values].join("  ·  ");
      figure.append(pane, caption);
      return figure;
    });
    $("panes").replaceChildren(...panes);
  }

  function place() {
    view.zoom = clamp(view.zoom, 1, MAX_ZOOM);
    view.x = clamp(view.x, -100 * (view.zoom - 1), 0);
    view.y = clamp(view.y, -100 * (view.zoom - 1), 0);
    for (const [name, value] of [["--zoom", view.zoom], ["--x", view.x], ["--y", view.y]]) {
      $("viewer").style.setProperty(name, String(value));
    }
    $("stage").classList.toggle("zoomed", view.zoom > 1);
    const image = data.images[view.image];
    const percent = Math.round((100 * view.zoom * $("stage").clientWidth) / image.width);
    $("zoom-now").textContent = `${percent} %`;
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

  function setSplit(percent) {
    view.split = clamp(percent, 0, 100);
    $("split").value = String(view.split);
    $("viewer").style.setProperty("--split", String(view.split));
    describeSplit();
  }

  function describeSplit() {
    const label = (side) => data.roles.find((role) => role.key === view[side])?.label ?? "";
    $("split").setAttribute("aria-valuetext", `${Math.round(view.split)} % ${label("left")}, the rest ${label("right")}`);
  }

  function setUpDragging() {
    const stage = $("stage");
    let drag = null;
    stage.addEventListener("pointerdown", (event) => {
      const box = stage.getBoundingClientRect();
      const fromHandle = Math.abs(event.clientX - box.left - (view.split / 100) * box.width);
      drag = { pans: view.zoom > 1 && fromHandle > NEAR_HANDLE, x: event.clientX, y: event.clientY, box };
      stage.setPointerCapture(event.pointerId);
      move(event);
    });
    const move = (event) => {
      if (drag === null) {
        return;
      }
      if (drag.pans) {
        view.x += (100 * (event.clientX - drag.x)) / drag.box.width;
        view.y += (100 * (event.clientY - drag.y)) / drag.box.height;
        [drag.x, drag.y] = [event.clientX, event.clientY];
        place();
      } else {
        setSplit((100 * (event.clientX - drag.box.left)) / drag.box.width);
      }
    };
    const stop = () => {
      drag = null;
    };
    stage.addEventListener("pointermove", move);
    stage.addEventListener("pointerup", stop);
    stage.addEventListener("pointercancel", stop);
    const share = (event) => {
      const box = stage.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    };
    stage.addEventListener("dblclick", (event) => zoomTo(view.zoom * 2, ...share(event)));
    stage.addEventListener("wheel", (event) => {
      if (event.ctrlKey || event.metaKey) { // a wheel alone scrolls the page; pinching arrives with ctrlKey
        event.preventDefault();
        zoomTo(view.zoom * Math.exp(-event.deltaY / 300), ...share(event));
      }
    }, { passive: false });
  }

  function setUpKeys() {
    const step = 10;
    const actions = {
      "+": () => zoomTo(view.zoom * 1.5),
      "=": () => zoomTo(view.zoom * 1.5),
      "-": () => zoomTo(view.zoom / 1.5),
      "0": () => zoomTo(1),
      "ArrowLeft": () => pan(step, 0),
      "ArrowRight": () => pan(-step, 0),
      "ArrowUp": () => pan(0, step),
      "ArrowDown": () => pan(0, -step),
      "PageUp": () => show(view.image - 1),
      "PageDown": () => show(view.image + 1),
    };
    const pan = (x, y) => {
      view.x += x;
      view.y += y;
      place();
    };
    $("stage").addEventListener("keydown", (event) => {
      const arrow = event.key.startsWith("Arrow");
      if (event.key in actions && !event.ctrlKey && !event.metaKey && !event.altKey && !(arrow && view.zoom === 1)) {
        event.preventDefault();
        actions[event.key]();
      }
    });
  }

  function setUpViewer() {
    for (const side of ["left", "right"]) {
      $(side).addEventListener("change", () => choose(side, $(side).value));
    }
    $("split").addEventListener("input", () => setSplit(Number($("split").value)));
    $("previous").addEventListener("click", () => show(view.image - 1));
    $("next").addEventListener("click", () => show(view.image + 1));
    $("zoom-in").addEventListener("click", () => zoomTo(view.zoom * 1.5));
    $("zoom-out").addEventListener("click", () => zoomTo(view.zoom / 1.5));
    $("zoom-fit").addEventListener("click", () => zoomTo(1));
    $("zoom-exact").addEventListener("click", () => {
      zoomTo(data.images[view.image].width / $("stage").clientWidth);
    });
    const showPixels = () => $("viewer").classList.toggle("pixels", $("pixels").checked);
    $("pixels").addEventListener("change", showPixels);
    showPixels(); // a browser that goes back to the page may have kept another choice
    for (const button of document.querySelectorAll("button[data-image]")) {
      button.addEventListener("click", () => {
        show(Number(button.dataset.image));
        $("viewer").scrollIntoView({ block: "start" });
        $("stage").focus({ preventScroll: true });
      });
    }
    setUpDragging();
    setUpKeys();
    setSplit(50);
    show(0);
    addEventListener("resize", place);
  }

  setUpTheme();
  setUpTables();
  if (data.images.length) {
    setUpViewer();
  }
})();
