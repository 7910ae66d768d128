// The page's behaviour: sorting, filtering, the viewer with its slider and zoom. Nothing is fetched and nothing is kept.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);

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

  const view = { image: 0, left: null, right: null };
  let comparison = null;

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
    comparison.place();
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
    comparison.describe();
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

  function setUpViewer() {
    const label = (side) => data.roles.find((role) => role.key === view[side])?.label ?? "";
    comparison = createComparison({
      root: $("viewer"),
      stage: $("stage"),
      split: $("split"),
      width: () => data.images[view.image].width,
      labels: () => [label("left"), label("right")],
      moved: (percent) => {
        $("zoom-now").textContent = `${percent} %`;
      },
      keys: { "PageUp": () => show(view.image - 1), "PageDown": () => show(view.image + 1) },
    });
    for (const side of ["left", "right"]) {
      $(side).addEventListener("change", () => choose(side, $(side).value));
    }
    $("previous").addEventListener("click", () => show(view.image - 1));
    $("next").addEventListener("click", () => show(view.image + 1));
    $("zoom-in").addEventListener("click", () => comparison.zoomBy(1.5));
    $("zoom-out").addEventListener("click", () => comparison.zoomBy(1 / 1.5));
    $("zoom-fit").addEventListener("click", () => comparison.zoomTo(1));
    $("zoom-exact").addEventListener("click", comparison.zoomExact);
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
    comparison.setSplit(50);
    show(0);
  }

  setUpTheme();
  setUpTables();
  if (data.images.length) {
    setUpViewer();
  }
})();
