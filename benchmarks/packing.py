"""Packing a generated SEN12MS tree: patches per second, peak memory by number of patches, killed and resumed.

Run:  python benchmarks/packing.py --folder /path/on/a/large/disk   (2,000 patches: about 9 GB)

The tree is generated, no satellite saw it: 16 × 16-px checks of random codes and noise around a spectrum, in the
official layout and at the real size. `--distinct` files of each kind are written; each further patch is a copy of one
of them, so that as many bytes are read as of real data, from the page cache if memory holds them. Each packing has a
process of its own, whose peak memory the kernel says when it ends. Killed means kill -9.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from bandmask import files

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from trees import generated_codes, generated_image, lc_file, s2_file, write_tif  # noqa: E402

SCENES = 25
PACK = """
import json, resource, sys, time
from bandmask.datasets import pack_sen12ms
count = int(sys.argv[3])
started = time.monotonic()
pack = pack_sen12ms(sys.argv[1], sys.argv[2], max_patches=count)
seconds = time.monotonic() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"patches": len(pack.images), "seconds": seconds, "peak MiB": peak}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=2000)
    parser.add_argument("--distinct", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=None, help="a disk with room for tree and packs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        started = time.monotonic()
        tree = generate(Path(folder) / "sen12ms", options.patches, options.distinct)
        print(f"generated {options.patches:,} patches in {time.monotonic() - started:.0f} s", flush=True)
        print(measure(Path(folder), tree, options.patches).to_markdown(index=False, floatfmt=",.1f"))


def generate(root: Path, patches: int, distinct: int) -> Path:
    """A generated tree of so many pairs, in `SCENES` scenes."""
    kinds = {s2_file: generated_image, lc_file: generated_codes}
    for place, make in kinds.items():
        first = [write_tif(place(root, 0, i), make(256, seed=i)) for i in range(distinct)]
        for number in range(patches):
            file = place(root, 1 + number % SCENES, 1 + number // SCENES)
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(first[number % distinct], file)
        shutil.rmtree(first[0].parent)
    return root


def measure(folder: Path, tree: Path, patches: int) -> pd.DataFrame:
    """A row a packing: a quarter of the patches, all of them, and all of them killed half-way and resumed."""
    rows = [{"packing": "a quarter", **pack(tree, folder / "quarter", max(3, patches // 4))}]
    shutil.rmtree(folder / "quarter")
    rows.append({"packing": "all", **pack(tree, folder / "all", patches)})
    expected = checksums(folder / "all")
    shutil.rmtree(folder / "all")  # the disk holds one pack and its partial, no more
    read = kill_half_way(tree, folder / "killed", patches)
    resumed = pack(tree, folder / "killed", patches)
    same = checksums(folder / "killed") == expected
    resumed["patches"] -= read
    rows.append({"packing": f"all, killed: {read:,} patches were safe; the rest, resumed", **resumed})
    print(f"the resumed pack is {'the same, byte for byte' if same else 'ANOTHER ONE: this is a bug'}\n")
    table = pd.DataFrame(rows)
    table.insert(2, "patches/s", table["patches"] / table["seconds"])
    return table


def pack(tree: Path, path: Path, patches: int) -> dict[str, float]:
    """Pack in a process of its own; what it says of itself."""
    command = [sys.executable, "-c", PACK, str(tree), str(path), str(patches)]
    return dict(json.loads(subprocess.check_output(command, cwd=ROOT, text=True)))


def kill_half_way(tree: Path, path: Path, patches: int) -> int:
    """Kill -9 a packing once half of it is noted; the number of patches that are safe then."""
    note = path.with_name(f".{path.name}.packing") / "progress.json"
    command = [sys.executable, "-c", PACK, str(tree), str(path), str(patches)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if note.exists() and json.loads(note.read_text())["read"] >= patches / 2:
                process.kill()
                break
            time.sleep(0.02)
    return int(json.loads(note.read_text())["read"])


def checksums(path: Path) -> dict[str, str]:
    return {file.name: files.sha256(file) for file in sorted(path.glob("[!.]*"))}


if __name__ == "__main__":
    main()
