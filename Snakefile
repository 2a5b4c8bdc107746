# The notebooks as a graph, over all masks of an experiment. What is done is not done again; a failed run leaves the
# others running and is named at the end.
#
#   snakemake --cores all --keep-going --config experiment=sample
#   snakemake --cores all --keep-going --resources gpu=4 --config experiment=thesis variant=position
#   snakemake --workflow-profile profiles/slurm --config experiment=thesis gpu=1
#   snakemake --cores all --config experiment=thesis report_only=yes --forcerun results
#
# A node is one papermill execution under `bandmask.runs.execution`: its executed notebook stays in the run's folder, a
# failed one with the failing cell last, and beside it a record of parameters, code and checksums. A node runs again
# if one of its own parameters, a module it uses, or a file it reads has changed; `make plan` says which and why.
# All outputs are `update`d: Snakemake would delete the old ones before a run that may fail.

import fcntl
import json
import os
import socket
import sys
from pathlib import Path

from bandmask import bands, datasets, files, params, provenance
from bandmask.runs import execution, gpus

ROOT = files.project_root()
NAMED = str(config.get("experiment", "sample"))  # of params/experiments, or the path of a file of your own
FILES = [file.resolve() for file in params.experiment_files(NAMED, config.get("variant") or "")]
EXPERIMENT = params.load_experiment(*FILES)
OUT = params.experiment_folder(EXPERIMENT["experiment"])
RUNS = {bands.mask_slug(mask, EXPERIMENT["mask_scheme"]): bands.mask_slug(mask) for mask in EXPERIMENT["masks"]}
TASKS = EXPERIMENT["tasks"]
if unknown := set(TASKS) - set(params.TASKS):
    raise ValueError(f"{FILES[-1]}: unknown task {sorted(unknown)}; available: {', '.join(params.TASKS)}")
DONE = [params.RUN_FILES[task] for task in ("alignment", *TASKS)]  # of each run
SEEDS = EXPERIMENT["seeds"]
BEYOND = params.beyond(EXPERIMENT)

# One run a GPU, and the cores are shared between them; without a GPU, runs of a few cores each.
ON_GPU = bool(int(config.get("gpu", EXPERIMENT["device"] != "cpu" and bool(gpus.visible()))))
CORES = workflow.cores or 1
AT_ONCE = len(gpus.visible()) or 1
THREADS = int(config.get("threads", max(1, CORES // AT_ONCE) if ON_GPU else min(CORES, 4)))
ANEW = "--anew" if config.get("anew") or config.get("report_only") else ""


def only_graph_here():
    """Hold the experiment's lock as long as this process lives: it goes with it, even with kill -9."""
    OUT.mkdir(parents=True, exist_ok=True)
    lock = (OUT / ".graph.lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(
            f"another graph works in {OUT} ({lock.read().strip() or 'just started'}). Wait until it is done (`make "
            "status` shows how far it is), stop it, or give your experiment another name"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


# What a failed run has written is whole, because everything is written beside and renamed. Deleting it, as Snakemake
# does by default, would take a pack's card away, and with it the pack.
if workflow.execution_settings is not None:
    workflow.execution_settings.keep_incomplete = True

if workflow.is_main_process and not workflow.dryrun:
    LOCK = only_graph_here()


def pack(name):
    """Card of a data set's pack: its checksum stands for the pack."""
    return datasets.pack_folder(name, **datasets.settings_of(name, EXPERIMENT)) / "pack.json"


PACKS = {pack(EXPERIMENT[key]).parent.name: EXPERIMENT[key] for key in ("dataset", "segmentation_dataset")}
SCENES, PIXELS = pack(EXPERIMENT["dataset"]), pack(EXPERIMENT["segmentation_dataset"])
WEIGHTS, DECODER_WEIGHTS = ([Path(EXPERIMENT[key])] if EXPERIMENT[key] else [] for key in ("weights", "decoder_weights"))


def encoder(folder):
    return [folder / "model.safetensors", folder / "card.json"]


STAND_IN = encoder(OUT / "encoder")
ENCODER = STAND_IN if EXPERIMENT["encoder"] == "stand-in" else WEIGHTS


def mask_file(run):
    return ROOT / "params" / "masks" / f"{RUNS[run]}.yaml"


OF_RUN = {run: params.load(mask_file(run)) for run in RUNS}


def made_from(notebook, **fixed):
    """Parameters that reach a notebook, and its code, an entry each: one that changes re-runs what takes it."""

    def value(name):
        def of(wildcards):
            of_run = OF_RUN[wildcards.run] if "run" in wildcards.keys() else {}
            chosen = {key: call(wildcards) for key, call in fixed.items()}
            return f"{name} = {json.dumps({**EXPERIMENT, **of_run, **chosen}[name])}"

        return of

    code = {f"code_{name}": f"code of {name}: {sum_[:12]}" for name, sum_ in provenance.code_of_notebook(notebook).items()}
    return {**{name: value(name) for name in provenance.values_of(notebook, {})}, **code}


def given(wildcards):
    """YAML files of a run, laid over one another."""
    return [*FILES, *([mask_file(wildcards.run)] if "run" in wildcards.keys() else [])]


RUN_NODE = (
    "exec '{sys.executable}' -m bandmask.runs.execution {params.notebook} {params.executed:q} --files {params.files:q} "
    "--inputs {input:q} --outputs {output:q} --threads {threads} --gpus {resources.gpu} --attempt {resources.attempt} "
    "--parent $PPID {ANEW}"
)


wildcard_constraints:
    run="|".join(RUNS),


# `make report` makes the report anew from whatever has finished; else it waits for every run of the experiment.
FINISHED = [] if config.get("report_only") else expand(OUT / "{run}" / "{done}", run=RUNS, done=DONE)


LEFT = {name: OUT / folder / left for name, (_, folder, left) in BEYOND.items()}


rule all:
    input:
        FINISHED,  # or a report of half a grid would pass for the whole
        list(LEFT.values()),
        OUT / "06_results.html",


rule pack:
    output:
        update(files.outputs_root() / "packs" / "{pack}" / "pack.json"),
    params:
        notebook="01_data_exploration",
        files=lambda wildcards, output: FILES,
        executed=lambda wildcards, output: OUT / "packs" / wildcards.pack / "01_data_exploration.ipynb",
        source=lambda wildcards, output: PACKS[wildcards.pack],
        **made_from("01_data_exploration", dataset=lambda wildcards: PACKS[wildcards.pack]),
    resources:
        gpu=0,
        attempt=lambda wildcards, attempt: attempt,
    shell:
        RUN_NODE + " --set dataset={params.source}"


rule stand_in_encoder:
    input:
        SCENES,
    output:
        update(STAND_IN),
    params:
        notebook="00_sample_encoder",
        files=lambda wildcards, output: FILES,
        executed=lambda wildcards, output: OUT / "00_sample_encoder.ipynb",
        **made_from("00_sample_encoder"),
    threads: THREADS
    resources:
        gpu=int(ON_GPU),
        attempt=lambda wildcards, attempt: attempt,
    shell:
        RUN_NODE


rule fine_tune:
    input:
        SCENES,
        ENCODER,
    output:
        update(OUT / "{run}" / "alignment.parquet"),
        update([file for seed in SEEDS for file in encoder(OUT / "{run}" / f"encoder-seed{seed}")]),
    params:
        notebook="03_fine_tuning",
        files=lambda wildcards, output: given(wildcards),
        executed=lambda wildcards, output: OUT / wildcards.run / "03_fine_tuning.ipynb",
        **made_from("03_fine_tuning"),
    threads: THREADS
    resources:
        gpu=EXPERIMENT["processes"] if ON_GPU else 0,
        attempt=lambda wildcards, attempt: attempt,
    shell:
        RUN_NODE


def task_input(done, *needed):
    """Inputs of a task's run: its fine-tuned encoders, and what is in service, which the run of no mask trains."""

    def of(wildcards):
        if wildcards.run == "none":
            return [*needed, *ENCODER]
        in_service = [OUT / "none" / done] if "none" in RUNS else []
        tuned = [file for seed in SEEDS for file in encoder(OUT / wildcards.run / f"encoder-seed{seed}")]
        return [*needed, *ENCODER, *in_service, *tuned]

    return of


rule classify:
    input:
        task_input("results.parquet", SCENES),
    output:
        update(OUT / "{run}" / "results.parquet"),
        update(OUT / "{run}" / "predictions.parquet"),
    params:
        notebook="04_scene_classification",
        files=lambda wildcards, output: given(wildcards),
        executed=lambda wildcards, output: OUT / wildcards.run / "04_scene_classification.ipynb",
        **made_from("04_scene_classification"),
    threads: THREADS
    resources:
        gpu=int(ON_GPU),
        attempt=lambda wildcards, attempt: attempt,
    shell:
        RUN_NODE


rule segment:
    input:
        task_input("segmentation.parquet", SCENES, PIXELS, *DECODER_WEIGHTS),
    output:
        update(OUT / "{run}" / "segmentation.parquet"),
        update(OUT / "{run}" / "segmentation_predictions.parquet"),
    params:
        notebook="05_image_segmentation",
        files=lambda wildcards, output: given(wildcards),
        executed=lambda wildcards, output: OUT / wildcards.run / "05_image_segmentation.ipynb",
        **made_from("05_image_segmentation"),
    threads: THREADS
    resources:
        gpu=int(ON_GPU),
        attempt=lambda wildcards, attempt: attempt,
    shell:
        RUN_NODE


ANY_BAND = OUT / "any-band" / f"encoder-seed{SEEDS[0]}" / "model.safetensors"

for name, (notebook, folder, left) in BEYOND.items():

    rule:
        name:
            name
        input:
            SCENES,
            ENCODER,
            [ANY_BAND] if name == "robustness" and "any_band" in BEYOND else [],
            # the head in service, if a run trains it
            [OUT / "none" / "results.parquet"] if "none" in RUNS and "classification" in TASKS else [],
        output:
            update(OUT / folder / left),
            update([file for seed in SEEDS for file in encoder(OUT / folder / f"encoder-seed{seed}")] if name == "any_band" else []),
        params:
            notebook=notebook,
            files=lambda wildcards, output: FILES,
            executed=lambda wildcards, output, made=OUT / folder / f"{notebook}.ipynb": made,
            **made_from(notebook),
        threads: THREADS
        resources:
            gpu=int(ON_GPU),
            attempt=lambda wildcards, attempt: attempt,
        shell:
            RUN_NODE


rule results:
    input:
        FINISHED,
    output:
        update(OUT / "results.parquet"),
        update(OUT / "06_results.html"),
    params:
        notebook="06_results",
        files=lambda wildcards, output: FILES,
        executed=lambda wildcards, output: OUT / "06_results.ipynb",
        **made_from("06_results"),
    resources:
        gpu=0,
        attempt=lambda wildcards, attempt: attempt,
    shell:
        RUN_NODE


onerror:
    records = {path: execution.read_record(path) for path in sorted(OUT.rglob("0*.json"))}
    failures = {path: record for path, record in records.items() if record.get("state") in ("failed", "stopped")}
    print(f"\n{len(failures)} failed; each keeps its notebook, with the failing cell last:", file=sys.stderr)
    for path, record in failures.items():
        print(f"  {path.with_suffix('.ipynb')}\n    {record['error']}", file=sys.stderr)
    if any(list(OUT.glob(f"*/{done}")) for done in DONE):
        print("The report is made from what has finished.", file=sys.stderr)
        made = [OUT / "results.parquet", OUT / "06_results.html"]
        execution.main(["06_results", str(OUT / "06_results.ipynb"), "--anew", "--files", *map(str, FILES), "--outputs", *map(str, made)])
