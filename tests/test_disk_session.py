"""Sessions whose heads lie on disk, beside heads that do not."""

from __future__ import annotations

import errno
import functools
import os
from typing import Any

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile.ir.errors import CapacityError, SessionError
from kvcompile.ir.store_bytes import DISK_BLOCK_TOKENS as BLOCK
from kvcompile.runtime import block_file
from kvcompile.runtime.disk import DiskStore
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.session import Session

VOCABULARY = 256
NEAR = {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 60}}], "rollback": 8}
DISK = {"zones": [{"all": {"device": "disk"}}]}
HEADS = [{"policy": "far"}, {"policy": "near", "layers": 1, "kv_heads": 1}]


@functools.cache
def compiled(on_disk: bool, kernels: str = "generated", toy: str = "llama", store: str | None = None) -> CompiledModel:
    """KV head 1 of layer 1 streams; the others remember every token, on disk or in memory."""
    far: dict[str, Any] = {**(DISK if on_disk else {"zones": ["all"]}), **({"store": store} if store else {})}
    spec = {
        "kvcompile": 1,
        "verify": {"tokens": 16},
        "policies": {"far": far, "near": NEAR},
        "heads": HEADS,
        "target": {"segments": "eager", "kernels": kernels},
    }
    model = toys.llama(layers=2) if toy == "llama" else getattr(toys, toy)()
    return kvcompile.compile(model, spec=spec)


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return some_ids(count, VOCABULARY, seed)


def disk_stores(session: Session) -> list[DiskStore]:
    return [store for site in range(len(session.model.plan.sites)) for store in session.stores(site) if isinstance(store, DiskStore)]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)  # float32; torch merges blocks in another order


def assert_equal(kernels: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """The C++ kernels cut what is in memory and what is on disk into the same chunks, and merge them in the same order: no bit differs."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0) if kernels == "generated" else assert_close(found, expected)


@pytest.mark.parametrize("kernels", ["generated", "torch"])
@pytest.mark.parametrize("chunk", [1, 100, BLOCK, 3000])
def test_logits_equal_those_of_the_same_heads_in_memory(kernels, chunk):
    tokens = ids(300 if chunk == 1 else 2700)
    memory, disk = compiled(False, kernels).session(), compiled(True, kernels).session()
    expected, found = (torch.cat([each.prefill(part, logits="all") for part in tokens.split(chunk)]) for each in (memory, disk))
    assert_equal(kernels, found, expected)
    for token in (5, 6):
        assert_equal(kernels, disk.step(token), memory.step(token))


@pytest.mark.parametrize("threads", [1, 3])
def test_whatever_the_number_of_threads_no_bit_differs(threads):
    tokens, before = ids(2 * 1024 + 77), torch.get_num_threads()
    memory, disk = compiled(False).session(), compiled(True).session()
    try:
        torch.set_num_threads(threads)
        expected, found = ([each.prefill(tokens, logits="all"), each.step(5)] for each in (memory, disk))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found, expected, strict=True):
        assert_equal("generated", one, other)


def test_a_kernel_attends_to_every_part(monkeypatch):
    session, seen = compiled(True).session(), []
    session.prefill(ids(2 * 1024 + 77))

    def counted(*arguments: Any) -> None:
        seen.append(arguments[-3:-1])
        return attend_part(*arguments)

    attend_part = torch.ops.kvc_native.attend_part.default
    monkeypatch.setattr(torch.ops.kvc_native.attend_part, "default", counted)
    session.step(3)
    parts = [(0, 1024), (1024, 2048), (2048, 2126)]
    assert seen == [part for _ in disk_stores(session) for part in parts]


@pytest.mark.parametrize("toy", ["gpt_oss", "gemma2", "gemma3", "lfm2"])
def test_models_with_sinks_caps_windows_and_convolutions(toy):
    tokens = ids(600) % 64
    memory, disk = compiled(False, toy=toy).session(), compiled(True, toy=toy).session()
    assert disk_stores(disk)
    assert_close(disk.prefill(tokens, logits="all"), memory.prefill(tokens, logits="all"))
    assert_close(disk.step(5), memory.step(5))


@pytest.mark.parametrize("store", ["bfloat16", "float16"])
def test_a_store_of_half_the_bytes(store):
    tokens = ids(700)
    memory, disk = compiled(False, store=store).session(), compiled(True, store=store).session()
    assert_close(disk.prefill(tokens), memory.prefill(tokens))
    assert disk.disk_nbytes() == compiled(True, store=store).plan.disk_bytes(700) == compiled(True).plan.disk_bytes(700) // 2 > 0


def test_each_past_block_is_read_once_a_chunk(monkeypatch):
    session, read = compiled(True).session(), []
    session.prefill(ids(2 * BLOCK))
    monkeypatch.setattr(block_file.BlockFile, "read", _counted(block_file.BlockFile.read, read))
    session.prefill(ids(300))
    stores = disk_stores(session)
    assert sum(read) == sum(store.disk_nbytes() for store in stores)


def _counted(function: Any, read: list[int]) -> Any:
    def counted(file: Any, slot: int, memory: Any) -> Any:
        read.append(memory.nbytes)
        return function(file, slot, memory)

    return counted


@pytest.mark.parametrize("kernels", ["generated", "torch"])
def test_packed_steps_of_sessions_at_all_borders_equal_steps_alone(kernels):
    model, lengths = compiled(True, kernels), (1, BLOCK - 1, BLOCK, BLOCK + 1, 1024, 1100)
    together, alone = [[model.session() for _ in lengths] for _ in range(2)]
    for sessions in (together, alone):
        for length, session in zip(lengths, sessions, strict=True):
            session.prefill(ids(length, length))
    for token in (3, 4, 5):
        rows = model.step(together, [token] * len(lengths))
        for row, session in zip(rows, alone, strict=True):
            assert_close(row, session.step(token))


def test_forks_and_rollbacks_equal_sessions_that_never_went_another_way():
    tokens = ids(1300)
    parent = compiled(True).session()
    parent.prefill(tokens[:600])
    child = parent.fork()
    parent.prefill(tokens[600:])
    other = ids(700, 1)
    child.prefill(other)
    fresh = compiled(True).session()
    fresh.prefill(torch.cat([tokens[:600], other]))
    assert_close(child.step(1), fresh.step(1))
    child.rollback(8)  # as far as the rings of the other heads go
    fresh.rollback(8)
    assert_close(child.step(2), fresh.step(2))
    del parent
    assert_close(child.step(3), fresh.step(3))


def test_generate_goes_on_as_in_memory():
    prompt = ids(2 * BLOCK - 3).tolist()
    found = [compiled(on_disk).complete(prompt, max_new_tokens=12).tokens for on_disk in (True, False)]
    assert found[0] == found[1] and len(found[0]) == 12


def test_memory_and_disk_are_what_the_plan_says():
    model = compiled(True)
    session = model.session()
    assert session.nbytes() == session.disk_nbytes() == model.plan.disk_bytes(0) == 0
    done = 0
    for total in (1, BLOCK - 1, BLOCK, BLOCK + 1, 3000):
        session.prefill(ids(total - done))
        done = total
        assert session.nbytes() == model.plan.stored_bytes(total)
        assert session.disk_nbytes() == model.plan.disk_bytes(total)
    assert model.plan.stored_bytes(3000) == model.plan.stored_bytes(100_000)
    child = session.fork()
    assert (child.shared_nbytes(), child.disk_nbytes()) == (0, session.disk_nbytes())


# --- a disk that fails -------------------------------------------------------------------------------------------------------------------


def damage(store: DiskStore, token: int) -> None:
    block = store._blocks[token // BLOCK]
    at = block.slot * store.form.bytes + 100
    (byte,) = os.pread(block.file._descriptor, 1, at)
    os.pwrite(block.file._descriptor, bytes([byte ^ 4]), at)


@pytest.mark.parametrize("kernels", ["generated", "torch"])
def test_a_damaged_block_breaks_its_session_and_no_other(kernels):
    model = compiled(True, kernels)
    broken, other, expected = [model.session() for _ in range(3)]
    for session in (broken, other, expected):
        session.prefill(ids(700))
    damage(disk_stores(broken)[0], 300)
    with pytest.raises(SessionError, match=r"sessions\[1\]: the keys and values of .*layers.0.* at positions 256 to 511 of 701"):
        model.step([other, broken], [1, 1])
    with pytest.raises(SessionError, match=r"session: the keys and values .* at positions 256 to 511 .*\n  Start a new session"):
        broken.step(1)
    assert_close(other.step(1), expected.step(1))
    assert len(other) == 701


@pytest.mark.parametrize("kernels", ["generated", "torch"])
@pytest.mark.parametrize("chunk", [200, 2048])
def test_a_full_disk_takes_the_call_back_and_the_session_goes_on(monkeypatch, kernels, chunk):
    """Though the rings of other heads have long overflowed: room is asked for before they change."""
    session, other = compiled(True, kernels).session(), compiled(True, kernels).session()
    for each in (session, other):
        each.prefill(ids(700))
    held = session.disk_nbytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(block_file.os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match=r"No space left on device\. The call is taken back: the session lost nothing"):
        session.prefill(ids(1000, 1))
    assert (len(session), session.disk_nbytes()) == (700, held)
    assert_close(session.step(1), other.step(1))
    monkeypatch.undo()
    assert_close(session.prefill(ids(1000, 1)), other.prefill(ids(1000, 1)))


def test_the_folder_of_the_spec_is_used(tmp_path):
    spec = {
        "kvcompile": 1,
        "verify": {"tokens": 16},
        "policies": {"far": DISK},
        "heads": [{"policy": "far"}],
        "target": {"segments": "eager", "disk": str(tmp_path / "blocks")},
    }
    session = kvcompile.compile(toys.llama(layers=1), spec=spec).session()
    session.prefill(ids(300))
    (store,) = disk_stores(session)
    assert store._file is not None
    assert os.readlink(f"/proc/self/fd/{store._file._descriptor}").startswith(str(tmp_path / "blocks"))
    assert list((tmp_path / "blocks").iterdir()) == []
