"""Tidy results: one row a measurement, kept as Parquet; tables for reading and for papers; what to do about a loss."""

import base64
import io
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from bandmask import bands, files, params, stats

COLUMNS = (  # of the encoder its name on the card; of bands the ESA names of what was really hidden
    *("experiment", "dataset", "encoder", "mask", "scheme", "bands", "ratio", "mask_value", "schedule", "shape"),
    *("task", "protocol", "method", "encoder_seed", "head_seed", "split", "epoch", "metric", "value"),
)
SETTINGS = ("experiment", "dataset", "encoder", "scheme", "ratio", "mask_value", "schedule", "shape")
METHODS = ("pre-trained", "ridge", "fine-tuned")
# which notebook does which task of a run
MAKERS = {"alignment": "03_fine_tuning", **{task: names[0] for task, names in params.TASK_FILES.items()}}
ABSENT = "–"
_POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; font-src data:;
style-src 'unsafe-inline'">"""
RECOMMENDED = files.RECORDS / "recommend.csv"  # made by notebook 11, with report docs/findings


def tidy(measurements: Iterable[Mapping[str, Any]], **common: Any) -> pd.DataFrame:
    """Rows of the results table, from what differs and what all share; a ValueError of a column it doesn't have."""
    rows = [{**common, **row} for row in measurements]
    if unknown := {key for row in rows for key in row} - set(COLUMNS):
        raise ValueError(f"unknown result column {sorted(unknown)}; available: {', '.join(COLUMNS)}")
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in ("encoder_seed", "head_seed", "epoch"):
        table[column] = table[column].astype("Int64")
    return table.astype({"value": float, "ratio": float}).astype({"mask_value": str})


def write_table(table: pd.DataFrame, path: Path | str) -> Path:
    """Write Parquet, whole or not at all."""
    with files.writing(path) as partial:
        table.to_parquet(partial, index=False)
    return Path(path)


def read_table(path: Path | str) -> pd.DataFrame:
    """Read Parquet; the old words for protocols are read as today's."""
    table = pd.read_parquet(path)
    old = {"transfer": "kept", "thesis": "retrained"}
    if "protocol" in table and isinstance(table["protocol"].dtype, pd.CategoricalDtype):
        table["protocol"] = table["protocol"].cat.rename_categories(old)
    elif "protocol" in table:
        table["protocol"] = table["protocol"].replace(old)
    return table


def collect(
    folders: Sequence[Path | str], names: Sequence[str], each: Callable[[pd.DataFrame], pd.DataFrame] = pd.DataFrame
) -> pd.DataFrame:
    """The tables of all finished runs of experiments, `<folder>/<mask>/<name>`, the one that counts first in front.

    A table that its record does not vouch for is named in a warning and left out. `each` is done to each table before
    they are joined, such as `by_group` to pixel predictions, which would not fit in memory together. A
    FileNotFoundError where not one run of the first experiment has finished.
    """
    found = []
    for folder in folders:
        for path in (path for name in names for path in sorted(Path(folder).glob(f"*/{name}"))):
            if why := files.distrust(path):
                warnings.warn(f"{path} is left out: {why}; `make run` makes it again", stacklevel=2)
            else:
                found.append(each(read_table(path)))
        if not found:
            makers = ", ".join(f"notebooks/{name}.ipynb" for name in MAKERS.values())
            raise FileNotFoundError(f"no finished run below {folder}. Make one first: {makers}, or `make demo`")
    return pd.concat(found, ignore_index=True)


def score_predictions(predictions: pd.DataFrame, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Scores of each run in a predictions table, as measurements for `tidy`.

    Predictions are `label` and `predicted` of each image, scored by overall and macro accuracy; or, with a column
    `pixels`, how many of an image have these two, scored by all that `stats.scores` gives.
    """
    import torch

    count, wanted = len(classes), None if "pixels" in predictions else stats.METRICS[:2]
    keys = [c for c in predictions.columns if c not in ("sample", "label", "predicted", "pixels", "group", "images")]
    measurements = []
    for values, run in predictions.groupby(keys, dropna=False):
        cell = run["label"].to_numpy(int) * count + run["predicted"].to_numpy(int)
        pixels = run["pixels"].to_numpy(float) if "pixels" in run else None  # exact up to 2⁵³ pixels
        counts = torch.from_numpy(np.bincount(cell, pixels, minlength=count * count)).view(count, count)
        found, described = stats.scores(counts, classes), dict(zip(keys, values, strict=True))
        measurements += [{**described, "metric": name, "value": found[name]} for name in wanted or found]
    return measurements


def accuracy_table(table: pd.DataFrame, metric: str = "overall_accuracy", task: str = "classification") -> pd.DataFrame:
    """For reading: a row a mask, setting that differs and protocol, a column a method, `mean ± SD` in percent."""
    rows = table[(table["metric"] == metric) & (table["split"] == "test") & (table["task"] == task)]
    settings = [c for c in SETTINGS if c in rows and rows[c].nunique() > 1]
    keys = ["mask", "bands", *settings, "protocol"]
    columns = ["mask", "hidden bands", *settings, "protocol"]
    if rows.empty:
        return pd.DataFrame(columns=[*columns, *METHODS])
    summary = 100 * rows.groupby([*keys, "method"], sort=False, dropna=False)["value"].agg(["mean", "std"])
    text = [f"{mean:.1f}" + ("" if np.isnan(sd) else f" ± {sd:.1f}") for mean, sd in summary.itertuples(index=False)]
    wide = summary.assign(text=text).reset_index().pivot(index=keys, columns="method", values="text")
    others = [method for method in wide.columns if method not in METHODS]  # such as the published model
    wide = wide.reindex(columns=[*METHODS, *others]).astype(object).fillna(ABSENT).reset_index()
    wide["mask"] = pd.Categorical(wide["mask"], mask_order(wide["mask"]))
    wide["protocol"] = wide["protocol"].map(stats.PROTOCOLS)
    wide = wide.sort_values(["mask", *settings, "protocol"]).astype({"mask": str}).rename(columns={"bands": columns[1]})
    return wide.rename_axis(columns=None).reset_index(drop=True)


def with_interval(value: float, low: float, high: float, digits: int = 1, *, plus: bool = True) -> str:
    """`+1.2 [−0.3, +2.7]`; without the brackets where one run has no interval (NaN)."""
    texts = [f"{figure:+.{digits}f}" for figure in (value, low, high)]  # what rounds to zero has no sign
    bare = [float(text) == 0 or (text[0] == "+" and not plus) for text in texts]
    texts = [text[1:] if short else text.replace("-", "−") for text, short in zip(texts, bare, strict=True)]
    return texts[0] if np.isnan(low) else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def mask_order(masks: Iterable[str]) -> list[str]:
    """Mask sets in the thesis' order, others after them by name."""
    found = set(masks)
    return [m for m in bands.THESIS_MASKS if m in found] + sorted(found - set(bands.THESIS_MASKS))


def plain(text: object) -> str:
    """A name from a file or a user as text that stays text in Markdown and HTML."""
    marks: dict[str, str | int | None] = {"<": "&lt;", ">": "&gt;", "|": r"\|", "\n": " ", "`": r"\`"}
    return str(text).translate(str.maketrans(marks))


def markdown(frame: pd.DataFrame) -> str:
    """A table for reading, without index; its words are text whatever stands in them."""
    return frame.rename(columns=plain).map(plain).to_markdown(index=False, disable_numparse=True)


def export_table(frame: pd.DataFrame, stem: Path | str) -> None:
    """Write a table without index as `<stem>.csv`, `.tex` (needs `booktabs`) and `.md`."""
    csv = frame.to_csv(index=False, lineterminator="\n")
    for suffix, text in (("csv", csv), ("tex", to_latex(frame)), ("md", markdown(frame) + "\n")):
        with files.writing(f"{stem}.{suffix}") as partial:
            partial.write_text(text, encoding="utf-8")


def to_latex(frame: pd.DataFrame) -> str:
    """A `tabular` with booktabs' rules; special characters are escaped, numbers stand to the right."""
    style = frame.style.hide(axis="index").format(str, na_rep=ABSENT, escape="latex")
    text = style.format_index(str, axis=1, escape="latex").to_latex(hrules=True)
    signs: dict[str, str | int | None] = {"–": "--", "−": "$-$", "<": "$<$", ">": "$>$", "±": r"$\pm$"}
    signs |= {"×": r"$\times$", "→": r"$\to$"}
    signs |= {"[": "{[}", "]": "{]}"}  # after a line's end it would be read as a length
    return text.translate(str.maketrans(signs))


def write_page(executed: Path | str, page: Path | str, index: str = "index.html") -> Path:
    """An executed notebook without its code, as a page to hand on that runs nothing and asks nothing of a network.

    Names of encoders and data sets come from files: their HTML is cleaned, and the page's policy forbids scripts. Links
    to another notebook lead to its page beside, else to `index`; what links elsewhere in the repository is plain text.
    """
    import bleach  # type: ignore[import-untyped]
    import nbformat
    from nbconvert import HTMLExporter

    tags = {*bleach.ALLOWED_TAGS, "div", "span", "pre", "p", "br", "hr", *(f"h{level}" for level in range(1, 7))}
    tags |= {"table", "thead", "tbody", "tr", "th", "td"}

    def clean(text: object) -> str:  # nbconvert's own escapes headings and the heads of tables
        return str(bleach.clean(str(text), tags=tags, attributes={**bleach.ALLOWED_ATTRIBUTES, "*": ["class", "id"]}))

    exporter = HTMLExporter(exclude_input=True, sanitize_html=True)
    exporter.register_filter("clean_html", clean)
    notebook = nbformat.read(str(executed), as_version=4)
    notebook.metadata.pop("widgets", None)  # no widget runs here: without its state, the picture it left is shown
    for cell, after in itertools.pairwise(notebook.cells):
        if cell.cell_type == "markdown" and cell.source.endswith(":") and after.get("outputs") == []:
            cell.source = cell.source.rpartition("\n\n")[0]  # its last sentence leads to code, which isn't here
    notebook.cells = [cell for cell in notebook.cells if cell.get("outputs", cell.source)]
    html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": Path(executed).stem}})
    html = re.sub(r"<script\b.*?</script\s*>", "", html, flags=re.DOTALL | re.IGNORECASE)  # the template's own
    beside = {path.stem: f"{path.stem}.html" for path in Path(executed).parent.glob("*.ipynb")}
    html = re.sub(r'href="(\d\d_\w+)\.ipynb', lambda found: f'href="{beside.get(found[1], index)}', html)
    html = re.sub(r'<a href="\.\./[^"]*"', "<a", html)
    home = f'<a href="{index}" style="color: #004488">All notebooks of this experiment</a>'
    html = re.sub("<body[^>]*>", rf'\g<0><p style="margin: 1em 2em">{home}</p>', html, count=1)
    with files.writing(page) as partial:
        partial.write_text(html.replace("<head>", f"<head>{_POLICY}", 1), encoding="utf-8")
    return Path(page)


def pictures(executed: Path, tag: str = "") -> list[str]:
    """The figures of an executed notebook, PNG in base 64; with a tag, of the cells that have it."""
    return _pictures(json.loads(executed.read_bytes())["cells"], tag)


def _pictures(cells: Sequence[Mapping[str, Any]], tag: str = "") -> list[str]:
    marked = [cell for cell in cells if not tag or tag in cell["metadata"].get("tags", [])]
    data = [output.get("data", {}) for cell in marked for output in cell.get("outputs", [])]
    return ["".join(shown["image/png"]) for shown in data if "image/png" in shown]


def _thumbnail(png: str) -> str:
    """A small JPEG of a figure, as an address that holds it."""
    written, picture = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail((480, 480))
    picture.save(written, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"


def write_index(folder: Path | str) -> Path:
    """`index.html`: every executed notebook of an experiment, its first figure and title, linked to its page.

    Pages that are older than their notebook are made anew; what failed or is outdated is called so.
    """
    folder, tiles = Path(folder), []
    for executed in sorted(folder.rglob("[0-9][0-9]_*.ipynb"), key=lambda path: (path.name, path)):
        page, up = executed.with_suffix(".html"), "../" * (len(executed.relative_to(folder).parts) - 1)
        if not page.exists() or page.stat().st_mtime < executed.stat().st_mtime:
            write_page(executed, page, f"{up}index.html")
        cells = json.loads(executed.read_bytes())["cells"]
        picture = "".join(f'<img alt="" src="{_thumbnail(png)}">' for png in _pictures(cells)[:1])
        title = "".join(cells[0]["source"]).partition("\n")[0].lstrip("# ")
        about = escape(f"{title}, {executed.parent.name}" if up else title)
        about += " (failed, outdated or edited)" if files.distrust(executed) else ""
        tiles.append(f'<a href="{escape(page.relative_to(folder).as_posix())}">{picture}{about}</a>')
    style = "body {font: 16px sans-serif; margin: 2em} main {display: flex; flex-wrap: wrap; gap: 1.5em}"
    style += " a {width: 15em} img {width: 100%; height: 9em; object-fit: cover; object-position: top; display: block}"
    head = f'<head>{_POLICY}<meta charset="utf-8"><title>{escape(folder.name)}</title><style>{style}</style></head>'
    with files.writing(folder / "index.html") as partial:
        title = f"<h1>Every notebook of {escape(folder.name)}</h1>"
        partial.write_text(f"<!doctype html>{head}<body>{title}<main>{''.join(tiles)}</main></body>", encoding="utf-8")
    return folder / "index.html"


def recommend(
    lost: str | Iterable[str], head: str = "kept", *, task: str = "classification", shape: str = "band",
    encoder: str = "small",
) -> pd.Series:  # fmt: skip
    """What to do about lost bands: a row of measured figures (`docs/findings.md`), nothing interpolated.

    Of 997 EuroSAT images at 64 px, five folds, seconds of one H100; other data may differ. The method is the cheapest
    that this package makes within one standard error of the best on validation images (of foundation models: the best
    on the other folds); its scores are of test images. A loss that is not among them is looked up in the record of all
    8,192 subsets (whole bands, head kept): ridge, or any-band (one encoder for every loss) where it is surely ahead;
    the map of `heads.with_map`, ahead of both on each loss of few bands that was measured, is not in that record.
    Where there is no such record, the measured loss that shares half of the bands (of those that either hides) or more
    stands for it, else none.

    Args:
        lost: ESA or common names, such as `"B11 B12"`.
        head: `kept` (it stays in service) or `retrained` (on incomplete images).
        task: `classification` (overall accuracy) or `segmentation` (mIoU of the classes that are there).
        shape: `band` (whole ones), or parts: `pixel` and `stripe` (90 % lost), `block` (75 %), `cloud` (50 %).
        encoder: `small`, one of this project's, or `galileo-nano` or `presto`: what stands before the head.

    Returns:
        `note`, what to keep in mind, or ""; `lost`; `shared`, the share of bands that both have in common (1: measured
        itself); `measured`, the loss that the figures are of; `method`, or "" with figures of NaN; `score` with `low`
        and `high` (95 %), and `complete`, that of complete images; `gain` with `gain_low` and `gain_high` over
        `best_free`, the best method that trains no encoder (of foundation models `native`); `images_trained` (forward
        passes) and `seconds` of that training.

    Raises:
        ValueError: no band or every band lost; a band, encoder, head, task or shape that was not measured.
    """
    names, rows = bands.parse_bands(lost), pd.read_csv(RECOMMENDED)
    asked = {"encoder": encoder, "task": task, "head": head, "shape": shape}
    for name, value in asked.items():
        if value not in set(rows[name]):
            yours = "; of a model of yours: bm.guard(…, images=…).robustness()" if name == "encoder" else ""
            raise ValueError(f"{name} {value!r} was not measured; available: {', '.join(rows[name].unique())}{yours}")
        rows = rows[rows[name] == value]
    if not names:
        raise ValueError("no band is lost, so nothing need be done; name bands such as lost='B11 B12'")
    taken = {*bands.NAMES}
    if encoder != "small":  # no other loss counts
        from bandmask.foundation import ADAPTERS  # loads torch

        taken = {band for group in ADAPTERS[encoder].groups.values() for band in group}
    if not (told := taken.intersection(names)):
        raise ValueError(f"{encoder} takes none of {' '.join(names)}: nothing is lost to it")
    if told == taken:
        raise ValueError("every band is lost: nothing is left to fill from or to embed; leave one")
    measured = [(taken.intersection(text.split()), -len(text)) for text in rows["measured"]]
    shared = [(len(told & hidden) / len(told | hidden), len(hidden), plain) for hidden, plain in measured]
    row = rows.iloc[shared.index(max(shared))]  # of equally near ones that with more bands lost
    near, note = max(shared)[0], ""
    if near < 1 and tuple(asked.values()) == ("small", "classification", "kept", "band"):
        near, (row, images) = 1.0, _of_subset(names, rows)
        first = "; try ridge mapped first" if row["method"] == "any-band" else ": its interval is wide"
        note = f"of all subsets, {images} images{first}"
    elif near < 0.5:
        row = row.where(row.index.isin(asked)).fillna({"measured": "", "method": "", "best_free": ""})
        note = f"not measured ({near:.0%} shared): ask bm.evaluate"
    elif near < 1:
        note = f"{near:.0%} of the bands shared: ask bm.evaluate"
    return pd.Series({"note": note, "lost": " ".join(names), "shared": near, **row})


def _of_subset(names: Sequence[str], rows: pd.DataFrame) -> tuple[pd.Series, int]:
    """A row of notebook 09's records, and of how many images. Bounds are of independent draws of images: too wide."""
    subsets, code = pd.read_parquet(files.RECORDS / "subsets.parquet"), bands.code_of({*bands.NAMES}.difference(names))
    found = {str(name): float(value) for name, value in subsets[subsets["code"] == code].iloc[0].items()}
    trained = rows[rows["method"] == "any-band"].iloc[0]
    spread = {of: 1.96 * (found[of] * (1 - found[of]) / found["images"]) ** 0.5 for of in ("ridge", "any-band")}
    ahead, wide = found["any-band"] - found["ridge"], (spread["ridge"] ** 2 + spread["any-band"] ** 2) ** 0.5
    method, row = "any-band" if ahead > wide else "ridge", trained.copy()
    score = (found[method], found[method] - spread[method], found[method] + spread[method])
    row[["measured", "method", "complete", "best_free"]] = " ".join(names), method, round(found["complete"], 4), "ridge"
    row[["score", "low", "high"]] = np.round(score, 4)
    row[["gain", "gain_low", "gain_high"]] = np.round((ahead, ahead - wide, ahead + wide), 4)
    if method == "ridge":
        row[["gain", "gain_low", "gain_high", "images_trained", "seconds"]] = 0.0, 0.0, 0.0, 0, 0.0
    return row, int(found["images"])


def closing(folder: Path) -> str:
    """What notebooks of an experiment say they found, and what to open next; nothing that its record disowns."""
    lines = []
    for table in (folder / "results.parquet", folder / "any-band" / "any_band.parquet"):  # of notebooks 06 and 08
        found = table.with_name("found.md")
        if table.exists() and found.exists():
            why = files.distrust(table) or files.distrust(found)
            text = "\n" + found.read_text(encoding="utf-8")
            lines.append(f"{found} is not shown: {why}; `make run` makes it again" if why else text)
    report = folder / "06_results.html"
    first = f"the report, {report.resolve()}, then " if report.exists() else ""
    return "\n".join([*lines, f"Open next: {first}every notebook with its figures, {write_index(folder).resolve()}"])
