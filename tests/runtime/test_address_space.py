"""Reserved address space: lazy, given back, refused with a clear error.  Measured in a process of its own."""

import ctypes
import json
import subprocess
import sys

import pytest
import torch

from kvcompile.ir.errors import CapacityError
from kvcompile.runtime import address_space

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")

MEASURE = """
import json, mmap, torch
from kvcompile.runtime.address_space import reserve, release_tail
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.ring import RingStore
def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE
def fill(stores, tokens):  # in a session's order: chunk by chunk, in each chunk layer by layer
    for first in range(0, tokens, 64):
        new = min(64, tokens - first)
        for store in stores:
            store.extend(source[:, :new], source[:, :new])
source = torch.randn(3, 64, 64, dtype=torch.bfloat16)
keep = [RingStore(3, 64, 64, torch.bfloat16, 16, 256), GrowableStore(3, 64, 64, torch.bfloat16, 131072)]
fill(keep, 700)
result = {}
def measure(name, make, count, tokens=0):
    before = resident()
    stores = [make() for _ in range(count)]
    fill(stores, tokens)
    result[name] = [resident() - before, sum(store.nbytes() for store in stores)]
    keep.append(stores)
    return stores
measure("rings", lambda: RingStore(3, 64, 64, torch.bfloat16, 16, 256), 240, 700)
growable = measure("growable", lambda: GrowableStore(3, 64, 64, torch.bfloat16, 131072), 20, 2000)
measure("forks", lambda: keep[1].fork(), 200)
measure("reserved", lambda: GrowableStore(3, 64, 64, torch.bfloat16, 131072), 20)
before = resident()
for store in growable:
    store.rollback(1500)
result["rolled back"] = [before - resident(), 20 * 1500 * 3 * 128 * 2]
space = reserve(64 << 20)
space.fill_(1)
before = resident()
released = release_tail(space[100:])
result["release_tail"] = [before - resident(), released]
del space
before = resident()
space = reserve(64 << 20)
space.fill_(1)
del space
result["died"] = [resident() - before, 0]
print(json.dumps(result))
"""

LIMIT = """
import resource, torch
from kvcompile.ir.errors import CapacityError
from kvcompile.runtime.growable import GrowableStore
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), used + (512 << 20)))  # what `ulimit -v` sets
small, large = GrowableStore(2, 64, 64, torch.float32, 65536), GrowableStore(2, 64, 64, torch.float32, 4194304)
new = torch.randn(2, 3, 64)
print(len(small.extend(new, new)), small.tokens)
try:
    large.extend(new, new)
except CapacityError as error:
    print(error)
print(large.tokens, large.nbytes(), large.spans())
"""


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120).stdout


@needs_linux
def test_a_process_grows_by_what_the_stores_say_and_shrinks_on_rollback():
    """Trap 12: measured, not computed."""
    result = json.loads(run(MEASURE))
    for name in ("rings", "growable"):
        grown, told = result[name]
        assert told > 10e6
        assert grown == pytest.approx(told, rel=0.05), name
    assert result["rings"][1] == 240 * 272 * 3 * 128 * 2
    assert result["forks"][1] == 0
    assert result["forks"][0] < 1e6
    assert result["reserved"][0] < 1e6
    freed, promised = result["rolled back"]
    assert freed == pytest.approx(promised, rel=0.02)
    freed, released = result["release_tail"]
    assert released == (64 << 20) - 4096 or address_space.PAGE_BYTES != 4096
    assert freed == pytest.approx(released, rel=0.05)
    assert result["died"][0] < 1e6


@needs_linux
def test_a_limit_on_address_space_is_a_clear_error_and_breaks_nothing():
    lines = run(LIMIT).splitlines()
    assert lines[0] == "1 3"
    assert lines[1].startswith("address space: the system refused 4294967296 bytes (4096.0 MiB) for keys and values: ")
    assert "Cannot allocate memory" in lines[1]
    assert lines[2] == "  Raise the limit (`ulimit -v unlimited`; vm.overcommit_memory 0 or 1), or declare a smaller context."
    assert lines[3] == "0 0 ()"


@needs_linux
def test_more_than_the_machine_can_address_is_refused():
    with pytest.raises(CapacityError, match="the system refused 1152921504606846976 bytes"):
        address_space.reserve(1 << 60)
    with pytest.raises(CapacityError, match="the system refused"):
        address_space.reserve(1 << 70)


def test_reserved_bytes_read_as_zero_and_keep_what_is_written():
    space = address_space.reserve(100_000)
    assert space.dtype == torch.uint8
    assert space.shape == (100_000,)
    space[50_000:60_000] = 7
    assert space[50_000:60_000].eq(7).all()
    assert address_space.reserve(0).numel() == 0


def test_a_view_keeps_the_space_alive():
    view = address_space.reserve(1 << 16)[5:10]
    view[:] = 3
    assert view.tolist() == [3] * 5


def test_release_keeps_every_byte_before_the_tail():
    space = address_space.reserve(10 * address_space.PAGE_BYTES)
    space.fill_(9)
    edge = 3 * address_space.PAGE_BYTES + 17
    address_space.release_tail(space[edge:])
    assert space[:edge].eq(9).all()
    assert address_space.release_tail(space[edge : edge + 100]) == 0
    assert address_space.release_tail(space[edge:edge]) == 0


def test_elsewhere_than_on_linux_it_is_plain_memory(monkeypatch):
    monkeypatch.setattr(address_space, "ON_LINUX", False)
    space = address_space.reserve(1 << 16)
    space.fill_(4)
    assert address_space.release_tail(space) == 0
    assert space.eq(4).all()


@needs_linux
def test_huge_pages_keep_what_is_written_and_take_no_more_memory():
    huge = address_space.HUGE_PAGE_BYTES
    space = address_space.reserve(8 * huge)
    written = space[: 4 * huge + 12345]
    written.random_(0, 256, generator=torch.Generator().manual_seed(0))
    before = written.clone()
    moved = address_space.collapse(written)
    assert moved in (0, 3 * huge, 4 * huge)  # 0: the system has none to give
    assert written.equal(before)
    assert address_space.collapse(space[: huge // 2]) == 0
    assert _resident(space) <= written.nbytes + 4096
    assert address_space.release_tail(written[huge // 2 :]) > 3 * huge
    assert _resident(space) <= huge // 2 + 4096
    space[huge : huge + 1] = 1  # what was given back comes back page by page
    assert _resident(space) <= huge // 2 + 3 * 4096


def _resident(space):
    """Bytes of memory that a region's pages take."""
    pages = -(-space.nbytes // 4096)
    held = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(space.data_ptr()), ctypes.c_size_t(space.nbytes), held) == 0
    return 4096 * sum(page & 1 for page in held)
