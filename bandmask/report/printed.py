"""What the thesis prints: every number of its tables, and where they contradict each other.

Source: Petcu 2024, Tables 4.1 to 4.4 and A.3 to A.6, in `thesis_tables.csv`.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from pathlib import Path

import pandas as pd

TABLES = ("4.1", "4.2", "4.3", "4.4", "A.3", "A.4", "A.5", "A.6")
CONTRADICTIONS = {
    "a": "Tables 4.3 and A.4 print test accuracies of the same runs (pre-trained encoder, this mask) that are more "
    "than 3 points apart.",
    "b": "An SD above 5 points over three runs, where the other rows of the table have less than 1: it looks like one "
    "outlying run, and the mean with it.",
    "c": "The thesis calls B2 B8 B11 'Agricultural RGB' (Figure B.8), but its text gives B2, B8 and B12 (SWIR 1, ESA "
    "B11) for that index. By its Table A.1, B11 is cirrus (ESA B10).",
    "d": "More hidden pixels give a lower loss at the same length of training: B8 at ratio 1.0 is easier than at 0.9, "
    "which the text does not explain.",
    "e": "Table A.2 leaves savanna unused, yet the decoder keeps 10 outputs: whether the thesis' mIoU divides by 9 or "
    "by 10 classes is not said. `miou_all` is its formula; `miou_present` leaves absent classes out.",
    "f": "The same losses, to the last digit, stand in another table for another length of training (15, 25 epochs).",
    "g": "An SD this small can't be of three runs on EuroSAT's 5,400 test images unless all three are equal, and then "
    "it is 0; perhaps it is a share, not percent.",
}
_GAP, _OUTLYING, _TEST_IMAGES = 3, 5, 5400  # points, points, EuroSAT's test split
_COUNTED_FROM_0 = {0: 1, 14: 15}  # in Tables A.5 and A.6; their middle epochs, 8 and 13, are those of 4.1 and 4.2


def thesis_tables() -> pd.DataFrame:
    """Every number of the thesis' Tables 4.1 to 4.4 and A.3 to A.6, tidy, by thesis labels (Petcu 2024)."""
    return pd.read_csv(Path(__file__).parent / "thesis_tables.csv", dtype={"table": str, "note": str})


def printed_rows() -> pd.DataFrame:
    """`thesis_tables`, with what their layout says.

    Adds `block`, which counts the printed rows of each table from 0 (one mask set, ratio, schedule and length);
    `length`, the last epoch of the block; and `marks`, the keys of `CONTRADICTIONS` that touch a number. `epoch`
    counts from 1 throughout; Tables A.5 and A.6 begin at 0.
    """
    return _printed_rows().copy()


@functools.cache
def _printed_rows() -> pd.DataFrame:
    found = thesis_tables()
    found["epoch"] = [_COUNTED_FROM_0.get(e, e) for e in found["epoch"]]
    found[["mask_ratio", "schedule"]] = found[["mask_ratio", "schedule"]].astype(object).fillna("")
    row = found[["table", "mask", "mask_ratio", "schedule"]]
    begins = (row != row.shift()).any(axis=1) | (found["epoch"] < found["epoch"].shift())
    found["block"] = begins.astype(int).groupby(found["table"]).cumsum() - 1
    found["length"] = found.groupby(["table", "block"])["epoch"].transform("max")
    marks = _marks(found)
    found["marks"] = ["".join(sorted(marks[place])) for place in found.index]
    return found


def footnotes(frame: pd.DataFrame) -> list[str]:
    """The notes that a table for reading refers to, by its marks such as `B8 [d]`."""
    cells = " ".join(str(value) for value in frame.to_numpy().ravel())
    used = {key for marks in re.findall(r"\[([a-z](?:, [a-z])*)\]", cells) for key in marks.split(", ")}
    return [f"[{key}] {note}" for key, note in CONTRADICTIONS.items() if key in used]


def _marks(found: pd.DataFrame) -> dict[int, set[str]]:
    """Marks by row; all but those of the naming (c) and of savanna (e) are computed from the numbers."""
    marks: dict[int, set[str]] = defaultdict(set)

    def mark(key: str, rows: pd.Series | pd.DataFrame) -> None:
        for place in rows.index:
            marks[int(place)].add(key)

    for _, same in found[found["metric"] == "test_accuracy_percent"].groupby(["mask", "encoder"]):
        if same["value"].max() - same["value"].min() > _GAP:
            mark("a", same)
    percent = found["metric"].str.endswith("_percent")
    mark("b", found[percent & (found["sd"] > _OUTLYING)])
    mark("c", found[found["mask"] == "B2 B8 B11"])
    constant = found[(found["metric"] == "test_loss") & (found["schedule"] == "constant")]
    for _, same in constant.groupby(["mask", "length"]):
        ratios = same["mask_ratio"].astype(float)
        for ratio, value in zip(ratios, same["value"], strict=True):
            easier = (ratios > ratio) & (same["value"] < value)
            if easier.any():
                mark("d", same[easier | (ratios == ratio)])
    mark("e", found[found["metric"] == "miou"])
    losses = found[found["metric"].str.endswith("_loss")]
    blocks = losses.groupby(["table", "block"], sort=False)
    series = blocks["value"].agg(tuple).rename("losses").reset_index()
    joined = losses.reset_index().merge(series, on=["table", "block"]).set_index("index")
    for _, same in joined.groupby(["mask", "mask_ratio", "losses"]):
        if same["length"].nunique() > 1:
            mark("f", same)
    step = 100 / _TEST_IMAGES * 2**0.5 / 3  # population SD of three runs, one of which has one image more
    classified = found["metric"] == "test_accuracy_percent"
    mark("g", found[classified & (found["sd"] > 0) & (found["sd"] < step)])
    return marks
