"""What is written is whole or not there: failures, kills, full and read-only disks leave the old file and no litter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bandmask import files


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def write_folder(path: Path, text: str) -> None:
    with files.writing(path) as partial:
        partial.mkdir()
        (partial / "part").write_text(text)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1), OSError(28, "disk full")])
def test_a_failing_block_leaves_the_old_file_and_folder_and_no_litter(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "file").write_text("old")
    write_folder(tmp_path / "folder", "old")

    def fail(folder: bool) -> None:
        with files.writing(tmp_path / ("folder" if folder else "file")) as partial:
            if folder:
                partial.mkdir()
            (partial / "part" if folder else partial).write_text("half")
            raise error

    for folder in (True, False):
        with pytest.raises(type(error)):
            fail(folder)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "part").read_text() == "old"
    assert listing(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("name", ["file", "run[1]"])
def test_a_killed_writer_leaves_the_old_file_and_the_next_writer_sweeps(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    target.write_text("old")
    script = (
        "import sys, time\nfrom bandmask import files\n"
        "with files.writing(sys.argv[1]) as partial:\n"
        "    partial.write_text('half'); print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with files.writing(target) as partial:  # a living writer's partial file is not swept by another one
                partial.write_text("ours")
            assert len(listing(tmp_path)) == 2
        finally:
            process.kill()
    assert target.read_text() == "ours"
    assert len(listing(tmp_path)) == 2, "the killed writer's partial file is still there"
    with files.writing(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"
    assert listing(tmp_path) == [name]


def test_a_folder_stepped_aside_by_a_killed_writer_is_put_back(tmp_path: Path) -> None:
    """Killed between the two renames: the old folder is aside, the new one whole but not yet renamed."""
    write_folder(tmp_path / "folder", "old")
    script = (
        "import os, signal, sys\nfrom bandmask import files\nreplace = os.replace\n"
        "def killed(source, target):\n"
        "    if str(target) == sys.argv[1]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(source, target)\n"
        "os.replace = killed\n"
        "with files.writing(sys.argv[1]) as partial: partial.mkdir()"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "folder")], check=False)
    assert not (tmp_path / "folder").exists()
    with pytest.raises(ValueError, match="no"), files.writing(tmp_path / "folder"):
        raise ValueError("no")
    assert (tmp_path / "folder" / "part").read_text() == "old"
    assert listing(tmp_path) == ["folder"]


def test_a_writer_in_another_pid_namespace_is_no_corpse(tmp_path: Path) -> None:
    """Its process number means nothing here, and ours nothing there; its lock is asked."""
    target = tmp_path / "file"
    script = (
        "import sys\nfrom bandmask import files\nwith files.writing(sys.argv[1]) as partial:\n"
        "    partial.write_text('theirs'); print('ready', flush=True); sys.stdin.readline()"
    )
    enter = ["unshare", "--user", "--map-root-user", "--pid", "--fork", sys.executable, "-c", script, str(target)]
    with subprocess.Popen(enter, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            pytest.skip("`unshare` makes no PID namespace for this user here")
        with files.writing(target) as partial:
            partial.write_text("ours")
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(60) == 0, "it was not swept away"
    assert target.read_text() == "theirs"
    assert listing(tmp_path) == ["file"]


def test_a_lock_is_held_by_one_and_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    lock = files.free_lock(tmp_path / "lock")
    assert lock is not None
    assert files.free_lock(tmp_path / "lock") is None
    lock.release()
    (tmp_path / "precious").write_text("do not empty me")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="link"):
        files.free_lock(tmp_path / "link")
    assert (tmp_path / "precious").read_text() == "do not empty me"


MADE = {"parameters": {"lr": 0.1}, "code": {"masks": "1"}, "inputs": {"pack.json": "2"}}
LEFT = {"rows.parquet": "3"}
RECORD = {"state": "done", "error": None, **MADE, "outputs": LEFT}


@pytest.mark.parametrize(
    ("record", "made", "left", "said"),
    [
        (RECORD, {}, {}, ""),
        ({**RECORD, "state": "outdated"}, {}, {}, ""),
        ({}, {}, {}, "no record"),
        (RECORD, {"parameters": {"lr": 0.2}}, {}, "lr = 0.2, was 0.1"),
        (RECORD, {"parameters": {"lr": 0.1, "new": 1}}, {}, "new = 1, was None"),
        (RECORD, {"code": {"masks": "9"}}, {}, "code of masks changed"),
        (RECORD, {"code": {}}, {}, "code of masks changed"),
        (RECORD, {"inputs": {"pack.json": None}}, {}, "reads pack.json"),
        (RECORD, {}, {"rows.parquet": None}, "rows.parquet is gone"),
        (RECORD, {}, {"rows.parquet": "4"}, "rows.parquet is not what was written"),
        (RECORD, {}, {"more.parquet": "4"}, "more.parquet is not"),
        ({**RECORD, "state": "failed", "error": "ValueError: no"}, {}, {}, "failed: ValueError: no"),
        ({**RECORD, "state": "running"}, {}, {}, "running: it has not ended"),
        ({**RECORD, "state": ["done"]}, {}, {}, "has not ended"),
        ({"state": "done", "outputs": {}}, {}, {}, "lr = 0.1, was None"),
    ],
)
def test_a_record_says_why_a_node_must_run(record, made, left, said):
    found = files.stale(record, {**LEFT, **left}, **{**MADE, **made})
    assert said in found
    assert bool(said) == bool(found)


def test_what_a_record_does_not_vouch_for_is_distrusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "B8" / "encoder-seed0" / "model.safetensors"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"weights")
    assert files.distrust(made) == "", "made by hand: no record"
    record = tmp_path / "B8" / "03_fine_tuning.json"
    name = "encoder-seed0/model.safetensors"
    for state, outputs, said in (
        ("done", {name: files.sha256(made)}, ""),
        ("done", {name: "0" * 64}, "03_fine_tuning: encoder-seed0/model.safetensors is not what was written"),
        ("outdated", {name: files.sha256(made)}, "03_fine_tuning: outdated"),
        ("failed", {name: None}, "03_fine_tuning: failed"),
        ("running", {"other.parquet": None}, ""),
    ):
        record.write_text(json.dumps({"state": state, "outputs": outputs}))
        assert said in files.distrust(made)
        assert bool(said) == bool(files.distrust(made))
    record.write_text(json.dumps({"state": "running", "outputs": {name: None}}))
    assert "03_fine_tuning: running" in files.distrust(made)
    monkeypatch.setenv("BANDMASK_RECORD", str(record))
    assert files.distrust(made) == "", "the run that is being recorded reads what it just left"


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two renames fails; no real disk does this at will, so `os.replace` is replaced."""
    write_folder(tmp_path / "folder", "old")
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "folder" and not str(source).endswith("~old"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="can't write"):
            write_folder(tmp_path / "folder", "new")
    assert listing(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "part").read_text() == "old"
    write_folder(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "part").read_text() == "new"
    assert listing(tmp_path) == ["folder"]


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_place_that_can_not_be_a_folder_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    target = tmp_path / below / "table.txt"
    message = f"can't write {re.escape(str(target))}.*BANDMASK_OUTPUTS"
    with pytest.raises(OSError, match=message), files.writing(target) as partial:
        partial.write_text("new")
    assert listing(tmp_path) == ["file"]


def test_a_full_disk_is_named_and_leaves_the_old_file_and_no_litter(on_small_disk) -> None:
    script = (
        "import os\nfrom bandmask import files\n"
        "open('table.txt', 'w').write('old')\n"
        "try:\n    with files.writing('table.txt') as partial: partial.write_bytes(bytes(5 << 20))\n"
        "except OSError as error: print(error)\n"
        "print(os.listdir(), open('table.txt').read())"
    )
    answer = on_small_disk(script)
    assert "can't write table.txt: No space left on device" in answer.stdout, answer.stderr
    assert answer.stdout.endswith("['table.txt'] old\n")


def test_a_source_that_can_not_be_read_is_not_blamed_on_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, files.writing(tmp_path / "pack"):
        (tmp_path / "missing.tif").read_bytes()
    assert "can't write" not in str(error.value)
    assert "missing.tif" in str(error.value)


def test_outputs_and_data_lie_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path))
    assert files.outputs_root() == files.data_root() == tmp_path
    monkeypatch.setenv("BANDMASK_OUTPUTS", "")
    monkeypatch.chdir(tmp_path)  # notebooks run elsewhere
    assert files.outputs_root() == files.project_root() / "outputs"
    assert (files.project_root() / "pyproject.toml").is_file()
    monkeypatch.delenv("BANDMASK_DATA")
    monkeypatch.setattr(files, "project_root", lambda: tmp_path / "project")
    assert files.data_root() is None
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert files.data_root() == tmp_path / "shared" / "data"
