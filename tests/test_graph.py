"""The graph of notebooks under faults, run for real: killed, failing, and with nothing left to do."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import nbformat
import pandas as pd
import pytest

from bandmask import files
from bandmask.runs import execution

ROOT = files.project_root()
TINY = """
experiment: tiny
dataset: sample
encoder: stand-in
architecture: resnet10t
image_size: 32
pretrain_epochs: 1
pretrain_crop_size: 32
masks: ["none", "B8", "B11"]
epochs_one_band: 1
head_epochs: 2
encoder_passes: 1
head_seeds: [0, 1]
decoder_epochs: 1
decoder_passes: 1
decoder_width: 8
decoder_seeds: [0, 1]
"""

pytestmark = pytest.mark.slow


def snakemake(folder, *arguments):
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)),
        *("--cores", "all", "--nolock", "--keep-going", "--rerun-incomplete", "--retries", "2", "--quiet", "progress"),
        *("--max-checksum-file-size", "4000000000", "--resources", "gpu=2"),
        *("--config", f"experiment={folder / 'tiny.yaml'}", *arguments),
    ]


def environment(folder, root=ROOT):
    """Two GPUs by name: without a real one the notebooks compute on the CPU, and the graph hands out names."""
    own = {"BANDMASK_OUTPUTS": str(folder), "PYTHONPATH": str(root), "TMPDIR": str(folder)}
    return {**os.environ, **own, "CUDA_VISIBLE_DEVICES": "0,1"}


def run(folder, *arguments, root=ROOT):
    """Run the graph with its output in a file, as people do overnight; `stderr` is what the file then holds."""
    log = folder / "log.txt"
    command = [part.replace(str(ROOT / "Snakefile"), str(root / "Snakefile")) for part in snakemake(folder, *arguments)]
    with log.open("w") as file:
        file.write("begun\n")
        file.flush()
        done = subprocess.run(
            command, env=environment(folder, root), stdout=file, stderr=file, timeout=900, check=False, cwd=root
        )
    return subprocess.CompletedProcess(done.args, done.returncode, "", log.read_text())


def start(folder):
    return subprocess.Popen(
        snakemake(folder),
        env=environment(folder),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stamps(out):
    """When each output was last written."""
    kept = [path for kind in ("*.parquet", "*.safetensors", "*.html") for path in out.rglob(kind)]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in kept}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A grid killed with SIGKILL, run again with one run that fails, mended and finished; what was seen on the way."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "tiny.yaml").write_text(TINY)
    out, seen = folder / "tiny", {"folder": folder, "out": folder / "tiny"}

    # 1. two graphs on one folder; then kill -9 of the whole process group once a run after the encoder is on its way
    started = start(folder)
    deadline = time.monotonic() + 300
    while not (out / ".graph.lock").exists() or "process" not in (out / ".graph.lock").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    seen["second"] = run(folder)
    while not [*out.glob("*/03_fine_tuning.ipynb"), *out.glob("*/04_scene_classification.ipynb")]:
        assert time.monotonic() < deadline, "the graph never got to its second run"
        assert started.poll() is None, "the graph ended early"
        time.sleep(0.2)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    seen["killed"] = stamps(out)

    # 2. a file stands where a run wants its folder of checkpoints; the rest goes on
    in_the_way = out / "B11" / "checkpoints"
    shutil.rmtree(in_the_way, ignore_errors=True)
    in_the_way.parent.mkdir(parents=True, exist_ok=True)
    in_the_way.write_text("in the way")
    seen["failed"] = run(folder)
    seen["left"] = in_the_way.read_text()
    seen["half"] = {**stamps(out), "masks": set(pd.read_parquet(out / "results.parquet")["mask"])}
    seen["failed notebook"] = nbformat.read(out / "B11" / "03_fine_tuning.ipynb", 4)
    seen["failed record"] = execution.read_record(out / "B11" / "03_fine_tuning.json")

    # 3. mended, and once more with nothing to do
    in_the_way.unlink()
    seen["mended"] = run(folder)
    seen["whole"] = stamps(out)
    seen["again"] = run(folder)
    return seen


def test_the_second_of_two_graphs_on_one_folder_is_refused_with_the_way_out(story):
    assert story["second"].returncode != 0
    assert "another graph works in" in story["second"].stderr
    assert "give your experiment another name" in story["second"].stderr


def test_what_was_done_before_a_kill_is_not_done_again(story):
    assert "encoder/model.safetensors" in story["killed"]
    assert story["killed"].items() <= story["whole"].items()


def test_a_failed_run_says_why_and_the_others_finish(story):
    failed = story["failed"]
    assert failed.returncode != 0
    assert "1 failed; each keeps its notebook, with the failing cell last" in failed.stderr
    assert "B11/03_fine_tuning.ipynb" in failed.stderr
    assert "can't write" in failed.stderr
    assert story["left"] == "in the way", "nothing that was there is overwritten"
    assert story["failed record"]["state"] == "failed"
    assert story["failed record"]["attempt"] == 1, "an error of the notebook is not tried again"
    assert any(output.output_type == "error" for output in story["failed notebook"].cells[-1].outputs)
    assert {"B8/results.parquet", "B8/segmentation.parquet", "none/results.parquet"} <= story["half"].keys()
    assert story["half"]["masks"] == {"none", "B8"}, "half a grid has its report"


def test_mended_only_what_is_missing_runs(story):
    assert story["mended"].returncode == 0, story["mended"].stderr[-3000:]
    assert story["mended"].stderr.startswith("begun\n"), "the log is whole: no notebook emptied it"
    assert set(pd.read_parquet(story["out"] / "results.parquet")["mask"]) == {"none", "B8", "B11"}
    same = {name for name, stamp in story["whole"].items() if story["half"].get(name) == stamp}
    assert {"B8/results.parquet", "B8/segmentation.parquet", "none/segmentation.parquet"} <= same
    assert not any(name.startswith("B11") for name in same)
    assert (story["out"] / "06_results.html").stat().st_size > 100_000


def test_nothing_is_left_to_do_then(story):
    assert story["again"].returncode == 0
    assert "Nothing to be done" in story["again"].stderr
    assert stamps(story["out"]) == story["whole"]


def test_every_run_leaves_a_record(story):
    out = story["out"]
    records = {str(path.relative_to(out)): execution.read_record(path) for path in out.rglob("0*.json")}
    assert {record["state"] for record in records.values()} == {"done"}
    assert len(records) == 12
    record = records["B8/04_scene_classification.json"]
    assert record["inputs"]["tiny/B8/encoder-seed0/model.safetensors"]
    assert record["parameters"]["mask"] == "B8"


def test_runs_have_a_gpu_each_and_never_two_share_one(story):
    """Two at a time, as `--resources gpu=2` says, each with half of the cores."""
    records = [execution.read_record(path) for path in story["out"].rglob("0*.json")]
    trained = [record for record in records if record["notebook"] not in ("01_data_exploration", "06_results")]
    assert {record["gpu"] for record in trained} == {"0", "1"}
    assert all(record["gpu"] is None for record in records if record not in trained)
    assert {record["threads"] for record in trained} == {max(1, os.cpu_count() // 2)}
    for gpu in ("0", "1"):
        times = sorted((record["started"], record["ended"]) for record in trained if record["gpu"] == gpu)
        assert all(before[1] <= after[0] for before, after in pairwise(times)), times


def plan(story, root=ROOT):
    """What would run, and the plan's words, after a change; nothing is run."""
    asked = run(story["folder"], "--dry-run", root=root)
    assert asked.returncode == 0, asked.stderr[-3000:]
    rules = re.findall(r"^(?:local)?rule (\w+):$.*?^    reason: (.*?)$", asked.stderr, flags=re.MULTILINE | re.DOTALL)
    return Counter(rule for rule, _ in rules if rule != "all"), asked.stderr


@pytest.mark.parametrize(
    ("line", "rerun", "said"),
    [
        ("head_epochs: 3", {"classify": 3, "results": 1}, "head_epochs = 2"),
        ("decoder_epochs: 2", {"segment": 3, "results": 1}, "decoder_epochs = 1"),
        ("epochs_one_band: 2", {"fine_tune": 3, "classify": 2, "segment": 2, "results": 1}, "epochs_one_band = 2"),
        ("track: tensorboard", {}, "Nothing to be done"),
    ],
)
def test_a_changed_parameter_re_runs_what_takes_it(line, rerun, said, story):
    name = line.split(":")[0]
    kept = [old for old in TINY.splitlines() if not old.startswith(f"{name}:")]
    (story["folder"] / "tiny.yaml").write_text("\n".join([*kept, line]))
    try:
        found, words = plan(story)
    finally:
        (story["folder"] / "tiny.yaml").write_text(TINY)
    assert found == rerun
    assert said in words, "the plan says why"


CODE = {
    "segmentation": {"segment": 3, "results": 1},
    "classification": {"classify": 3, "results": 1},
    "report.thesis": {"results": 1},
    "objectives": {"stand_in_encoder": 1, "fine_tune": 3, "classify": 3, "segment": 3, "results": 1},
}
FILES = {
    "packs/sample/pack.json": {"stand_in_encoder": 1, "fine_tune": 3, "classify": 3, "segment": 3, "results": 1},
    "tiny/B8/encoder-seed0/model.safetensors": {"classify": 1, "segment": 1, "results": 1},
    "tiny/encoder/model.safetensors": {"fine_tune": 3, "classify": 3, "segment": 3, "results": 1},
}


@pytest.fixture
def copied(tmp_path):
    """The root of a copy of the repository."""
    for part in ("bandmask", "notebooks", "params"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", tmp_path / "Snakefile")
    return tmp_path


def add(line, root, module):
    """To the end of a module in a copy of the repository."""
    path = root.joinpath("bandmask", *module.split(".")).with_suffix(".py")
    path.write_text(f"{path.read_text()}\n{line}\n")


@pytest.mark.parametrize("module", CODE)
def test_changed_code_re_runs_what_uses_it(module, story, copied):
    add("_REVISION = 2", copied, module)
    found, words = plan(story, copied)
    assert found == CODE[module]
    assert f"code of {module}: " in words


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_re_runs_what_reads_it(file, story):
    """And nothing else: what the case before had changed is as it was."""
    path = story["folder"] / file
    before = path.read_bytes()
    try:
        path.write_bytes(before + b" ")
        found, words = plan(story)
    finally:
        path.write_bytes(before)
    assert found == FILES[file]
    assert f"Updated input files: {path}" in words


def test_remarks_in_the_code_and_touched_files_re_run_nothing(story, copied):
    """Nor does what the cases above changed and put back."""
    for module in CODE:
        add("# only a remark", copied, module)
    for file in FILES:
        (story["folder"] / file).touch()
    assert plan(story, copied)[0] == {}


def test_the_report_alone_is_made_anew(story):
    before = stamps(story["out"])
    anew = run(story["folder"], "report_only=yes", "--forcerun", "results")
    assert anew.returncode == 0, anew.stderr[-3000:]
    changed = {name for name, stamp in stamps(story["out"]).items() if before[name] != stamp}
    assert changed == {"results.parquet", "06_results.html"}


def test_mistyped_parameter_stops_the_graph_before_it_starts(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY + "head_epoch: 3\n")
    done = run(tmp_path)
    assert done.returncode != 0
    assert "unknown parameter 'head_epoch'; did you mean 'head_epochs'" in done.stderr + done.stdout


def test_unwritable_outputs_are_named(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run(
        [sys.executable, "-c", "from bandmask import datasets; datasets.open_dataset('sample')"],
        env={**os.environ, "BANDMASK_OUTPUTS": str(tmp_path / "file")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "can't write" in done.stderr
    assert "set BANDMASK_OUTPUTS to another folder" in done.stderr
    assert (tmp_path / "file").read_text() == "in the way"


def test_what_goes_past_the_thesis_is_in_the_graph_where_it_is_asked_for(tmp_path):
    asked = 'beyond: ["any_band", "robustness", "faulty_bands"]\n'
    (tmp_path / "tiny.yaml").write_text(TINY + asked)
    planned = run(tmp_path, "--dry-run", "--quiet", "host")
    assert planned.returncode == 0, planned.stderr[-3000:]
    for rule, notebook in (("any_band", "08"), ("robustness", "09"), ("faulty_bands", "10")):
        assert f"rule {rule}:" in planned.stderr, notebook
    encoder = tmp_path / "tiny" / "any-band" / "encoder-seed0" / "model.safetensors"
    takes = planned.stderr.split("rule robustness:")[1].split("output:")[0]
    assert str(encoder) in takes, "the map waits for the encoder for every loss"
    (tmp_path / "tiny.yaml").write_text(TINY + asked.replace("robustness", "robust"))
    refused = run(tmp_path, "--dry-run")
    assert refused.returncode != 0
    assert "unknown in beyond: robust; available: any_band, robustness, faulty_bands" in refused.stderr
