"""The plan of an experiment and its variants: every run, what it needs and what it costs, before anything runs.

`python -m bandmask.runs.grid thesis` prints it, with hours from a throughput measured just then. It writes nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from bandmask import bands, files, params
from bandmask.runs import costs
from bandmask.runs.costs import Cost, Throughput
from bandmask.runs.inputs import Images, Input, datasets_of, image_counts, inputs


@dataclass(frozen=True)
class Run:
    """One mask of one experiment with all its seeds and tasks: what the graph makes in one folder.

    Attributes:
        experiment: the folder below `outputs/`.
        mask: label of the mask set.
        after: masks of the experiment that come before it.
        parameters: of the experiment, complete.
    """

    experiment: str
    mask: str
    after: tuple[str, ...]
    parameters: Mapping[str, Any] = field(repr=False, hash=False)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Classification, segmentation, or neither: alignment only."""
        return tuple(self.parameters["tasks"])

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Files that are there once it is done."""
        folder = params.run_folder(self.experiment, self.mask, self.parameters["mask_scheme"])
        return tuple(folder / params.RUN_FILES[task] for task in ("alignment", *self.tasks))

    @property
    def done(self) -> bool:
        """All of them are there. Whether with today's parameters, the graph finds out."""
        return all(path.exists() for path in self.outputs)

    def cost(self, scenes: Images, pixels: Images | None = None) -> Cost:
        """What it puts through networks, from the counts of `dataset` and, if it segments, `segmentation_dataset`."""
        hidden = len(bands.resolve_mask(self.mask, self.parameters["mask_scheme"]))  # as many in every file order
        return costs.run_cost(self.parameters, hidden=hidden, first=not self.after, scenes=scenes, pixels=pixels)


def experiments(name: str = "thesis", variants: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Complete parameters of an experiment, called `base`, and of its variants in `params/<name>/`; base first.

    Raises:
        FileNotFoundError: no such experiment; names those there are.
        ValueError: no such variant; lists those there are.
    """
    folder = files.project_root() / "params"
    base = folder / "experiments" / f"{name}.yaml"
    found = {"base": [base], **{path.stem: [base, path] for path in sorted((folder / name).glob("*.yaml"), key=_stem)}}
    if unknown := [variant for variant in variants or () if variant not in found]:
        raise ValueError(f"{name} has no variant {', '.join(unknown)}; available: {', '.join(found)}")
    defaults = params.vocabulary()
    return {key: {**defaults, **params.load(*found[key])} for key in found if variants is None or key in variants}


def commands(name: str = "thesis", variants: Sequence[str] | None = None) -> list[str]:
    """What `make thesis` runs: a command for the experiment, one a variant, and a last report that shows them all."""
    chosen = experiments(name, variants)
    made = [f"make run EXPERIMENT={name}" + ("" if key == "base" else f" VARIANT={key}") for key in chosen]
    beside = chosen.get("base", {}).get("variants")
    return [*made, f"make report EXPERIMENT={name}"] if beside else made


def runs(parameters: Mapping[str, Any]) -> list[Run]:
    """The runs of one experiment, one a mask set. All wait for `none`, else for the first: it trains what serves all.

    Raises:
        ValueError: an unknown task.
    """
    if unknown := set(parameters["tasks"]) - set(params.TASKS):
        raise ValueError(f"unknown task {sorted(unknown)}; available: {', '.join(params.TASKS)}, or none of them")
    masks = list(parameters["masks"])
    first = "none" if "none" in masks else masks[0]
    waiting = (first,) if parameters["tasks"] else ()
    return [Run(parameters["experiment"], mask, () if mask == first else waiting, parameters) for mask in masks]


def run_table(chosen: Mapping[str, Mapping[str, Any]], speed: Throughput) -> pd.DataFrame:
    """A row a run: what it is, whether it can run, and what it takes.

    Args:
        chosen: from `experiments`.
        speed: from `costs.measure`.

    Returns:
        `experiment`, `mask`, `seeds`, `tasks`, `after`, `state` (done, ready or what it lacks), `forward` (images
        through frozen encoders), `fine-tuning` (images of training steps), `heads`, `decoders` (trained), `hours`.
    """
    rows = []
    for parameters in chosen.values():
        lacking = ", ".join(needed.name for needed in inputs(parameters) if needed.missing)
        scenes, *pixels = map(image_counts, datasets_of(parameters))
        for run in runs(parameters):
            cost = run.cost(scenes, *pixels)
            rows.append(
                {
                    "experiment": run.experiment,
                    "mask": run.mask,
                    "seeds": " ".join(map(str, parameters["seeds"])),
                    "tasks": ", ".join(run.tasks) or "alignment only",
                    "after": ", ".join(run.after),
                    "state": "done" if run.done else f"lacks {lacking}" if lacking else "ready",
                    "forward": cost.forward,
                    "fine-tuning": cost.fine_tuning,
                    "heads": cost.heads,
                    "decoders": cost.decoders,
                    "hours": speed.hours(cost),
                }
            )
    return pd.DataFrame(rows)


def totals(table: pd.DataFrame) -> pd.DataFrame:
    """Sums of a `run_table` for each experiment and for all: `runs`, `done`, what they take, and `hours left`."""
    done = table["state"] == "done"
    counted = table.assign(runs=1, done=done.astype(int), **{"hours left": table["hours"].where(~done, 0.0)})
    columns = ["runs", "done", "forward", "fine-tuning", "heads", "decoders", "hours", "hours left"]
    sums = counted.groupby("experiment", sort=False)[columns].sum()
    sums.loc["all"] = sums.sum()
    return sums.astype({column: int for column in columns[:6]}).reset_index()


def input_table(chosen: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row an input: `input`, `state`, `images` (train, val, test), where it is or how to get it, `experiments`."""
    needed: dict[Input, int] = {}
    sizes: dict[str, str] = {}
    for parameters in chosen.values():
        for item in inputs(parameters):
            needed[item] = needed.get(item, 0) + 1
        for name in datasets_of(parameters):
            images = image_counts(name)
            sizes[name] = f"{images.train:,} + {images.val:,} + {images.test:,}, {images.source}"
    return pd.DataFrame(
        {
            "input": item.name,
            "state": "here" if item.found else "missing" if item.missing else "not given",
            "images": sizes.get(item.name, ""),
            "where, or how to get it": item.found or item.way_out,
            "experiments": count,
        }
        for item, count in needed.items()
    )


def describe(chosen: Mapping[str, Mapping[str, Any]], speed: Throughput) -> str:
    """The plan as text: inputs, runs, totals, and what the hours stand for."""
    table = run_table(chosen, speed)
    rates = {work.replace("_", " "): getattr(speed, work) for work in costs.WORK}
    shown = ", ".join(f"{work} {rate:,.{0 if rate >= 100 else 2}f}" for work, rate in rates.items() if rate < math.inf)
    parts = [
        f"{len(table)} runs of {len(chosen)} experiments, {(table['state'] == 'done').sum()} done. Nothing was run.",
        _markdown(input_table(chosen)),
        _markdown(table),
        _markdown(totals(table)),
        f"Images per second: {shown}.\nMeasured just now: {speed.how}.",
        "forward: images through frozen encoders; heads and decoders of all seeds share them. fine-tuning: images of\n"
        "training steps, each through the teacher, and through the student and back. Hours are of one such device;\n"
        "they leave out reading and augmenting images, the training of heads, ridge regressions and figures.",
    ]
    return "\n\n".join(parts)


def _stem(path: Path) -> str:
    """Sorts `moco` before `moco-position`, which whole file names don't."""
    return path.stem


def _markdown(table: pd.DataFrame) -> str:
    return str(table.to_markdown(index=False, intfmt=",", floatfmt=",.1f"))


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m bandmask.runs.grid thesis`: print the plan, or with `--commands` what `make thesis` runs."""
    parser = argparse.ArgumentParser(prog="python -m bandmask.runs.grid", description=main.__doc__)
    parser.add_argument("experiment", nargs="?", default="thesis", help="a file of params/experiments")
    parser.add_argument("--variants", nargs="+", metavar="VARIANT", help="base, or files of params/<experiment>; all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--commands", action="store_true", help="print the commands only")
    options = parser.parse_args(arguments)
    try:
        if options.commands:
            print("\n".join(commands(options.experiment, options.variants)))
            return
        chosen = experiments(options.experiment, options.variants)
        speed = costs.measure(max(chosen.values(), key=lambda p: len(p["tasks"])), device=options.device)
        print(describe(chosen, speed))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
