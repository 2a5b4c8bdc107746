// The page of the band-mask visualizer. Python decides what is shown; here it is laid out, and wishes are sent: one at a
// time, the latest next, so that of quick clicks only the last is drawn. Methods are asked when no wish is left.

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const PAGE = 8; // thumbnails
const PAUSE = 120; // ms without a wish before methods are asked

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// PNG bytes into an image, which keeps what it showed until they are there.
function load(image, bytes, then = () => {}) {
  const url = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  image.onload = () => {
    URL.revokeObjectURL(url);
    image.classList.toggle("bm-pixels", image.naturalWidth < 400); // larger ones are smoothed where they must shrink
    then();
  };
  image.src = url;
  return image;
}

function svg(label, width, height, inside) {
  return `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${label}">${inside}</svg>`;
}

function spectrum(spectra, bands, [row, column]) {
  const points = spectra.map((values, n) => [bands[n][2], ...values]);
  const values = points.flatMap(([, whole, rest]) => (whole === null ? [rest] : [whole, rest]));
  const [low, high] = [Math.min(0, ...values), Math.max(...values, 1e-6)];
  const x = (nm) => 40 + ((nm - 400) / 1850) * 395;
  const y = (value) => 150 - ((value - low) / (high - low || 1)) * 135;
  const ticks = [low, (low + high) / 2, high].map(
    (v) => `<path class="bm-grid" d="M40 ${y(v)}H435"/><text x="35" y="${y(v) + 4}" text-anchor="end">${v.toFixed(2)}</text>`);
  const names = [443, 665, 865, 1375, 1610, 2190].map(
    (nm) => `<text x="${x(nm)}" y="168" text-anchor="middle">${nm}</text>`);
  const whole = points.filter(([, value]) => value !== null);
  const line = `<path class="bm-whole" fill="none" d="M${whole.map(([nm, v]) => `${x(nm)} ${y(v)}`).join("L")}"/>`;
  const dots = whole.map(([nm, v]) => `<circle class="bm-whole" cx="${x(nm)}" cy="${y(v)}" r="4.5"/>`);
  const seen = points.map(([nm, , v, lost]) => lost
    ? `<path class="bm-lost" d="M${x(nm) - 5} ${y(v) - 5}l10 10m0 -10l-10 10"/>`
    : `<circle class="bm-seen" cx="${x(nm)}" cy="${y(v)}" r="2.5"/>`);
  const foot = `<text x="238" y="188" text-anchor="middle">wavelength in nm; reflectance</text>`;
  const label = `spectrum of pixel ${row}, ${column}`;
  return svg(label, 440, 195, [...ticks, ...names, line, ...dots, ...seen, foot].join(""));
}

function histograms({ ends, rows }, names) {
  const bars = (parts, y) => parts.map((p, n) => `M${40 + 5 * n} ${y}v${-11 * p}h5v${11 * p}z`).join("");
  const lines = rows.map(([every, visible], n) => {
    const y = 13 * n + 13;
    return `<text x="35" y="${y}" text-anchor="end">${names[n]}</text><path class="bm-whole" d="${bars(every, y)}"/>
      <path class="bm-seen" d="${bars(visible, y)}"/>`;
  });
  const foot = `<text x="40" y="188">${ends[0].toFixed(2)}</text><text x="280" y="188" text-anchor="end">
    ${ends[1].toFixed(2)}</text><text x="160" y="188" text-anchor="middle">reflectance</text>`;
  return svg("histograms of the bands", 330, 195, [...lines, foot].join(""));
}

function render({ model, el }) {
  const options = model.get("options");
  let params = model.get("shown").params; // what is wished for
  let [waiting, dirty, timer, paged] = [false, false, 0, ""];

  function send() {
    if (waiting) return;
    [waiting, dirty] = [true, false];
    model.send({ params: JSON.stringify(params) }); // which is YAML too
  }
  function want(changes) {
    params = { ...params, ...changes };
    dirty = true;
    clearTimeout(timer);
    fill();
    send();
  }
  const hidden = () => (params.mask === "none" ? [] : params.mask.split(" "));
  const hide = (names) => want({ mask: names.join(" ") || "none" });
  function toggle(names) {
    const now = hidden();
    const all = names.every((name) => now.includes(name));
    hide(all ? now.filter((name) => !names.includes(name)) : [...new Set([...now, ...names])]);
  }

  // --- controls, each with what brings it to `params`
  const fills = [];
  const button = (text, title, onclick) => make("button", { type: "button", textContent: text, title, onclick });
  function labelled(text, control, read) {
    fills.push(() => { if (!control.dataset.typing) control.value = read(); });
    control.ariaLabel = text; // the options of a select are part of its label's words
    return make("label", {}, `${text} `, control);
  }
  function number(text, read, onnumber, properties = {}) {
    const field = make("input", { type: "number", step: "any", ...properties });
    field.oninput = () => { field.dataset.typing = "an answer that comes now must not overwrite it"; };
    field.onchange = () => {
      delete field.dataset.typing;
      return Number.isFinite(field.valueAsNumber) ? onnumber(field.valueAsNumber) : fill();
    };
    return labelled(text, field, read);
  }
  function choice(text, groups, read, onpick) {
    const select = make("select", { onchange: () => onpick(select.value) });
    for (const [head, entries] of groups) {
      const inside = entries.map(([value, label]) => make("option", { value, textContent: label }));
      select.append(...(head ? [make("optgroup", { label: head }, ...inside)] : inside));
    }
    return labelled(text, select, read);
  }
  const plain = (names) => [["", names.map((name) => [name, name])]];
  const labels = Object.fromEntries(options.bands);
  const toggles = options.bands.map(([name, label]) => {
    const press = button(label, "", () => toggle([name]));
    fills.push(() => {
      press.ariaPressed = String(!hidden().includes(name));
      press.title = `${name} is ${hidden().includes(name) ? "hidden" : "visible"}`;
    });
    return press;
  });
  const groups = Object.entries(options.groups).map(([name, inside]) =>
    button(name, `hide or show ${inside.join(" ")}`, () => toggle(inside)));
  const sets = Object.entries(options.thesis).map(([name, inside]) => [inside.join(" "), `${name} = ${inside.join(" ")}`]);
  const text = make("textarea", { rows: 11, spellcheck: false, ariaLabel: "parameters" });
  const copy = () => navigator.clipboard?.writeText(text.value).catch(() => {});
  const at = (n) => () => model.get("shown").pixel[n];
  const moved = (n) => (value) => want({ pixel: model.get("shown").pixel.map((old, m) => (m === n ? value : old)) });
  const ends = (n) => (value) => want({ stretch: params.stretch.map((old, m) => (m === n ? value : old)) });

  // --- which image
  let only = -1; // of one class; −1 of all
  const rows = () => options.labels.map((_, row) => row).filter((row) => only < 0 || options.labels[row] === only);
  const go = (image_row) => want({ image_row, pixel: [] });
  function step(by) {
    const there = rows();
    const next = there.indexOf(params.image_row) + by;
    go(there[(next + there.length) % there.length]);
  }
  function random() {
    const others = rows().filter((row) => row !== params.image_row);
    if (others.length) go(others[Math.floor(Math.random() * others.length)]);
  }
  function classed(value) {
    only = Number(value);
    if (!rows().includes(params.image_row)) go(rows()[0]);
    else fill();
  }
  const nameOf = (row) => options.classes[options.labels[row]] ?? "";
  const some = options.classes.map((name, n) => [n, name]).filter(([n]) => options.labels.includes(n));
  const strip = make("div", { className: "bm-strip" });
  const said = make("div", { role: "alert", className: "bm-said" });
  const truth = make("b");
  function page() {
    const there = rows();
    const start = Math.floor(Math.max(there.indexOf(params.image_row), 0) / PAGE) * PAGE;
    const thumbnails = there.slice(start, start + PAGE);
    if (paged !== String(thumbnails)) {
      paged = String(thumbnails);
      strip.replaceChildren();
      if (String(Object.keys(model.get("thumbnails"))) !== paged) model.send({ thumbnails });
    }
    thumbs();
  }
  function thumbs() {
    const pictures = Object.entries(model.get("thumbnails"));
    if (!strip.children.length && String(pictures.map(([row]) => row)) === paged) {
      strip.append(...pictures.map(([row, png]) => {
        const title = `image ${row} ${nameOf(row)}`.trim();
        return make("button", { type: "button", value: row, title, onclick: () => go(Number(row)) }, load(make("img", { alt: title }), png));
      }));
    }
    for (const press of strip.children) press.ariaCurrent = String(Number(press.value) === params.image_row);
  }

  // --- what is shown
  const head = make("h4", { className: "bm-text" });
  const views = make("div", { className: "bm-panels" });
  const plots = make("div", { className: "bm-plots" });
  const table = make("table", { className: "bm-effect" });
  const note = make("div");
  function pointed(event) {
    const { size: [height, width] } = model.get("shown");
    const box = event.target.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * event.target.naturalHeight) % height;
    want({ pixel: [row, Math.min(Math.floor(((event.clientX - box.left) / box.width) * width), width - 1)] });
  }
  function keyed(event) {
    if (!(event.key in ARROWS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const { size, pixel } = model.get("shown");
    const from = params.pixel.length ? params.pixel : pixel;
    const by = ARROWS[event.key].map((one) => one * (event.shiftKey ? 10 : 1));
    want({ pixel: from.map((value, n) => Math.min(Math.max(value + by[n], 0), size[n] - 1)) });
  }
  const panels = model.get("shown").panels.map(({ name }) => {
    const image = make("img", { tabIndex: name === "incomplete" ? 0 : -1, onclick: pointed, onkeydown: keyed });
    const [words, marks, key] = ["", "", "bm-scale"].map((className) => make("div", { className }));
    views.append(make("div", {}, make("b", { textContent: name }), words, make("div", { className: "bm-frame" }, image, marks), key));
    return ({ note, png, scale }, { size: [height, width], pixel: [row, column], text }) => {
      words.textContent = note;
      image.alt = `${name}: ${note}; ${text}`;
      load(image, png, () => {
        const times = Math.round(image.naturalHeight / height); // Figure 3.1 has the image three times
        marks.replaceChildren(...Array.from({ length: times }, (_, n) => make("i", {
          style: `left: ${((column + 0.5) / width) * 100}%; top: ${((row + n * height + 0.5) / image.naturalHeight) * 100}%`,
        })));
      });
      const bar = scale && load(make("img", { alt: "" }), scale.png);
      key.replaceChildren(...(scale ? [scale.ends[0], bar, scale.ends[1]] : []));
    };
  });
  function draw() {
    const shown = model.get("shown");
    head.textContent = shown.text;
    panels.forEach((show, n) => show(shown.panels[n], shown));
    plots.innerHTML = `<div><b>spectrum of pixel (${shown.pixel.join(", ")})</b> <span class="bm-key"><i class="bm-whole"></i>
      complete <i class="bm-seen"></i>visible <i class="bm-lost"></i>hidden</span>
      ${spectrum(shown.spectrum, options.bands, shown.pixel)}</div>
      <div><b>histograms</b>: visible pixels before all, in grey${histograms(shown.histograms, Object.keys(labels))}</div>`;
    said.textContent = shown.said && `⚠ ${shown.said}`;
  }
  function judge() {
    const [shown, judged] = [model.get("shown"), model.get("judged")];
    const cells = (tag, ...texts) => make("tr", {}, ...texts.map((text) => make(tag, { textContent: text })));
    table.replaceChildren(cells("th", "method", "cosine to complete", "predicted class"));
    clearTimeout(timer);
    if (judged.of === shown.judged) {
      for (const { method, similarity, predicted, probability } of judged.readings) {
        const chance = predicted ? `${predicted} (${Math.round(100 * probability)}%)` : "no head";
        const line = cells("td", method, similarity.toFixed(3), chance);
        if (predicted !== judged.readings[0].predicted) line.lastChild.append(make("b", { role: "alert", textContent: " ⚠ flips", title: "another class than that of the complete image" }));
        table.append(line);
      }
      note.textContent = judged.note;
    } else {
      note.textContent = judged.of ? "computing …" : "loading encoders, computing …";
      timer = setTimeout(() => waiting || model.send({ judge: true }), PAUSE);
    }
  }
  function fill() {
    fills.forEach((bring) => bring());
    text.value = Object.entries(model.get("shown").params).map(([name, value]) => `${name}: ${JSON.stringify(value)}`).join("\n");
    truth.textContent = nameOf(params.image_row) && `class: ${nameOf(params.image_row)}`;
    page();
  }
  function answer() {
    waiting = false;
    if (dirty) send();
    else params = model.get("shown").params;
    draw();
    fill();
    judge();
  }

  const section = (title, ...inside) => make("section", {}, make("h4", { textContent: title }), ...inside);
  const row = (...inside) => make("div", { className: "bm-row" }, ...inside);
  const every = Object.entries(options.views).map(([mode, names]) => [mode, names.map((name) => [name, labels[name] ?? name])]);
  const last = options.labels.length - 1;
  const more = make("details", {}, make("summary", { textContent: "Mask sets of the thesis, stretch, pixel, parameters" }),
    row(choice("mask set", [["", [["", "as pressed above"], ["none", "none"], ...sets]]],
      () => (sets.some(([value]) => value === params.mask) || params.mask === "none" ? params.mask : ""),
      (value) => value && want({ mask: value }))),
    row(number("stretch % from", () => params.stretch[0], ends(0)), number("to", () => params.stretch[1], ends(1)),
      number("pixel row", at(0), moved(0)), number("column", at(1), moved(1))),
    row(button("copy as params", "parameters of the notebooks, for papermill -f", copy),
      button("read params", "show what the parameters in the text say", () => { waiting = true; model.send({ params: text.value }); })),
    text);
  const values = `bm-${Math.random()}`;
  el.classList.add("bandmask");
  el.append(make("div", { className: "bm-page" },
    make("div", { className: "bm-views" }, head, views),
    plots,
    make("div", { className: "bm-side" },
      section("Image",
        row(strip),
        row(button("previous", "the image before", () => step(-1)), button("next", "the next image", () => step(1)),
          button("random", "any other image", random),
          choice("of", [["", [[-1, "all classes"], ...some]]], () => only, classed),
          number("image row", () => params.image_row, go, { step: 1, title: `0 to ${last}` }), truth),
        said),
      section("What each method makes of it", table, note),
      section("Bands: press to hide or show", row(...toggles)),
      section("Groups of bands", row(...groups)),
      section("How they are hidden, and what is shown",
        row(number("ratio", () => params.mask_ratio, (mask_ratio) => want({ mask_ratio }), { type: "range", min: 0.01, max: 1, step: 0.01 }),
          choice("shape", plain(options.shapes), () => params.mask_shape, (mask_shape) => want({ mask_shape })),
          choice("value", plain(options.values), () => params.mask_value, (mask_value) => want({ mask_value })),
          number("seed", () => params.mask_seed, (mask_seed) => want({ mask_seed }), { step: 1, min: 0 }),
          button("resample", "the next seed: another draw of the mask", () => want({ mask_seed: params.mask_seed + 1 })),
          choice("show", every, () => params.view, (view) => want({ view })),
          button("reset", "what was shown at first", () => want(options.first)))),
      more)));

  model.on("change:shown", answer);
  model.on("change:judged", judge);
  model.on("change:thumbnails", thumbs);
  draw();
  fill();
  judge();
  return () => {
    clearTimeout(timer);
    model.off("change:shown", answer);
    model.off("change:judged", judge);
    model.off("change:thumbnails", thumbs);
  };
}

// A page of Voilà that is closed ends its kernel, and with it a gigabyte of models.
function initialize() {
  const config = document.body.dataset.voila && document.getElementById("jupyter-config-data");
  if (!config) return;
  const { baseUrl, kernelId } = JSON.parse(config.textContent);
  window.addEventListener("pagehide", () => navigator.sendBeacon(`${baseUrl}voila/api/shutdown/${kernelId}`));
}

export default { initialize, render };
