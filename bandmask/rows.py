"""Images and targets of a pack, read row by row: what was read is the caller's, and nothing of the file stays mapped.

Pages that are touched through a memory map count as the process' memory for as long as the map is open, so an epoch
through it would grow to the size of the pack; and its page tables stay even where the pages are given back. Reading
into the caller's buffer costs the same copy and keeps nothing. A failing disk is an `OSError` here, where a process
that reads a memory map dies of SIGBUS.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref

import numpy as np

from bandmask.packs import Pack


class Rows:
    """An array whose rows are read from its file, if it is the memory map of one; else copied from memory."""

    def __init__(self, array: np.ndarray) -> None:
        """Open the file of a memory map anew; it is closed with this object."""
        self.array = array
        self._name, self._start, self._file = "", 0, -1
        whole = isinstance(array.base, mmap.mmap) and array.flags.c_contiguous  # a part of a map has another base
        if isinstance(array, np.memmap) and whole and hasattr(os, "preadv"):
            self._name, self._start = str(array.filename), array.offset
            self._file = os.open(self._name, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy rows to `out`, (len(rows), …) of the array's dtype, C-contiguous. Safe in several threads at a time.

        Raises:
            OSError: the file can't be read, or ends before these rows do.
        """
        if self._file < 0:
            out[...] = self.array[rows]
            return
        size = self.array[:1].nbytes
        into = memoryview(out.reshape(-1).view(np.uint8))
        for place, row in enumerate(rows.tolist()):
            self._read(into[place * size : (place + 1) * size], self._start + row * size)

    def _read(self, into: memoryview, offset: int) -> None:
        while into:  # a network file system may give less than was asked for
            try:
                got = os.preadv(self._file, [into], offset)
            except OSError as error:
                problem = f"can't read {self._name}: {error.strerror}; is its disk still there?"
                raise OSError(error.errno, problem) from error
            if not got:
                raise OSError(f"{self._name} ends early: the pack is damaged; delete its folder and pack again")
            into, offset = into[got:], offset + got


def open_rows(pack: Pack) -> tuple[Rows, Rows | None]:
    """Its images, and its targets if it has some.

    Raises:
        ValueError: the pack was made anew, another one, since it was opened: its labels would be of other images.
    """
    images, targets = Rows(pack.images), None if pack.targets is None else Rows(pack.targets)
    if isinstance(pack.images, np.memmap):
        card = json.loads((pack.path / "pack.json").read_text())  # read last: a pack comes to its place as a whole
        if any(card.get(key) != pack.card.get(key) for key in ("source_checksum", "options", "mean_dn")):
            raise ValueError(f"the pack {pack.path} was made anew while it was in use; open it again")
    return images, targets
