"""Reserved address space: buffers as long as a context may become, which take memory only for the pages written.

An own mmap and not torch.empty: freed malloc blocks raise glibc's mmap threshold, after which later blocks come from
the heap and never go back.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys

import torch
from torch import Tensor

from kvcompile.ir.errors import CapacityError

ON_LINUX = sys.platform == "linux"
PAGE_BYTES = mmap.PAGESIZE
MAP_NORESERVE = 0x4000  # Linux, every architecture torch runs on; the mmap module does not name it before Python 3.13
MADV_DONTNEED = 4
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_COLLAPSE = 25  # Linux 6.1
HUGE_PAGE_BYTES = 1 << 21


def reserve(nbytes: int) -> Tensor:
    """`nbytes` of zeroed address space, uint8 [nbytes], page-aligned; memory is taken page by page on first write.

    Given back when the last tensor that views it dies.  Huge pages are refused for it, as they would round every buffer
    up to 2 MiB: `collapse` makes some of what is full.  0 bytes is an empty tensor.  Elsewhere than on Linux: plain torch.empty.
    Raises CapacityError when the system refuses (`ulimit -v`, vm.overcommit_memory = 2).
    """
    assert nbytes >= 0, nbytes
    if nbytes == 0 or not ON_LINUX:
        return torch.empty(nbytes, dtype=torch.uint8)
    try:
        region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except (OSError, OverflowError, ValueError) as refusal:
        raise CapacityError.at(
            "address space",
            f"the system refused {nbytes} bytes ({nbytes / 2**20:.1f} MiB) for keys and values: {refusal}.",
            "Raise the limit (`ulimit -v unlimited`; vm.overcommit_memory 0 or 1), or declare a smaller context.",
        ) from refusal
    space = torch.frombuffer(region, dtype=torch.uint8)  # holds the only reference to the mapping
    _advise(space.data_ptr(), nbytes, MADV_NOHUGEPAGE)
    return space


def collapse(written: Tensor) -> int:
    """Puts the whole huge pages inside `written` into huge pages, whose addresses a processor finds quicker, and returns their bytes.

    written: a contiguous view of a reserved buffer, every byte of which holds memory already: so nothing grows.  0 where the system
    cannot, or has not enough of them for all.
    """
    assert written.is_contiguous()
    start = -(-written.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (written.data_ptr() + written.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if end <= start or not ON_LINUX:
        return 0
    done = _advise(start, end - start, MADV_HUGEPAGE) and _advise(start, end - start, MADV_COLLAPSE)
    _advise(start, end - start, MADV_NOHUGEPAGE)  # what is given back and written again comes page by page
    return end - start if done else 0


def release_tail(tail: Tensor) -> int:
    """Gives the whole pages inside `tail` back to the system and returns how many bytes that were.

    tail: a contiguous view of a reserved buffer whose contents nobody needs any more; it reads as zeros or as the old
    bytes afterwards.  The first page is kept if it is shared with bytes before the tail, the last likewise.
    """
    assert tail.is_contiguous()
    start = -(-tail.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    end = (tail.data_ptr() + tail.nbytes) // PAGE_BYTES * PAGE_BYTES
    if end <= start or not ON_LINUX:
        return 0
    return end - start if _advise(start, end - start, MADV_DONTNEED) else 0


def _advise(address: int, nbytes: int, advice: int) -> bool:
    return bool(_libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice) == 0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
