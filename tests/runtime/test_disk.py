"""The store on disk against a store in memory, and what happens when the disk fails."""

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from kvcompile.ir.errors import CapacityError, SessionError
from kvcompile.ir.store_bytes import DISK_BLOCK_TOKENS as BLOCK
from kvcompile.ir.store_bytes import STAGED_BLOCKS
from kvcompile.runtime import block_file
from kvcompile.runtime.attend import attend_spans
from kvcompile.runtime.attend_held import attend_held
from kvcompile.runtime.block_file import BlockFile, checksum, default_folder, lies_in_memory
from kvcompile.runtime.disk import STAGED_TOKENS, DiskStore, LostTokens
from kvcompile.runtime.growable import GrowableStore

HEADS, HEAD_DIM, VALUE_DIM = 2, 8, 12
SHAPE = (HEADS, HEAD_DIM, VALUE_DIM)


def on_disk(dtype=torch.float32, layout="rows", folder=None):
    return DiskStore(*SHAPE, dtype, folder, layout, "layers.3")


def some(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, tokens, HEAD_DIM, generator=generator), torch.randn(HEADS, tokens, VALUE_DIM, generator=generator)


def filled(tokens, chunk=None, **options):
    store = on_disk(**options)
    key, value = some(tokens)
    for at in range(0, tokens, chunk or max(tokens, 1)):
        store.append(key[:, at : at + (chunk or tokens)], value[:, at : at + (chunk or tokens)])
    return store, key, value


def assert_holds(store, key, value):
    assert store.tokens == key.shape[1]
    at = 0
    for span in store.spans():
        assert span.first == at
        assert torch.equal(span.key_HTD, key[:, at : span.end]) and torch.equal(span.value_HTE, value[:, at : span.end])
        at = span.end
    assert at == store.tokens
    assert store.disk_nbytes() == store.tokens // BLOCK * store.form.bytes
    assert store.nbytes() == (store.form.bytes if store.tokens else 0)


def damage(store, token, bit=3):
    """Turns one bit over in the file, of the block that holds `token`."""
    block = store._blocks[token // BLOCK]
    at = block.slot * store.form.bytes + 17
    (byte,) = os.pread(block.file._descriptor, 1, at)
    os.pwrite(block.file._descriptor, bytes([byte ^ 1 << bit]), at)


@pytest.mark.parametrize("tokens", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, STAGED_TOKENS - 1, STAGED_TOKENS, STAGED_TOKENS + 1, 2600])
@pytest.mark.parametrize("chunk", [7, BLOCK, None])
def test_tokens_come_back_at_every_border(tokens, chunk):
    store, key, value = filled(tokens, chunk)
    assert_holds(store, key, value)


_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("dtype", "layout"), [*((dtype, layout) for dtype in _DTYPES for layout in ("rows", "blocks")), (torch.float64, "rows")]
)
def test_tokens_are_kept_in_the_store_s_dtype_and_layout(dtype, layout):
    store, key, value = filled(BLOCK + 40, 33, dtype=dtype, layout=layout)
    assert_holds(store, key.to(dtype), value.to(dtype))


def test_ranges_are_read_from_both_sides_of_a_border():
    store, key, value = filled(2 * STAGED_TOKENS + 30)
    for first, end in [(0, 1), (BLOCK - 1, BLOCK + 1), (200, 1300), (STAGED_TOKENS, store.tokens), (store.tokens - 3, store.tokens)]:
        (span,) = store.spans_between(first, end)
        assert (span.first, span.end) == (first, end)
        assert torch.equal(span.key_HTD, key[:, first:end]) and torch.equal(span.value_HTE, value[:, first:end])
    assert store.spans_between(5, 5) == ()


@pytest.mark.parametrize("seed", range(8))
def test_random_histories_equal_a_store_in_memory(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    family = [(on_disk(), GrowableStore(*SHAPE, torch.float32, 4000))]
    done = set()
    for _ in range(70):
        disk, memory = chance.choice(family)
        action = chance.choice(["step", "chunk", "border", "rollback", "rollback", "fork", "drop"])
        match action:
            case "step" | "chunk" | "border":
                border = BLOCK - memory.tokens % BLOCK + chance.choice([-1, 0, 1])
                new = {"step": 1, "chunk": chance.randint(0, 700), "border": border}[action]
                key, value = torch.randn(HEADS, new, HEAD_DIM), torch.randn(HEADS, new, VALUE_DIM)
                disk.append(key, value)
                memory.append(key, value)
            case "rollback":
                to_border = memory.tokens % BLOCK
                taken = min(memory.tokens, chance.choice([0, 1, to_border, to_border + 1, chance.randint(0, 900), memory.tokens]))
                assert disk.can_rollback(taken) is None
                disk.rollback(taken)
                memory.rollback(taken)
            case "fork" if len(family) < 5:
                family.append((disk.fork(), memory.fork()))
            case "drop" if len(family) > 1:
                family.remove((disk, memory))
                del disk, memory
            case _:
                continue
        done.add(action)
        for one, other in family:
            spans = other.spans()
            whole = [torch.cat([getattr(span, name) for span in spans], 1) if spans else None for name in ("key_HTD", "value_HTE")]
            assert_holds(one, *(each if each is not None else torch.empty(HEADS, 0, 1) for each in whole))
    assert len(done) == 6


def test_a_rollback_beyond_the_start_is_refused():
    store, *_ = filled(300)
    assert "301 cannot be taken back" in str(store.can_rollback(301))
    with pytest.raises(SessionError, match="the session has 300 tokens; 301 cannot be taken back"):
        store.rollback(301)
    assert store.tokens == 300


@pytest.mark.parametrize("new", [1, 40])
@pytest.mark.parametrize("layout", ["rows", "blocks"])
@pytest.mark.parametrize("tokens", [40, BLOCK, STAGED_TOKENS, 3 * STAGED_TOKENS + 50])
def test_attention_equals_that_over_memory(tokens, layout, new):
    store, key, value = filled(tokens, layout=layout)
    memory = GrowableStore(*SHAPE, torch.float64, tokens)
    memory.append(key, value)
    query = torch.randn(HEADS, 3, new, HEAD_DIM)
    options = {"sink_tokens": 0, "recent_tokens": None, "scale": 0.5, "soft_cap": None}
    first = tokens - new
    state = attend_held(query, store, store.visible(first), first, **options)
    expected = attend_spans(query.double(), memory.spans(), first, **options)
    torch.testing.assert_close(state.out.double(), expected.out, rtol=0, atol=2e-6)
    torch.testing.assert_close(state.lse.double(), expected.lse, rtol=0, atol=4e-6)


# --- files -------------------------------------------------------------------------------------------------------------------------------


def test_a_fork_reads_its_parent_s_blocks_and_writes_to_a_file_of_its_own():
    store, key, value = filled(3 * BLOCK + 5)
    child = store.fork()
    assert child._blocks == store._blocks and child._file is None
    more = some(BLOCK, 1)
    child.append(*more)
    assert child._file is not store._file
    file = store._file
    store.rollback(2 * BLOCK)
    store.append(*some(2 * BLOCK, 2))  # takes no slot that the child reads
    del store
    gc.collect()
    assert_holds(child, torch.cat([key, more[0]], 1), torch.cat([value, more[1]], 1))
    child.rollback(child.tokens - BLOCK)
    assert os.fstat(file._descriptor).st_size == child.form.bytes  # what nobody reads was given back, by the last that reads the file


def test_slots_are_written_again_and_the_end_of_the_file_is_given_back():
    store, *_ = filled(8 * BLOCK)
    size = lambda: os.fstat(store._file._descriptor).st_size  # noqa: E731
    assert size() == 8 * store.form.bytes
    store.rollback(5 * BLOCK + 1)
    assert size() == 2 * store.form.bytes
    store.append(*some(5 * BLOCK + 1, 3))
    assert size() == 8 * store.form.bytes
    store.rollback(store.tokens)
    assert size() == 0 and store.nbytes() == 0


def test_a_file_is_closed_with_the_last_store_that_reads_it():
    store, *_ = filled(2 * BLOCK)
    descriptor, child = store._file._descriptor, store.fork()
    del store
    gc.collect()
    os.fstat(descriptor)
    del child
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_room_that_was_reserved_and_not_used_is_given_back():
    store, *_ = filled(10)
    store.reserve(5 * BLOCK)
    assert os.fstat(store._file._descriptor).st_size == 5 * store.form.bytes
    store.rollback(0)
    assert os.fstat(store._file._descriptor).st_size == 0
    small = on_disk()
    small.reserve(BLOCK - 1)
    assert small._file is None  # fits in memory: no file is made


def test_nothing_is_left_in_the_folder_not_even_by_a_killed_process(tmp_path):
    code = f"""
        import os, signal, torch
        from kvcompile.runtime.disk import DiskStore
        store = DiskStore(2, 8, 12, torch.float32, {str(tmp_path)!r})
        store.append(torch.randn(2, 1000, 8), torch.randn(2, 1000, 12))
        assert os.fstat(store._file._descriptor).st_size == 3 * store.form.bytes
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_context():
    store, *_ = filled(40 * BLOCK, BLOCK)
    assert store.nbytes() == store.form.bytes and store.disk_nbytes() == 40 * store.form.bytes
    assert len(list(store.walk(0, store.tokens))) == 40 // STAGED_BLOCKS
    assert len(store._pool._free) == 1  # one staging for all stores of its form


# --- a disk that fails -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", [0, 7])
def test_one_bit_that_is_turned_over_on_the_disk_loses_its_block_and_no_other(bit):
    store, key, value = filled(4 * BLOCK + 9)
    child, other = store.fork(), filled(2 * BLOCK)[0]
    damage(store, BLOCK, bit)
    with pytest.raises(LostTokens) as lost:
        store.spans()
    assert str(lost.value) == (
        "session: the keys and values of layers.3 at positions 256 to 511 of 1033 cannot be read back from the disk: "
        "their checksum is not what was written.\n"
        "  These tokens are lost to this session, and to its forks of more than 256 tokens; read the text again in a new one."
    )
    with pytest.raises(LostTokens, match="256 to 511"):
        child.spans()
    (span,) = store.spans_between(2 * BLOCK, store.tokens)
    assert torch.equal(span.key_HTD, key[:, 2 * BLOCK :])
    assert other.spans()
    assert "256 to 511" in str(store.can_rollback(store.tokens - BLOCK - 5))  # the rest of a block that cannot be read
    assert store.tokens == 4 * BLOCK + 9
    store.rollback(store.tokens - BLOCK)
    assert_holds(store, key[:, :BLOCK], value[:, :BLOCK])


def test_a_file_that_was_cut_is_noticed():
    store, *_ = filled(3 * BLOCK)
    os.ftruncate(store._file._descriptor, 2 * store.form.bytes)
    with pytest.raises(LostTokens, match="0 to 767 of 768 cannot be read back from the disk: the file ends before them"):
        store.spans()


def test_two_blocks_that_changed_places_are_noticed():
    store, *_ = filled(2 * BLOCK)
    file, size = store._file._descriptor, store.form.bytes
    first, second = os.pread(file, size, 0), os.pread(file, size, size)
    os.pwrite(file, second + first, 0)
    with pytest.raises(LostTokens, match="checksum"):
        store.spans()


def test_the_checksum_sees_every_bit_and_a_page_of_zeros():
    block = np.random.default_rng(0).integers(0, 256, 8192, dtype=np.uint8)
    was = checksum(block)
    for place in range(0, 8192, 501):
        for bit in range(8):
            block[place] ^= 1 << bit
            assert checksum(block) != was
            block[place] ^= 1 << bit
    assert checksum(block) == was
    block[4096:] = 0
    assert checksum(block) != was


def test_a_full_disk_is_refused_before_anything_is_written(monkeypatch):
    store, key, value = filled(BLOCK + 3)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(block_file.os, "posix_fallocate", full)
    with pytest.raises(CapacityError) as refused:
        store.reserve(2 * BLOCK)
    assert str(refused.value) == (
        f"the folder for temporary files: {2 * store.form.bytes} bytes (0.1 MiB) more for keys and values have no room: "
        "No space left on device. The call is taken back: the session lost nothing.\n"
        "  Free some of it, or name a folder of another disk: target: {disk: FOLDER}."
    )
    monkeypatch.setattr(block_file.os, "pwrite", full)
    with pytest.raises(CapacityError, match="a block of 40960 bytes of keys and values was not written: No space left"):
        store.append(*some(2 * BLOCK, 1))
    assert_holds(store, key, value)
    monkeypatch.undo()
    more = some(BLOCK, 1)
    store.append(*more)
    assert_holds(store, torch.cat([key, more[0]], 1), torch.cat([value, more[1]], 1))


def test_a_file_system_that_cannot_reserve_is_written_without(monkeypatch):
    def unknown(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(block_file.os, "posix_fallocate", unknown)
    store = on_disk()
    store.reserve(3 * BLOCK)
    store.append(*some(3 * BLOCK))
    assert_holds(store, *some(3 * BLOCK))


def test_the_largest_size_of_a_file_is_told():
    code = """
        import resource, torch
        from kvcompile.ir.errors import CapacityError
        from kvcompile.runtime.disk import DiskStore
        store = DiskStore(2, 8, 12, torch.float32)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * store.form.bytes, 2 * store.form.bytes))
        store.reserve(600)
        for attempt in (lambda: store.reserve(1000), lambda: store.append(torch.randn(2, 1000, 8), torch.randn(2, 1000, 12))):
            try:
                attempt()
            except CapacityError as error:
                assert "File too large" in str(error) and "ulimit -f" in str(error), error
            else:
                raise AssertionError("nothing was refused")
        assert store.tokens == 0
        store.append(torch.randn(2, 700, 8), torch.randn(2, 700, 12))
        print(store.tokens, store.disk_nbytes() // store.form.bytes)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.split() == ["700", "2"], done.stderr


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CapacityError) as refused:
        BlockFile(str(tmp_path / "file" / "folder"), 4096)
    assert str(refused.value) == (
        f"{tmp_path}/file/folder: no file for keys and values can be made: Not a directory. "
        "The call is taken back: the session lost nothing.\n  Name a folder that can be written: target: {disk: FOLDER}."
    )


def test_too_many_open_files_are_told(monkeypatch, tmp_path):
    def none_left(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(block_file.os, "dup", none_left)
    with pytest.raises(CapacityError, match=r"Too many open files.*\n  Raise the number of open files .`ulimit -n`.: a session has one"):
        BlockFile(str(tmp_path), 4096)


def test_files_do_not_go_to_a_folder_that_lies_in_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(block_file.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "temporary"
    monkeypatch.setattr(block_file, "lies_in_memory", lambda folder: "home" not in str(folder) and folder.name != "home")
    (tmp_path / "home").mkdir()
    assert default_folder() == tmp_path / "home" / ".cache" / "kvcompile"
    monkeypatch.setattr(block_file, "lies_in_memory", lambda folder: True)
    assert default_folder() == type(tmp_path).cwd()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this system has no /dev/shm")
def test_dev_shm_lies_in_memory_and_the_root_does_not():
    assert lies_in_memory(type(default_folder())("/dev/shm"))
    assert not lies_in_memory(type(default_folder())("/"))


def test_a_checksum_tells_pages_that_changed_places():
    block = np.random.default_rng(0).integers(0, 256, 5 * 4096 + 64, dtype=np.uint8)
    exchanged = block.copy()
    exchanged[:4096], exchanged[8192:12288] = block[8192:12288], block[:4096]
    turned = block.copy()
    turned[-1] ^= 1
    assert len({checksum(block), checksum(exchanged), checksum(turned), checksum(block[:-64])}) == 4


def test_room_that_another_store_of_the_file_reserved_stays(tmp_path):
    file = BlockFile(str(tmp_path), 4096)
    kept = file.write(np.zeros(4096, dtype=np.uint8))
    file.reserve(3)
    file.reclaim(keep_reserved=True)
    assert os.fstat(file._descriptor).st_size == 4 * 4096
    file.reclaim()
    assert os.fstat(file._descriptor).st_size == 4096 and kept.slot == 0
