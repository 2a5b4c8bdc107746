# The notebooks as a graph, over all masks of an experiment. What is done is not done again; a failed run leaves the
# others running and is named at the end.
#
#   snakemake --cores all --keep-going --config experiment=sample
#   snakemake --cores all --keep-going --config experiment=thesis variant=position
#   snakemake --cores all --config experiment=thesis report_only=yes --forcerun results
#
# A node is one papermill execution; its executed notebook stays in the run's folder, a failed one with the failing
# cell last.

import json
import sys
from pathlib import Path

from bandmask import bands, files, params

ROOT = files.project_root()
NAMED = str(config.get("experiment", "sample"))  # of params/experiments, or the path of a file of your own
EXPERIMENT_FILE = Path(NAMED).resolve() if NAMED.endswith(".yaml") else ROOT / f"params/experiments/{NAMED}.yaml"
VARIANT = [ROOT / f"params/{NAMED}/{config['variant']}.yaml"] if config.get("variant") else []  # laid over it
FILES = [EXPERIMENT_FILE, *VARIANT]
EXPERIMENT = params.load(*FILES)
SCHEME = EXPERIMENT.get("mask_scheme", "named")
OUT = params.experiment_folder(EXPERIMENT["experiment"])
RUNS = {bands.mask_slug(mask, SCHEME): bands.mask_slug(mask) for mask in EXPERIMENT["masks"]}
STAND_IN = EXPERIMENT.get("encoder", "stand-in") == "stand-in"
ENCODER = [OUT / "encoder" / "card.json"] if STAND_IN else []
TASKS = EXPERIMENT.get("tasks", params.TASKS)
if unknown := set(TASKS) - set(params.TASKS):
    raise ValueError(f"{FILES[-1]}: unknown task {sorted(unknown)}; available: {', '.join(params.TASKS)}")
DONE = [params.RUN_FILES[task] for task in ("alignment", *TASKS)]  # of each run


def mask_file(run):
    return ROOT / "params" / "masks" / f"{RUNS[run]}.yaml"


def passed(notebook, run=None):
    """Parameters that reach a notebook: changing one re-runs the runs that take it."""
    values = params.load(*FILES, *([mask_file(run)] if run else []))
    known = params.declared(notebook)
    return json.dumps({name: value for name, value in values.items() if name in known}, sort_keys=True)


def papermill(notebook, executed, run=None):
    """Execute a notebook; what it prints goes to stderr, by `-`: papermill would empty a log that it opens by name."""
    given = " ".join(f"-f '{file}'" for file in [*FILES, *([mask_file(run)] if run else [])])
    return (
        f"'{sys.executable}' -m papermill '{ROOT}/notebooks/{notebook}.ipynb' '{executed}' {given} "
        "--log-output --no-progress-bar --log-level ERROR --stdout-file - --stderr-file - >&2"
    )


wildcard_constraints:
    run="[A-Za-z0-9_-]+",


# `make report` makes the report anew from whatever has finished; else it waits for every run of the experiment.
FINISHED = [] if config.get("report_only") else expand(OUT / "{run}" / "{done}", run=RUNS, done=DONE)


rule all:
    input:
        FINISHED,  # or a report of half a grid would pass for the whole
        OUT / "06_results.html",


rule stand_in_encoder:
    output:
        OUT / "encoder" / "card.json",
    log:
        notebook=OUT / "00_sample_encoder.ipynb",
    params:
        values=passed("00_sample_encoder"),
    threads: workflow.cores
    run:
        shell(papermill("00_sample_encoder", log.notebook))


rule fine_tune:
    input:
        ENCODER,
    output:
        OUT / "{run}" / "alignment.parquet",
    log:
        notebook=OUT / "{run}" / "03_fine_tuning.ipynb",
    params:
        values=lambda wildcards: passed("03_fine_tuning", wildcards.run),
    threads: workflow.cores
    run:
        shell(papermill("03_fine_tuning", log.notebook, wildcards.run))


def task_input(done):
    """Inputs of a task's run: its fine-tuned encoders, and what is in service, which the run of no mask trains."""

    def of(wildcards):
        if wildcards.run == "none":
            return ENCODER
        in_service = [OUT / "none" / done] if "none" in RUNS else []
        return [*ENCODER, *in_service, OUT / wildcards.run / "alignment.parquet"]

    return of


rule classify:
    input:
        task_input("results.parquet"),
    output:
        OUT / "{run}" / "results.parquet",
        OUT / "{run}" / "predictions.parquet",
    log:
        notebook=OUT / "{run}" / "04_scene_classification.ipynb",
    params:
        values=lambda wildcards: passed("04_scene_classification", wildcards.run),
    threads: workflow.cores
    run:
        shell(papermill("04_scene_classification", log.notebook, wildcards.run))


rule segment:
    input:
        task_input("segmentation.parquet"),
    output:
        OUT / "{run}" / "segmentation.parquet",
        OUT / "{run}" / "segmentation_predictions.parquet",
    log:
        notebook=OUT / "{run}" / "05_image_segmentation.ipynb",
    params:
        values=lambda wildcards: passed("05_image_segmentation", wildcards.run),
    threads: workflow.cores
    run:
        shell(papermill("05_image_segmentation", log.notebook, wildcards.run))


rule results:
    input:
        FINISHED,
    output:
        OUT / "results.parquet",
        OUT / "06_results.html",
    log:
        notebook=OUT / "06_results.ipynb",
    params:
        values=passed("06_results"),
    threads: workflow.cores
    run:
        report(log.notebook)


def report(executed):
    shell(papermill("06_results", executed))
    shell(f"'{sys.executable}' -m nbconvert --to html --no-input --log-level WARN '{executed}'")


def failed_runs():
    """Executed notebooks that end in an error, with its last line."""
    for path in sorted(OUT.rglob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", []):
                if output["output_type"] == "error" and cell["metadata"].get("papermill", {}).get("exception"):
                    yield path, f"{output['ename']}: {output['evalue']}".splitlines()[0]


onerror:
    failures = list(failed_runs())
    print(f"\n{len(failures)} failed; each keeps its notebook with the failing cell:", file=sys.stderr)
    for path, message in failures:
        print(f"  {path}\n    {message}", file=sys.stderr)
    if any(list(OUT.glob(f"*/{done}")) for done in DONE):
        print("The report is made from what has finished.", file=sys.stderr)
        report(OUT / "06_results.ipynb")
