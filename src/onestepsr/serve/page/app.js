// The page: photos in, jobs on this server, results out. It asks nothing of any other server.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const SCALES = [2, 3, 4, 6, 8];
  const UPLOADS = 2; // at once
  const STREAMS = 2; // of events at once: a browser opens few connections to one server
  const UNFINISHED = ["waiting", "uploading", "queued", "running"];
  const state = { items: [], selected: null, server: null, models: [], token: "", number: 0 };
  let comparison = null;

  // ---- small things ----

  function store(area, key, value) {
    try {
      if (value === undefined) {
        return area().getItem(key);
      }
      area().setItem(key, value);
    } catch { /* storage is switched off: nothing is remembered */ }
    return null;
  }
  const session = () => sessionStorage;
  const local = () => localStorage;
  const pause = (ms) => new Promise((done) => { setTimeout(done, ms); });
  const say = (text) => { $("spoken").textContent = text; };

  function duration(seconds) {
    if (seconds < 1) {
      return "less than a second";
    }
    if (seconds < 90) {
      return `${Math.round(seconds)} s`;
    }
    return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1).replace(".0", "")} h`;
  }

  function bytes(count) {
    return count < 1e6 ? `${Math.max(1, Math.round(count / 1e3))} kB` : `${(count / 1e6).toFixed(1)} MB`;
  }

  function notice(text) {
    $("notice").textContent = text;
    $("notice").hidden = text === "";
  }

  // ---- the server ----

  class Refused extends Error {
    constructor(status, code, message, wait) {
      super(message);
      Object.assign(this, { status, code, wait });
    }
  }

  async function ask(path, options = {}) {
    for (;;) {
      const headers = state.token ? { authorization: `Bearer ${state.token}` } : {};
      let answer;
      try {
        answer = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
      } catch (error) {
        if (error.name === "AbortError") {
          throw error;
        }
        throw new Refused(0, "gone", "The server does not answer. Is it still running?", 2);
      }
      if (answer.ok) {
        return answer;
      }
      let body = {};
      try {
        body = (await answer.json()).error ?? {};
      } catch { /* not ours */ }
      if (answer.status === 401) {
        await askForToken();
        continue;
      }
      const wait = Number(answer.headers.get("retry-after")) || 1;
      throw new Refused(answer.status, body.code ?? "", body.message ?? `The server answered ${answer.status}.`, wait);
    }
  }

  let asking = null;
  function askForToken() {
    asking ??= new Promise((done) => {
      $("ask").showModal();
      $("ask").addEventListener("close", () => {
        state.token = $("token").value;
        store(session, "token", state.token);
        asking = null;
        done();
      }, { once: true });
    });
    return asking;
  }

  const LEADS = {
    type: "This is no photo that can be read",
    image: "This photo is damaged",
    enlargement: "This photo could not be enlarged",
    pixels: "This photo is too large",
    bytes: "This file is too large",
    memory: "This photo is too large for the server’s memory",
    storage: "The server has no room",
    option: "These settings do not fit",
    crash: "This photo brought the server down",
    gone: "No answer",
    unknown: "This result has expired",
  };
  const lead = (code) => LEADS[code] ?? "Something went wrong";
  const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");

  // ---- settings ----

  function settings() {
    const model = state.models.find((each) => each.name === $("model").value);
    const chosen = {
      scale: document.querySelector("#scale input:checked").value,
      model: $("model").value,
      color_fix: $("color_fix").value,
      format: $("format").value,
    };
    if (model?.fidelity && Number($("fidelity").value) > 0) {
      chosen.fidelity = $("fidelity").value;
    }
    if (!$("metadata").checked) {
      chosen.strip_metadata = "true";
    }
    return chosen;
  }

  function setUpSettings() {
    const remembered = JSON.parse(store(local, "settings") ?? "{}");
    for (const scale of SCALES) {
      const label = document.createElement("label");
      const input = Object.assign(document.createElement("input"), { type: "radio", name: "scale", value: String(scale) });
      input.checked = String(scale) === (remembered.scale ?? "4");
      const text = Object.assign(document.createElement("span"), { textContent: `${scale}×` });
      label.append(input, text);
      $("scale").append(label);
    }
    if (document.querySelector("#scale input:checked") === null) {
      document.querySelector("#scale input[value='4']").checked = true;
    }
    $("model").replaceChildren(...state.models.map((model) => new Option(model.name, model.name)));
    $("format").append(...state.server.formats.map((each) => new Option(each.name, each.format)));
    for (const id of ["model", "color_fix", "format", "fidelity"]) {
      if (remembered[id] !== undefined && (id === "fidelity" || [...$(id).options].some((o) => o.value === remembered[id]))) {
        $(id).value = remembered[id];
      }
    }
    $("metadata").checked = remembered.strip_metadata === undefined;
    const changed = () => {
      const model = state.models.find((each) => each.name === $("model").value);
      $("about").textContent = model ? [model.summary, model.licence].filter(Boolean).join(" · ") : "";
      $("fidelity-row").hidden = !model?.fidelity;
      store(local, "settings", JSON.stringify(settings()));
      show();
    };
    $("settings").addEventListener("change", changed);
    changed();
    const { max_bytes: most, max_pixels: pixels } = state.server;
    $("limits").textContent = `Up to ${Math.round(pixels / 1e6)} megapixels and ${bytes(most).replace(".0", "")}. `
      + `Results are kept for ${duration(3600 * state.server.keep_hours)}.`;
  }

  // ---- photos ----

  function add(files) {
    const fresh = [...files].map((file) => {
      state.number += 1;
      const name = file.name || "pasted.png";
      return { key: state.number, name, file, url: URL.createObjectURL(file), status: "waiting", options: settings() };
    });
    if (fresh.length === 0) {
      return;
    }
    state.items.push(...fresh);
    if (state.selected === null || !UNFINISHED.includes(state.selected.status) || state.selected.status === "failed") {
      state.selected = fresh[0];
    }
    say(fresh.length === 1 ? `${fresh[0].name} added` : `${fresh.length} photos added`);
    renderAll();
    upload();
  }

  function upload() {
    while (state.items.filter((item) => item.status === "uploading").length < UPLOADS) {
      const item = state.items.find((each) => each.status === "waiting" && !(each.notBefore > Date.now()));
      if (item === undefined) {
        return;
      }
      send(item);
    }
  }

  async function send(item) {
    item.status = "uploading";
    render(item);
    try {
      if (item.file.size > state.server.max_bytes) {
        throw new Refused(413, "bytes", `The file has ${bytes(item.file.size)}, the limit is ${bytes(state.server.max_bytes)}`);
      }
      const form = new FormData();
      for (const [name, value] of Object.entries(item.options)) {
        form.append(name, value);
      }
      form.append("image", item.file, item.name);
      const answer = await ask("/v1/jobs", { method: "POST", body: form });
      const job = await answer.json();
      if (!state.items.includes(item)) { // removed meanwhile
        ask(job.links.self, { method: "DELETE" }).catch(() => {});
        return;
      }
      take(item, job);
      remember();
    } catch (error) {
      if (error.status === 429 || error.status === 503) { // the queue is full: come back when it says
        item.status = "waiting";
        item.notBefore = Date.now() + 1000 * error.wait;
        setTimeout(upload, 1000 * error.wait + 50);
        render(item);
      } else {
        fail(item, error.code, error.message);
      }
    }
    upload();
    watch();
  }

  function fail(item, code, message) {
    item.status = "failed";
    const text = code === "image" ? message.split("; accepted:")[0] : message ?? ""; // its format was accepted
    item.problem = { title: lead(code), text: sentence(text) };
    say(`${item.name}: ${item.problem.title}`);
    render(item);
  }

  // What the server says of a job.
  function take(item, job) {
    const before = item.status;
    item.job = job;
    item.status = job.state === "cancelled" ? "failed" : job.state;
    if (job.state === "failed") {
      fail(item, job.error.code, job.error.message);
    } else if (job.state === "cancelled") {
      item.problem = { title: "Cancelled", text: "" };
    } else if (job.state === "done" && before !== "done") {
      say(`${item.name} is ready`);
    }
    render(item);
  }

  function watch() {
    const live = state.items.filter((item) => item.job && ["queued", "running"].includes(item.status));
    for (const item of live.slice(0, STREAMS)) {
      if (!item.stream) {
        follow(item);
      }
    }
  }

  async function follow(item) {
    item.stream = new AbortController();
    try {
      const answer = await ask(`${item.job.links.self}/events`, { signal: item.stream.signal });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) {
          break;
        }
        text += value;
        const events = text.split("\n\n");
        text = events.pop();
        for (const event of events) {
          const data = event.split("\n").find((line) => line.startsWith("data: "));
          const body = data ? JSON.parse(data.slice(6)) : {};
          if (body.id) {
            take(item, body);
          }
        }
      }
    } catch (error) {
      if (error.status === 404) {
        fail(item, "unknown", "The server no longer has this photo");
      } else if (error.name !== "AbortError") {
        await pause(2000); // the server is being started again: it goes on with its jobs
      }
    }
    item.stream = null;
    watch();
  }

  function remove(item) {
    const at = state.items.indexOf(item);
    state.items.splice(at, 1);
    item.stream?.abort();
    if (item.job) {
      ask(item.job.links.self, { method: "DELETE" }).catch(() => {});
    }
    for (const url of [item.url, item.result]) {
      if (url) {
        URL.revokeObjectURL(url);
      }
    }
    if (state.selected === item) {
      state.selected = state.items[Math.min(at, state.items.length - 1)] ?? null;
    }
    remember();
    renderAll();
    watch();
  }

  function redo(item) {
    if (item.job) {
      ask(item.job.links.self, { method: "DELETE" }).catch(() => {});
    }
    if (item.result) {
      URL.revokeObjectURL(item.result);
    }
    Object.assign(item, { job: null, result: null, status: "waiting", options: settings(), problem: null });
    render(item);
    upload();
  }

  // Jobs of this tab are found again after the page was loaded anew.
  function remember() {
    store(session, "jobs", JSON.stringify(state.items.filter((item) => item.job).map((item) => item.job.id)));
  }

  async function recall() {
    for (const id of JSON.parse(store(session, "jobs") ?? "[]")) {
      try {
        const job = await (await ask(`/v1/jobs/${id}`)).json();
        const original = await (await ask(`/v1/jobs/${id}/input`)).blob();
        state.number += 1;
        const file = new File([original], job.name, { type: original.type });
        const item = { key: state.number, name: job.name, file, url: URL.createObjectURL(file), options: {}, status: "queued" };
        state.items.push(item);
        state.selected ??= item;
        take(item, job);
      } catch { /* expired */ }
    }
    renderAll();
    watch();
  }

  // ---- downloads ----

  async function resultOf(item) {
    if (!item.result) {
      item.result = URL.createObjectURL(await (await ask(item.job.links.result)).blob());
    }
    return item.result;
  }

  function save(url, name) {
    const link = Object.assign(document.createElement("a"), { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
  }

  async function downloadAll() {
    const done = state.items.filter((item) => item.status === "done");
    $("download-all").disabled = true;
    try {
      const body = JSON.stringify({ ids: done.map((item) => item.job.id) });
      const answer = await ask("/v1/archive", { method: "POST", body, headers: { "content-type": "application/json" } });
      const url = URL.createObjectURL(await answer.blob());
      save(url, "onestepsr.zip");
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    } catch (error) {
      notice(sentence(error.message));
    }
    $("download-all").disabled = false;
  }

  // ---- drawing ----

  function describe(item) {
    const job = item.job;
    switch (item.status) {
      case "waiting": return item.notBefore > Date.now() ? "The server is busy, trying again soon" : "Waiting";
      case "uploading": return "Sending";
      case "queued": return job.ahead ? `In line, ${job.ahead} before it${left(job)}` : "Next in line";
      case "running": return job.tiles ? `Tile ${job.tiles.done} of ${job.tiles.total}${left(job)}` : `Working${left(job)}`;
      case "done": return `${job.output.width} × ${job.output.height} · ${bytes(job.output.bytes)}`;
      default: return item.problem?.title ?? "Failed";
    }
  }
  const left = (job) => (job.seconds_left === null ? "" : ` · ${duration(job.seconds_left)} left`);

  function share(item) {
    const tiles = item.job?.tiles;
    if (item.status === "running" && tiles && tiles.total > 1) {
      return tiles.done / tiles.total;
    }
    return item.status === "queued" || item.status === "waiting" ? 0 : null;
  }

  function setBar(bar, value) {
    if (value === null) {
      bar.removeAttribute("value");
    } else {
      bar.value = value;
    }
  }

  function element(kind, name) {
    const made = document.createElement(kind);
    made.className = name;
    return made;
  }

  function build(item) {
    const row = document.createElement("li");
    const button = Object.assign(element("button", "item"), { type: "button" });
    const thumb = Object.assign(element("img", "thumb"), { src: item.url, alt: "" });
    thumb.addEventListener("error", () => { thumb.removeAttribute("src"); });
    const name = Object.assign(element("span", "name"), { textContent: item.name, title: item.name });
    const status = element("span", "state");
    const text = document.createElement("span");
    const bar = document.createElement("progress");
    bar.setAttribute("aria-label", `Progress of ${item.name}`);
    status.append(text, bar);
    button.append(thumb, name, status);
    button.addEventListener("click", () => {
      state.selected = item;
      renderAll();
      if (matchMedia("(max-width: 60rem)").matches) {
        $("viewer").scrollIntoView({ block: "start", behavior: "smooth" });
      }
    });
    const drop = Object.assign(element("button", "remove"), { type: "button", textContent: "×" });
    drop.setAttribute("aria-label", `Remove ${item.name}`);
    drop.addEventListener("click", () => remove(item));
    row.append(button, drop);
    item.row = { row, button, text, bar };
    return row;
  }

  function render(item) {
    if (!item.row) {
      build(item);
    }
    const { button, text, bar } = item.row;
    button.className = `item ${item.status}`;
    button.setAttribute("aria-current", String(item === state.selected));
    text.textContent = describe(item);
    bar.hidden = !UNFINISHED.includes(item.status);
    setBar(bar, share(item));
    const done = state.items.filter((each) => each.status === "done").length;
    $("list-title").textContent = state.items.length === 1 ? "1 photo" : `${done} of ${state.items.length} ready`;
    $("download-all").hidden = done < 2;
    if (item === state.selected) {
      show();
    }
    const busy = state.items.some((each) => UNFINISHED.includes(each.status));
    document.title = busy ? `${done}/${state.items.length} · onestepsr` : "onestepsr";
  }

  function renderAll() {
    document.body.classList.toggle("empty", state.items.length === 0);
    for (const item of state.items) {
      render(item);
    }
    $("items").replaceChildren(...state.items.map((item) => item.row.row));
    show();
  }

  let shown = { item: null, before: null, after: null };

  function show() {
    const item = state.selected;
    if (item === null) {
      shown = { item: null, before: null, after: null };
      return;
    }
    const finished = item.status === "done";
    const viewer = $("viewer");
    viewer.classList.toggle("covered", !finished);
    viewer.classList.toggle("failed", item.status === "failed");
    $("title").textContent = item.name;
    const job = item.job;
    const sizes = job ? `${job.input.width} × ${job.input.height}` : "";
    $("facts").textContent = finished
      ? `${sizes} → ${job.output.width} × ${job.output.height} · ${duration(job.seconds)}` : sizes;
    $("cover-title").textContent = item.status === "failed" ? item.problem.title : describe(item).split(" · ")[0];
    $("cover-text").textContent = item.status === "failed" ? item.problem.text : describe(item).split(" · ").slice(1).join(" · ");
    $("cover-bar").hidden = item.status === "failed";
    setBar($("cover-bar"), share(item));
    $("cancel").hidden = !UNFINISHED.includes(item.status);
    $("download").hidden = !finished;
    $("redo").hidden = UNFINISHED.includes(item.status) || !differs(item);
    $("redo").textContent = item.status === "failed" ? "Try again" : "Redo with these settings";
    if (shown.item !== item) {
      shown = { item, before: null, after: null };
      $("after").removeAttribute("src");
    }
    if (shown.before !== item.url) {
      shown.before = item.url;
      $("before").src = item.url;
      $("before").alt = `${item.name}, before`;
    }
    if (finished && shown.after !== job.id) {
      shown.after = job.id;
      viewer.style.setProperty("--shape", String(job.output.width / job.output.height));
      reveal(item);
    } else if (job && !finished) {
      viewer.style.setProperty("--shape", String(job.input.width / job.input.height));
    }
  }

  // A result whose settings are not known, of an earlier load of the page, differs from any.
  const differs = (item) => item.status === "failed" || JSON.stringify(item.options) !== JSON.stringify(settings());

  async function reveal(item) {
    try {
      const url = await resultOf(item);
      if (shown.item === item) {
        $("after").src = url;
        $("after").alt = `${item.name}, after`;
        comparison.zoomTo(1);
        comparison.setSplit(50);
      }
    } catch (error) {
      fail(item, error.code, error.message);
    }
  }

  // ---- what people do ----

  function setUpViewer() {
    comparison = createComparison({
      root: $("viewer"),
      stage: $("stage"),
      split: $("split"),
      width: () => state.selected?.job?.output?.width ?? $("stage").clientWidth,
      labels: () => ["before", "after"],
      moved: (percent) => { $("zoom-now").textContent = `${percent} %`; },
    });
    $("zoom-in").addEventListener("click", () => comparison.zoomBy(1.5));
    $("zoom-out").addEventListener("click", () => comparison.zoomBy(1 / 1.5));
    $("zoom-fit").addEventListener("click", () => comparison.zoomTo(1));
    $("zoom-exact").addEventListener("click", comparison.zoomExact);
    $("cancel").addEventListener("click", () => remove(state.selected));
    $("redo").addEventListener("click", () => redo(state.selected));
    $("download").addEventListener("click", async () => {
      const item = state.selected;
      save(await resultOf(item), item.job.output.name);
    });
    $("download-all").addEventListener("click", downloadAll);
    $("clear").addEventListener("click", () => [...state.items].forEach(remove));
    for (const [id, word] of [["before", "Before"], ["after", "After"]]) {
      $(id).addEventListener("error", () => {
        const item = state.selected;
        if (item !== null && item.status === "done" && $(id).getAttribute("src")) {
          const kind = item.name.split(".").pop().toUpperCase();
          notice(`This browser cannot show ${kind} files (“${word}” stays empty). The download is complete.`);
        }
      });
    }
  }

  function setUpInput() {
    $("choose").addEventListener("click", () => $("files").click());
    $("files").addEventListener("change", () => {
      add($("files").files);
      $("files").value = "";
    });
    let depth = 0;
    const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragenter", (event) => {
      if (carriesFiles(event)) {
        depth += 1;
        document.body.classList.add("dragging");
      }
    });
    addEventListener("dragleave", (event) => {
      if (carriesFiles(event)) {
        depth -= 1;
        document.body.classList.toggle("dragging", depth > 0);
      }
    });
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", (event) => {
      event.preventDefault();
      depth = 0;
      document.body.classList.remove("dragging");
      add(event.dataTransfer.files);
    });
    addEventListener("paste", (event) => {
      if (event.clipboardData.files.length) {
        event.preventDefault();
        add(event.clipboardData.files);
      }
    });
    $("theme").addEventListener("click", () => {
      const root = document.documentElement;
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      store(local, "theme", root.dataset.theme);
    });
  }

  async function start() {
    const given = new URLSearchParams(location.hash.slice(1)).get("token");
    state.token = given ?? store(session, "token") ?? "";
    if (given) {
      store(session, "token", given);
      history.replaceState(null, "", location.pathname);
    }
    setUpInput();
    for (;;) {
      try {
        state.server = await (await ask("/v1/server")).json();
        state.models = await (await ask("/v1/models")).json();
        break;
      } catch (error) {
        notice(sentence(error.message));
        await pause(2000);
      }
    }
    notice("");
    setUpViewer();
    setUpSettings();
    document.body.dataset.ready = "true";
    await recall();
  }
  start();
})();
