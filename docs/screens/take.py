"""Take the pictures in this folder anew, but that of the viewer, which tests/browser leaves in outputs/screens.

`make site && python docs/screens/take.py outputs/notebooks/sample/06_results.html`, with the page of the report.
"""

import shutil
import sys
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image
from playwright.sync_api import sync_playwright

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
SITE, README = ROOT / "outputs" / "site", ROOT / ".README.html"  # beside its pictures
PAGES = {  # what is seen, from which heading on, and how many pixels further down
    "site": (SITE / "docs" / "index.html", "", 0),
    "notebook_01": (SITE / "notebooks" / "01_data_exploration.html", "#one-image-of-each-class", 0),
    "notebook_09": (SITE / "notebooks" / "09_robustness_map.html", "#the-exact-map-recorded", 560),
    "notebook_12": (SITE / "notebooks" / "12_model_in_service.html", "#one-line-before-the-model", 0),
    "readme": (README, "", 0),
    "report": (Path(sys.argv[1]).resolve(), "", 0),
}
STYLE = "<style>body {font: 16px/1.5 sans-serif; max-width: 860px; margin: 32px auto} img {max-width: 100%}"
STYLE += " td {padding: 2px 8px}</style>"

page_of = MarkdownIt("commonmark").enable("table").render((ROOT / "README.md").read_text(encoding="utf-8"))
README.write_text(f"<!doctype html><meta charset='utf-8'>{STYLE}{page_of}", encoding="utf-8")
with sync_playwright() as browsers:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    browser = browsers.chromium.launch(executable_path=found, args=["--no-sandbox"])
    for name, (path, anchor, further) in PAGES.items():
        height = 1350 if name == "report" else 900
        page = browser.new_page(viewport={"width": 1080, "height": height})
        page.goto(path.as_uri() + anchor)
        page.wait_for_function("[...document.images].every((image) => image.complete)")
        page.wait_for_timeout(2000)  # until it has scrolled to the heading
        page.evaluate(f"window.scrollBy({{top: {further}, behavior: 'instant'}})")
        page.screenshot(path=HERE / f"{name}.png")
        picture = Image.open(HERE / f"{name}.png").convert("RGB").resize((900, height * 900 // 1080))
        picture.quantize(128, dither=Image.Dither.NONE).save(HERE / f"{name}.png", optimize=True)
README.unlink()
