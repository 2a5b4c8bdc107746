"""The visualizer in a real browser: JupyterLab runs the notebook, Voilà serves the widget, Chromium clicks and types.

Needs a Chromium or Chrome on this machine (Debian: `apt-get install chromium`) and the package `playwright`, without
its own browsers; skipped by name where either is missing. Screenshots go to `outputs/screens/`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bandmask import encoders, evaluation, files, viewer
from bandmask.heads import SceneHeads
from bandmask.masks import MaskSpec, fill_values, mask_batch
from bandmask.packs import Pack
from bandmask.train import weights_checksum
from bandmask.viewer import State

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser tests")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine: no browser tests"),
]
ROOT, SCREENS = files.project_root(), files.project_root() / "outputs" / "screens"
PATIENCE = 240_000  # ms; a start of Jupyter and torch on a busy machine takes minutes
PICTURE = "img[alt*='bands visible']"
ELSEWHERE = "cdn.jsdelivr.net"  # Voilà would ask there for icons; our header forbids it, and the browser says so


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        chromium = started.chromium.launch(executable_path=BROWSER, args=arguments)
        yield chromium
        chromium.close()


@contextmanager
def serving(
    command: Callable[[int], list[str]], path: str, log: Path, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """A server on a free port of localhost, until the block ends; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        given = {**os.environ, **(environment or {})}
        process = subprocess.Popen(command(port), cwd=ROOT, env=given, stdout=out, stderr=subprocess.STDOUT)
        try:
            _wait_for(address + path, process, log)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(url, timeout=2)
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(f"{url}: {log.read_text()[-2000:]}")


def voila_command(port: int) -> list[str]:
    config = f'--Voila.config_file_paths=["{ROOT / "notebooks" / "voila"}"]'
    quick = ["--MappingKernelManager.cull_interval=2", "--MappingKernelManager.cull_idle_timeout=20"]
    notebook = ROOT / "notebooks" / "voila" / "viewer.ipynb"
    return [sys.executable, "-m", "voila", "--no-browser", f"--port={port}", config, *quick, str(notebook)]


@pytest.fixture(scope="module")
def voila(tmp_path_factory: pytest.TempPathFactory, sample_pack) -> Iterator[str]:
    with serving(voila_command, "/voila/static/", tmp_path_factory.mktemp("voila") / "log") as address:
        yield address


class Page:
    """A page that keeps what its console says, and looks at the picture as a person does: on the screen."""

    def __init__(self, browser: playwright.Browser, address: str, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 1500}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.asked: set[str] = set()
        self.page.on("requestfinished", lambda request: self.asked.add(request.url.split("/")[2]))
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address, wait_until="commit", timeout=PATIENCE)

    def _heard(self, message: playwright.ConsoleMessage) -> None:
        if message.type == "error" and ELSEWHERE not in message.text + message.location.get("url", ""):
            self.errors.append(f"{message.text} ({message.location.get('url')})")

    def picture(self) -> np.ndarray:
        self.page.wait_for_selector(PICTURE, timeout=PATIENCE)
        self.page.wait_for_function(f'document.querySelector("{PICTURE}").complete', timeout=PATIENCE)
        return np.asarray(Image.open(io.BytesIO(self.page.locator(PICTURE).screenshot())).convert("RGB")).astype(int)

    def said(self) -> str:
        return str(self.page.locator(PICTURE).get_attribute("alt"))

    def after(self, act: Callable[[], object], word: str = "") -> np.ndarray:
        """The picture that an act brings about."""
        image = self.page.locator(PICTURE)
        before = image.get_attribute("src")
        act()
        self.page.wait_for_function(f"document.querySelector(\"{PICTURE}\").src !== '{before}'", timeout=PATIENCE)
        if word:
            self.page.wait_for_selector(f"img[alt*='{word}']", timeout=PATIENCE)
        time.sleep(0.3)  # until it is painted
        return self.picture()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def keep(self, name: str) -> None:
        SCREENS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENS / f"{name}.png", full_page=True)


def part(picture: np.ndarray, place: int) -> np.ndarray:
    """Complete (0), incomplete (1) or difference (2) in a picture as large as the screen shows it."""
    width, high, _ = viewer._panel("true colour", (64, 64))
    scale, left = picture.shape[1] / viewer.WIDTH, viewer.LEFTS[place]
    rows = slice(round(viewer.TOP * scale) + 3, round((viewer.TOP + high) * scale) - 3)
    return picture[rows, round(left * scale) + 3 : round((left + width) * scale) - 3]


def same(first: np.ndarray, second: np.ndarray, place: int) -> bool:
    return bool((part(first, place) == part(second, place)).all())


@pytest.fixture
def page(browser: playwright.Browser, voila: str) -> Iterator[Page]:
    opened = Page(browser, voila)
    opened.picture()
    yield opened
    assert opened.errors == []
    opened.context.close()


def test_a_band_toggled_and_a_slider_moved_change_the_right_half_only(page: Page) -> None:
    first = page.picture()
    assert "10 of 13 bands visible" in page.said()
    page.keep("voila_light")
    shown = page.after(lambda: page.press("B02 · blue · 490 nm"), "11 of 13")
    assert same(first, shown, 0)
    assert not same(first, shown, 1)
    assert not same(first, shown, 2)
    handle = page.page.locator(".widget-slider, .jupyter-widget-slider").first.locator(".noUi-handle")
    handle.focus()
    moved = page.after(lambda: page.page.keyboard.press("ArrowLeft"))
    assert same(shown, moved, 0)
    assert not same(shown, moved, 1)
    assert "mask_ratio: 0.89" in page.page.locator("textarea").input_value()


def test_no_other_host_is_asked_and_what_one_wants_to_see_is_above_the_fold(page: Page, voila: str) -> None:
    assert {host for host in page.asked if host} == {voila.removeprefix("http://")}
    page.page.set_viewport_size({"width": 1440, "height": 800})
    image = page.page.locator(PICTURE).bounding_box()
    for words in ("class: bare or sparse", "What encoders make of it", "image row"):
        box = page.page.get_by_text(words).first.bounding_box()
        assert box["y"] + box["height"] < 800
        assert box["x"] >= image["x"] + image["width"]
    page.keep("voila_1440")
    page.page.set_viewport_size({"width": 390, "height": 800})
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_an_image_that_is_not_there_is_said(page: Page) -> None:
    field = page.page.get_by_label("image row")
    field.fill("99999")
    field.press("Enter")
    page.page.get_by_role("alert").get_by_text("image 99999 is not there").wait_for(timeout=PATIENCE)
    assert field.input_value() == "40"


def test_a_page_that_is_closed_ends_its_kernel(browser: playwright.Browser, tmp_path: Path, sample_pack) -> None:
    with serving(voila_command, "/voila/static/", log := tmp_path / "log") as address:
        page = Page(browser, address)
        page.picture()
        page.page.goto("about:blank")
        for _ in range(100):
            if ended := "Kernel shutdown" in log.read_text():
                break
            time.sleep(0.5)
        assert ended
        assert not re.search(r"\b403 [A-Z]+ /", log.read_text())  # a request refused, not a kernel's name
        page.context.close()


def test_groups_thesis_sets_resample_and_reset(page: Page) -> None:
    first = page.picture()
    page.after(lambda: page.press("thesis B8 B9 B10 B11 B12"), "8 of 13")
    page.after(lambda: page.press("visible"), "5 of 13")
    drawn = page.after(lambda: page.press("resample"))
    assert same(first, drawn, 0)
    back = page.after(lambda: page.press("reset"), "10 of 13")
    assert all(same(first, back, place) for place in range(3))


def test_a_hidden_band_of_a_composite_is_dark_and_named(page: Page) -> None:
    page.after(lambda: page.press("visible"), "13 of 13")
    box = page.page.get_by_label("ratio").or_(page.page.locator(".widget-readout")).first
    box.click()
    page.page.keyboard.press("Control+a")
    page.page.keyboard.type("1")
    page.page.keyboard.press("Enter")
    picture = page.after(lambda: page.press("B04 · red · 665 nm"), "12 of 13")
    assert "hidden: B04 100%" in page.said()
    ring = part(picture, 1)
    assert (ring[: len(ring) // 3, :, 0] == 0).all(), "no red light, and nobody else's either"
    assert ring[..., 1].max() > 100
    page.keep("hidden_band_composite")


def test_a_click_and_the_keyboard_alone_move_the_pixel(page: Page) -> None:
    image = page.page.locator(PICTURE)
    box = image.bounding_box()
    assert box is not None
    width, high, _ = viewer._panel("true colour", (64, 64))
    place = {
        "x": box["width"] * (viewer.LEFTS[1] + width * 10.5 / 64) / viewer.WIDTH,
        "y": box["height"] * (viewer.TOP + high * 20.5 / 64) / (high + 440),
    }
    page.after(lambda: image.click(position=place))
    rows = page.page.get_by_label("pixel row"), page.page.get_by_label("column")
    assert [field.input_value() for field in rows] == ["20", "10"]
    image.focus()
    page.after(lambda: page.page.keyboard.press("ArrowDown"))
    page.after(lambda: page.page.keyboard.press("Shift+ArrowRight"))
    assert [field.input_value() for field in rows] == ["21", "20"]


def test_every_control_is_reached_by_tab_and_toggled_by_the_space_bar(page: Page) -> None:
    page.page.get_by_role("button", name="composite", exact=True).focus()
    reached = []
    for _ in range(80):
        page.page.keyboard.press("Tab")
        reached.append(
            page.page.evaluate("(document.activeElement.textContent || document.activeElement.alt || '').trim()")
        )
    for name in (
        "B01 · coastal · 443 nm",
        "B12 · swir22 · 2190 nm",
        "SWIR",
        "thesis B2 B11",
        "resample",
        "read params",
    ):
        assert name in reached
    assert any("bands visible" in name for name in reached)
    page.page.get_by_role("button", name="B05 · rededge1 · 705 nm", exact=True).focus()
    page.after(lambda: page.page.keyboard.press("Space"), "9 of 13")


def test_copied_params_come_back(page: Page) -> None:
    page.after(lambda: page.press("SWIR"), "8 of 13")
    text = page.page.locator("textarea").input_value()
    assert "mask: B02 B03 B04 B11 B12" in text
    assert State.from_yaml(text).mask == ("B02", "B03", "B04", "B11", "B12")
    page.after(lambda: page.press("reset"), "10 of 13")
    page.page.locator("textarea").fill(text)
    page.page.locator("textarea").blur()
    page.after(lambda: page.press("read params"), "8 of 13")


def test_the_picture_follows_a_dark_page(browser: playwright.Browser, voila: str) -> None:
    dark = Page(browser, f"{voila}/?theme=dark")
    dark.picture()
    dark.page.wait_for_function("document.body.dataset.jpThemeLight === 'false'", timeout=PATIENCE)
    for _ in range(100):
        if dark.picture()[0, 0].max() < 60:
            break
        time.sleep(0.2)
    assert dark.picture()[0, 0].max() < 60
    dark.keep("voila_dark")
    assert dark.errors == []
    dark.context.close()


def judged(folder: Path, pack: Pack) -> None:
    """Real files of an encoder and a head; the head tells this incomplete image from the complete one, so it flips."""
    model = encoders.create_encoder("resnet18").eval()
    encoders.save_encoder(model, encoders.Card("tiny", "resnet18", image_size=64), folder / "encoder")
    complete = torch.tensor(np.asarray(pack.images[40]) / 10_000, dtype=torch.float32)[None]
    spec = MaskSpec(("B02", "B03", "B04"), 0.9)
    fill = fill_values("dataset_mean", torch.tensor(pack.band_means()))
    with torch.no_grad():
        before, after = model(complete), model(mask_batch(complete, torch.tensor([40]), spec, fill))
        head = SceneHeads(before.shape[1], len(pack.classes), (0,), hidden=1)
        way = torch.nn.functional.normalize(after - before)[0]
        scale = 10 / float((after - before).norm())
        head.weight1.copy_((scale * way)[None, :, None])
        head.bias1.fill_(-scale * float((before + after)[0] @ way) / 2)
        head.weight2.zero_()[0, 0, 1], head.bias2.zero_()[0, 0, 0] = 1.0, 2.0
    made = {"seeds": [0], "encoder": weights_checksum(model)}
    evaluation.write_in_service(folder / "in_service" / "classification", head, made)


def test_a_prediction_that_flips_is_warned_of(
    browser: playwright.Browser, tmp_path: Path, outputs: Path, sample_pack: Pack
) -> None:
    judged(tmp_path / "sample", sample_pack)
    (tmp_path / "packs").symlink_to(outputs / "packs")
    with serving(voila_command, "/voila/static/", tmp_path / "log", {"BANDMASK_OUTPUTS": str(tmp_path)}) as address:
        page = Page(browser, address)
        page.picture()
        page.page.get_by_role("alert").get_by_text("the prediction flips").wait_for(timeout=PATIENCE)
        page.keep("flip_warning")
        page.after(lambda: page.press("visible"), "13 of 13")
        page.page.wait_for_function("!document.body.innerText.includes('the prediction flips')", timeout=PATIENCE)
        assert page.errors == []
        page.context.close()


def run_all_cells(page: playwright.Page) -> None:
    """Again until a cell is queued: on a busy machine a kernel calls itself idle before it listens."""
    queued = page.locator(".jp-InputPrompt", has_text=re.compile(r"\[(\*|\d+)\]"))
    for _ in range(12):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        with contextlib.suppress(playwright.TimeoutError):
            return queued.first.wait_for(state="attached", timeout=PATIENCE / 12)
    raise AssertionError("no cell was queued")


def test_the_notebook_runs_top_to_bottom_in_jupyterlab(
    browser: playwright.Browser, tmp_path: Path, sample_pack
) -> None:
    shutil.copy(ROOT / "notebooks" / "02_band_visualization.ipynb", tmp_path)

    def command(port: int) -> list[str]:
        options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=", "--ip=127.0.0.1"]
        return [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={tmp_path}"]

    with serving(command, "/api", tmp_path / "log") as address:
        lab = Page(browser, f"{address}/lab/tree/02_band_visualization.ipynb")
        news = lab.page.get_by_role("button", name="No", exact=True)  # Jupyter may ask whether to fetch its news
        lab.page.add_locator_handler(news, lambda button: button.click())
        lab.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=PATIENCE)
        lab.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=PATIENCE)
        run_all_cells(lab.page)
        lab.page.wait_for_selector("text=cloud: share hidden over 2000 images 0.90", timeout=PATIENCE)
        lab.page.mouse.move(700, 700)
        while not lab.page.locator(PICTURE).is_visible():  # the cell run last is in view, others are not even drawn
            lab.page.mouse.wheel(0, -600)
            time.sleep(0.5)
        lab.page.locator(PICTURE).scroll_into_view_if_needed()
        first = lab.picture()
        shown = lab.after(lambda: lab.press("B02 · blue · 490 nm"), "11 of 13")
        assert same(first, shown, 0)
        assert not same(first, shown, 1)
        lab.keep("jupyterlab")
        assert lab.page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        assert lab.errors == []
        lab.context.close()
