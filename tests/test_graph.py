"""The graph of notebooks under faults, run for real: killed, failing, and with nothing left to do."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from bandmask import files

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


def snakemake(tmp_path, *arguments):
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)),
        *("--cores", "all", "--keep-going", "--rerun-incomplete", "--quiet", "progress"),
        *("--config", f"experiment={tmp_path / 'tiny.yaml'}", *arguments),
    ]


def environment(tmp_path):
    return {**os.environ, "BANDMASK_OUTPUTS": str(tmp_path)}


def run(tmp_path, *arguments):
    """Run the graph with its output in a file, as people do overnight; `stderr` is what the file then holds."""
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        file.write("begun\n")
        file.flush()
        done = subprocess.run(
            snakemake(tmp_path, *arguments),
            env=environment(tmp_path),
            stdout=file,
            stderr=file,
            timeout=900,
            check=False,
        )
    return subprocess.CompletedProcess(done.args, done.returncode, "", log.read_text())


def test_a_graph_survives_a_kill_and_a_failing_run(tmp_path):
    """Killed with SIGKILL while fine-tuning; then one run fails and the others finish; then all is mended."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    out = tmp_path / "tiny"

    # 1. kill -9 of the whole process group once the encoder is there
    started = subprocess.Popen(
        snakemake(tmp_path),
        env=environment(tmp_path),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while (
        not (out / "none" / "04_scene_classification.ipynb").exists()
        and not (out / "B8" / "03_fine_tuning.ipynb").exists()
    ):
        assert time.monotonic() < deadline, "the graph never got to its second run"
        assert started.poll() is None, "the graph ended early"
        time.sleep(0.2)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    encoder_written = (out / "encoder" / "model.safetensors").stat().st_mtime_ns

    # 2. a damaged checkpoint makes one run fail; the rest goes on
    checkpoint = out / "B11" / "checkpoints" / "fine_tuning-seed0.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_bytes(b"half a checkpoint")
    unlocked = subprocess.run(
        [*snakemake(tmp_path), "--unlock"], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert unlocked.returncode == 0, unlocked.stderr
    failed = run(tmp_path)
    assert failed.returncode != 0
    assert "1 failed" in failed.stderr
    assert "B11" in failed.stderr
    assert "03_fine_tuning.ipynb" in failed.stderr
    assert "is damaged" in failed.stderr
    assert (out / "B11" / "03_fine_tuning.ipynb").exists(), "a failed run keeps its notebook"
    assert checkpoint.read_bytes() == b"half a checkpoint", "nothing that was there is overwritten"
    assert (out / "B8" / "results.parquet").exists(), "the other run goes on"
    assert set(pd.read_parquet(out / "results.parquet")["mask"]) == {"none", "B8"}, "half a grid has its report"
    assert (out / "encoder" / "model.safetensors").stat().st_mtime_ns == encoder_written, (
        "what is done is not done again"
    )

    # 3. mended: only what is missing runs
    checkpoint.unlink()
    finished = (out / "B8" / "results.parquet").stat().st_mtime_ns
    mended = run(tmp_path)
    assert mended.returncode == 0, mended.stderr[-3000:]
    assert mended.stderr.startswith("begun\n"), "the log is whole: no notebook emptied it"
    assert set(pd.read_parquet(out / "results.parquet")["mask"]) == {"none", "B8", "B11"}
    assert (out / "B8" / "results.parquet").stat().st_mtime_ns == finished
    assert (out / "06_results.html").stat().st_size > 100_000

    # 4. nothing to do
    again = run(tmp_path)
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout + again.stderr

    # 5. the report alone, made anew
    report = (out / "06_results.html").stat().st_mtime_ns
    anew = run(tmp_path, "report_only=yes", "--forcerun", "results")
    assert anew.returncode == 0, anew.stderr[-3000:]
    assert (out / "06_results.html").stat().st_mtime_ns > report
    assert (out / "B8" / "results.parquet").stat().st_mtime_ns == finished


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
