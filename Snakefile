# The order in which an experiment's notebooks run, and what may run side by side. `make run` (python -m bandmask.run
# graph) is the door: it asks every node's record what is done, and puts the markers that are looked for here.
#
#   make run EXPERIMENT=thesis VARIANT=moco                     one run a GPU, on this machine
#   make run EXPERIMENT=thesis PROFILE=profiles/slurm           a job each, on a cluster
import os
import shutil
import sys

from bandmask import params, run

if workflow.is_main_process and "BANDMASK_GRAPH" not in os.environ:
    raise ValueError("start it by `make run EXPERIMENT=...`, which first asks the records what is done")

NAMED, VARIANT = str(config.get("experiment", "sample")), str(config.get("variant") or "")
NODES = run.nodes(params.load_experiment(NAMED, VARIANT))
BOUND = "setpriv --pdeathsig TERM" if shutil.which("setpriv") else ""  # a node ends with Snakemake, however that ends
GPU, THREADS = int(config.get("gpu", 0)), int(config.get("threads", 1))
DEPTH: dict[str, int] = {}
for title, node in NODES.items():
    DEPTH[title] = 1 + max((DEPTH[other] for other in node.after), default=0)


def threads_of(title):
    """On one machine without a GPU nodes that are as deep as each other go side by side, and share its cores."""
    if int(config.get("shared", 0)):
        return max(1, THREADS // [*DEPTH.values()].count(DEPTH[title]))
    return THREADS if NODES[title].gpu or not GPU else 1


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
        threads: threads_of(title)
        priority: sum(title in other.after for other in NODES.values())
        resources:
            gpu=node.gpu * GPU,
            attempt=lambda wildcards, attempt: attempt,
        shell:
            "exec {BOUND} '{sys.executable}' -m bandmask.run node {NAMED:q} --variant={VARIANT:q} --title {params.title:q} "
            "--threads {threads} --gpu {resources.gpu} --attempt {resources.attempt}"
