// The picture of the band-mask visualizer: shows a PNG, reports clicks and arrow keys, tells which theme is in use.
// It draws nothing itself; places are parts of the width and height, 0 to 1 from the upper left corner.

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

// JupyterLab and Voilà say on <body> whether their theme is light; elsewhere the system's preference counts.
function isDark() {
  const theme = document.body.dataset.jpThemeLight;
  if (theme !== undefined) return theme === "false";
  return window.matchMedia("(prefers-color-scheme: dark)").matches;
}

function render({ model, el }) {
  const image = document.createElement("img");
  image.tabIndex = 0;
  image.style.cssText = "max-width: 100%; height: auto; display: block; cursor: crosshair";
  el.appendChild(image);

  let url = "";
  function show() {
    const old = url;
    url = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    image.src = url;
    image.alt = model.get("alt");
    if (old) URL.revokeObjectURL(old);
  }

  image.addEventListener("click", (event) => {
    const box = image.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    model.send({ type: "click", x, y });
  });
  image.addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const [down, right] = ARROWS[event.key].map((step) => step * (event.shiftKey ? 10 : 1));
    model.send({ type: "move", down, right });
  });

  function theme() {
    if (model.get("dark") === isDark()) return;
    model.set("dark", isDark());
    model.save_changes();
  }
  const watcher = new MutationObserver(theme);
  watcher.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  function message(sent) {
    if (sent.copy && navigator.clipboard) navigator.clipboard.writeText(sent.copy).catch(() => {});
  }

  model.on("change:png", show);
  model.on("msg:custom", message);
  show();
  theme();
  return () => {
    watcher.disconnect();
    model.off("change:png", show);
    model.off("msg:custom", message);
    URL.revokeObjectURL(url);
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
