"""Files of keys and values: blocks of equal size in a file that has no name.

Rules:
1. A file is opened without a name (O_TMPFILE; elsewhere its name is taken away at once), so nobody can remove or meet it, and the system
   gives its space back when the process ends, however it ends.
2. A block is written once and read by every store that holds its `Block`.  When the last of them lets it go, its slot is free again.
3. A block is read with its checksum every time: what a disk, a cable or memory changed is noticed, not attended to.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcompile.ir.errors import CapacityError, Problem

Bytes = npt.NDArray[np.uint8]

_PAGE_WORDS = 512
_IN_MEMORY = ("tmpfs", "ramfs")
_NOT_KNOWN = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system that cannot reserve room


@dataclass(eq=False)
class Block:
    """One block of a file; its slot is given back with it."""

    file: BlockFile
    slot: int
    checksum: int

    def __del__(self) -> None:
        self.file.returned.append(self.slot)


@dataclass(eq=False)
class BlockFile:
    """A file of blocks of `block_bytes`, for one store to write and any number to read.

    folder: where it lies; None: `default_folder()`.  returned: slots that nobody reads any more.
    Raises CapacityError where no file can be made.
    """

    folder: str | None
    block_bytes: int
    returned: deque[int] = field(default_factory=deque, repr=False)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # a fork reads what its parent writes, and may do so in another thread
        self._free: list[int] = []  # a heap: the lowest slot is written first, so that what follows in the context follows in the file
        self._end = 0  # slots from here on were never written
        self._reserved = 0  # slots below have room on the disk
        try:
            where = default_folder() if self.folder is None else Path(self.folder).expanduser()
            where.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(prefix="kvcompile-", dir=where) as file:
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise self._refused("no file for keys and values can be made", error) from error
        weakref.finalize(self, os.close, self._descriptor)

    def reserve(self, blocks: int) -> None:
        """Room on the disk for so many more blocks, where the file system can promise it.  Raises CapacityError, having taken none."""
        with self._lock:
            self._reserve(blocks)

    def _reserve(self, blocks: int) -> None:
        self._collect()
        needed = self._end + max(0, blocks - len(self._free))
        if needed <= self._reserved or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._descriptor, self._reserved * self.block_bytes, (needed - self._reserved) * self.block_bytes)
        except OSError as error:
            if error.errno in _NOT_KNOWN:
                return
            self._reclaim()
            more = (needed - self._end) * self.block_bytes
            raise self._refused(f"{more} bytes ({more / 2**20:.1f} MiB) more for keys and values have no room", error) from error
        self._reserved = needed

    def write(self, block: Bytes) -> Block:
        """A new block.  Raises CapacityError, having written none, where there is no room."""
        with self._lock:
            return self._write(block)

    def _write(self, block: Bytes) -> Block:
        assert block.nbytes == self.block_bytes
        self._collect()
        slot = heapq.heappop(self._free) if self._free else self._end
        self._end = max(self._end, slot + 1)
        self._reserved = max(self._reserved, self._end)
        kept = Block(self, slot, checksum(block))
        rest, at = memoryview(block.data), slot * self.block_bytes
        try:
            while rest:
                written = os.pwrite(self._descriptor, rest, at)
                rest, at = rest[written:], at + written
        except OSError as error:
            raise self._refused(f"a block of {self.block_bytes} bytes of keys and values was not written", error) from error
        return kept

    def read(self, slot: int, memory: Bytes) -> str | None:
        """Fills `memory` with the blocks from `slot` on; why not, if that fails."""
        rest, at = memoryview(memory.data), slot * self.block_bytes
        try:
            while rest:
                count = os.preadv(self._descriptor, [rest], at)
                if count == 0:
                    return "the file ends before them"
                rest, at = rest[count:], at + count
        except OSError as error:
            return f"{error.strerror}"
        return None

    def reclaim(self, keep_reserved: bool = False) -> None:
        """Gives the system what lies behind the last block that is read; keep_reserved: but not where its writer has reserved room."""
        with self._lock:
            if not (keep_reserved and self._reserved > self._end):
                self._reclaim()

    def _reclaim(self) -> None:
        self._collect()
        self._free.sort()
        while self._free and self._free[-1] == self._end - 1:
            self._free.pop()
            self._end -= 1
        with contextlib.suppress(OSError):  # then it stays until the file goes
            os.ftruncate(self._descriptor, self._end * self.block_bytes)
            self._reserved = self._end

    def _collect(self) -> None:
        while self.returned:  # filled by whatever thread the collector runs in
            heapq.heappush(self._free, self.returned.popleft())

    def _refused(self, what: str, error: OSError) -> CapacityError:
        where = str(self.folder or "the folder for temporary files")
        mend = "Free some of it, or name a folder of another disk: target: {disk: FOLDER}."
        if error.errno == errno.EFBIG:
            mend = "Raise the largest size of a file (`ulimit -f unlimited`), or use a file system of larger files."
        elif error.errno == errno.EMFILE:
            mend = "Raise the number of open files (`ulimit -n`): a session has one for each group of heads on disk."
        elif error.errno != errno.ENOSPC:
            mend = "Name a folder that can be written: target: {disk: FOLDER}."
        return CapacityError(Problem(where, f"{what}: {error.strerror}. The call is taken back: the session lost nothing.", mend))


def checksum(block: Bytes) -> int:
    """The sum of a block's 64-bit words, those of each page of 4096 bytes times an odd number of its own.

    Any change within one word changes it, and so do pages that are exchanged or lie elsewhere; words that change places within a page do
    not.  It costs a tenth of a CRC-32's time, so that every read can be held against it (docs/disk_tier.md).
    """
    words = block.view(np.uint64)
    whole = len(words) // _PAGE_WORDS * _PAGE_WORDS
    sums = words[:whole].reshape(-1, _PAGE_WORDS).sum(1)
    odd = 2 * np.arange(len(sums), dtype=np.uint64) + 1
    return (int((sums * odd).sum()) + int(words[whole:].sum())) % 2**64


def default_folder() -> Path:
    """The folder for temporary files; where that lies in memory, ~/.cache/kvcompile, and then the working folder."""
    for folder in (Path(tempfile.gettempdir()), Path.home() / ".cache" / "kvcompile"):
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        if not lies_in_memory(existing) and os.access(existing, os.W_OK | os.X_OK):
            return folder
    return Path.cwd()


def lies_in_memory(folder: Path) -> bool:
    """Whether a folder is on a file system that keeps its files in memory."""
    if sys.platform != "linux":
        return False
    resolved = folder.resolve()
    found: tuple[int, str] = (-1, "")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, mount, kind, *_ = line.split(" ")
        point = Path(mount.replace("\\040", " "))
        if resolved.is_relative_to(point) and len(point.parts) >= found[0]:
            found = (len(point.parts), kind)
    return found[1] in _IN_MEMORY


def runs_of(blocks: Sequence[Block]) -> list[tuple[BlockFile, int, int]]:
    """(file, first slot, blocks) of blocks that lie one behind the other."""
    runs: list[tuple[BlockFile, int, int]] = []
    for block in blocks:
        if runs and runs[-1][0] is block.file and runs[-1][1] + runs[-1][2] == block.slot:
            runs[-1] = (block.file, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((block.file, block.slot, 1))
    return runs
