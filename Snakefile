# The order in which an experiment's notebooks run, and what may run side by side. `make run` (python -m bandmask.run
# graph) is the door: it asks every node's record what is done, and puts the markers that are looked for here.
#
#   make run EXPERIMENT=thesis VARIANT=moco                     one run a GPU, on this machine
#   make run EXPERIMENT=thesis PROFILE=profiles/slurm           a job each, on a cluster
import os
import signal
import sys

from bandmask import params, run

if workflow.is_main_process and "BANDMASK_GRAPH" not in os.environ:
    raise ValueError("start it by `make run EXPERIMENT=...`, which first asks the records what is done")

NAMED, VARIANT = str(config.get("experiment", "sample")), str(config.get("variant") or "")
NODES = run.nodes(params.load_experiment(NAMED, VARIANT))
GPU, THREADS = int(config.get("gpu", 0)), int(config.get("threads", 1))


onstart:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Snakemake would wait for what runs; nodes end with it


rule all:
    input:
        [node.marker for node in NODES.values()],


for title, node in NODES.items():

    rule:
        name:
            title.replace("/", "_").replace("-", "_").replace(".", "_")
        input:
            [ancient(NODES[other].marker) for other in node.after],
        output:
            touch(node.marker),
        params:
            title=title,
        threads: THREADS if node.gpus or not GPU else 1
        resources:
            gpu=node.gpus * GPU,
            attempt=lambda wildcards, attempt: attempt,
        shell:
            "exec '{sys.executable}' -m bandmask.run node {params.title:q} --experiment {NAMED:q} --variant={VARIANT:q} "
            "--threads {threads} --gpus {resources.gpu} --attempt {resources.attempt} --parent $PPID"
