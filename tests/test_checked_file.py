"""What happens to the files of sessions and of indexes: damage, full disks, processes that die while they write."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from damage import FIRST, PAGE, description, flipped, forged, sealed, section, with_section
from units import some_ids

import kvcompile
from kvcompile.inspection import inspect_file
from kvcompile.ir.errors import SessionError
from kvcompile.runtime import checked_file
from kvcompile.runtime.checked_file import FileKind, file_kind, open_checked, writing
from kvcompile.runtime.indexes.index import Prompt, RecentQueries
from kvcompile.runtime.indexes.registry import INDEX_FILE, index_kind, load_index, save_index
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.session_file import SESSION_FILE

HEADS, TOKENS, DIM = 2, 256, 16
KIND = FileKind("thing", b"KVCTEST\n", 5, "Make it again.")


@functools.cache
def model() -> CompiledModel:
    """Rings beside full heads."""
    zone = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}
    heads = [{"policy": "full"}, {"policy": "short", "kv_heads": 0}]
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "policies": {"short": {"zones": [zone]}}, "heads": heads}
    return kvcompile.compile(toys.llama(layers=2), spec=spec | {"target": {"segments": "eager"}})


def index() -> Any:
    generator = torch.Generator().manual_seed(0)
    key_HTD, value_HTE, query_HCD = (torch.randn(HEADS, n, DIM, generator=generator) for n in (TOKENS, TOKENS, 64))
    recent = RecentQueries(query_HCD, torch.full((64,), TOKENS))
    return index_kind("sketch").build(0, Prompt(key_HTD, value_HTE, query_HCD.transpose(1, 2) @ query_HCD, 64, recent, 1, 20), {})


@dataclass(frozen=True)
class Case:
    """A kind of file: what writes one, what reads it and tells what was in it, and the names of four sections."""

    kind: FileKind
    write: Callable[[Path], None]
    read: Callable[[Path], list[torch.Tensor]]
    sections: tuple[str, ...]


def _write_session(path: Path) -> None:
    session = model().session()
    session.prefill(some_ids(100, 256))
    session.save(path)


def _read_session(path: Path) -> list[torch.Tensor]:
    return [model().restore(path).step(3)]


CASES = {
    "session": Case(
        SESSION_FILE, _write_session, _read_session, ("the token ids", "KV heads 1: keys", "KV heads 1: values", "KV heads 0: keys")
    ),
    "index": Case(
        INDEX_FILE,
        lambda path: save_index(path, "sketch", index()),
        lambda path: list(load_index(path).state()[0].values()),
        ("position_HT.0", "codes_HNUB.0", "mean_HRE.0", "gaps_HN"),
    ),
}


@functools.cache
def written(name: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        CASES[name].write(path := Path(folder) / "file")
        return path.read_bytes()


def no_object(whole: bytes) -> bytes:
    return forged(whole, lambda found: [found])


def no_json(whole: bytes) -> bytes:
    magic, number, zero, offset, _, _ = FIRST.unpack_from(whole)
    return sealed((magic, number, zero, offset, 9, offset + 9), whole[PAGE:offset], b'{"content')


def deep_json(whole: bytes) -> bytes:
    magic, number, zero, offset, _, _ = FIRST.unpack_from(whole)
    text = b"[" * 200_000
    return sealed((magic, number, zero, offset, len(text), offset + len(text)), whole[PAGE:offset], text)


def moved(by: int) -> Callable[[bytes], bytes]:
    """The second section is said to lie elsewhere."""

    def change(found: dict[str, Any]) -> None:
        found["sections"][1][1] += by

    return lambda whole: forged(whole, change)


def negative(whole: bytes) -> bytes:
    def change(found: dict[str, Any]) -> None:
        found["sections"][0][2] = -1

    return forged(whole, change)


def swapped(whole: bytes) -> bytes:
    """The bytes of two sections of the same length change places."""
    places = [(offset, size) for _, offset, size, _ in description(whole)["sections"] if size]
    for offset, size in places:
        for at, other in places:
            first, second = whole[offset : offset + size], whole[at : at + size]
            if at > offset and other == size and first != second:
                return whole[:offset] + second + whole[offset + size : at] + first + whole[at + size :]
    raise AssertionError("no two sections alike")


def length_beyond(whole: bytes) -> bytes:
    magic, number, zero, offset, length, size = FIRST.unpack_from(whole)
    return FIRST.pack(magic, number, zero, offset, length + (1 << 40), size) + whole[FIRST.size :]


def no_section(whole: bytes) -> bytes:
    """A tensor is said to lie in a section that is not there."""
    return forged(whole, lambda found: json.loads(json.dumps(found).replace('{"section": 0,', '{"section": 900,')))


def another_shape(whole: bytes) -> bytes:
    return forged(whole, lambda found: json.loads(json.dumps(found).replace('"shape": [', '"shape": [3, ')))


def another_dtype(whole: bytes) -> bytes:
    return forged(whole, lambda found: json.loads(json.dumps(found).replace('0, "dtype": "', '0, "dtype": "q')))


def other_order(whole: bytes) -> bytes:
    return forged(whole, lambda found: found | {"byte_order": "big" if sys.byteorder == "little" else "little"})


def half(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "damaged: it is empty"),
    "cut off in the magic": (lambda whole: whole[:5], "it has 5 bytes, fewer than its first page"),
    "cut off in the first page": (lambda whole: whole[:100], "cut off: it has 100 bytes, fewer than its first page"),
    "cut off in the data": (half, "damaged: it is cut off: it has .* bytes, and .* were written"),
    "cut off in the description": (lambda whole: whole[:-9], "damaged: it is cut off"),
    "something behind it": (lambda whole: whole + b"\0", "damaged: it has grown"),
    "another magic": (lambda whole: b"PK" + whole[2:], r"is no (session|index) file of kvcompile: it begins with b'PK"),
    "a later format": (lambda whole: whole[:8] + b"\7" + whole[9:], "written in format 7 by a later version.* this one reads format"),
    "an earlier format": (lambda whole: whole[:8] + b"\0" + whole[9:], "written in format 0 by an earlier version"),
    "a bit of the first page": (lambda whole: flipped(whole, 13), "first page and its description do not have the checksum"),
    "a bit of the first page's checksum": (lambda whole: flipped(whole, 50), "first page and its description do not have the checksum"),
    "a bit of the first page's padding": (lambda whole: flipped(whole, 4000), "first page and its description do not have the checksum"),
    "a bit of the description": (lambda whole: flipped(whole, len(whole) - 40), "first page and its description do not have the checksum"),
    "a description beyond the end": (length_beyond, "its description would lie at"),
    "a description that is no object": (no_object, "it is no JSON object with a content"),
    "a description that is no JSON": (no_json, "its description does not fit"),
    "a description without an end": (deep_json, "its description does not fit"),
    "overlapping sections": (moved(-PAGE), "and the section before it ends at"),
    "a gap between sections": (moved(PAGE), "and the section before it ends at"),
    "a negative offset": (moved(-(1 << 40)), "lies at -.* and the section before it ends at"),
    "a negative length": (negative, "with -1 bytes"),
    "sections swapped": (swapped, "does not have the checksum that was written with it"),
    "a section that is not there": (no_section, "damaged: what it says.*there is no section 900"),
    "another shape": (another_shape, r"damaged: what it says.* bytes, and is to be torch.* \[3, "),
    "a dtype that is none": (another_dtype, "damaged: what it says.*there is no section . of q"),
    "another byte order": (other_order, "-endian numbers; this one's are"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", CASES)
def test_damage_is_found_and_named(name, damage, tmp_path):
    case, whole = CASES[name], written(name)
    change, told = DAMAGE[damage]
    path = tmp_path / "file"
    path.write_bytes(change(whole))
    with pytest.raises(SessionError, match=told) as caught:
        case.read(path)
    (problem,) = caught.value.problems
    assert problem.where == str(path) and problem.mend


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", CASES)
def test_a_bit_of_a_tensor_is_found_and_the_tensor_named(name, number, tmp_path):
    case, whole = CASES[name], written(name)
    offset, size = section(whole, case.sections[number])
    for at in (offset, offset + size - 1, *([offset + size] if size % PAGE else [])):  # what fills the page up is checked too
        (tmp_path / "file").write_bytes(flipped(whole, at, bit=3))
        with pytest.raises(SessionError, match=f"damaged: .*{case.sections[number]}.* does not have the checksum"):
            case.read(tmp_path / "file")


@pytest.mark.parametrize("name", CASES)
def test_bytes_changed_anywhere_are_found(name, tmp_path):
    case, whole, chance = CASES[name], written(name), random.Random(1)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(len(whole))] ^= chance.randint(1, 255)
        if content == whole:
            continue
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(SessionError):
            case.read(tmp_path / "file")
    for _ in range(40):
        (tmp_path / "file").write_bytes(whole[: chance.randrange(len(whole))])
        with pytest.raises(SessionError):
            case.read(tmp_path / "file")


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_read_is_named(name, tmp_path):
    case = CASES[name]
    with pytest.raises(SessionError, match=r"is a folder\.\n  Name the file"):
        case.read(tmp_path)
    with pytest.raises(SessionError, match="cannot be read: No such file or directory"):
        case.read(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SessionError, match="is no regular file"):
        case.read(tmp_path / "pipe")
    case.write(path := tmp_path / "file")
    path.chmod(0)
    with as_nobody(), pytest.raises(SessionError, match="cannot be read: Permission denied"):
        case.read(path)


@contextlib.contextmanager
def as_nobody() -> Any:
    """Root may read everything: as another user then."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.mark.parametrize("name", CASES)
def test_the_file_of_the_other_kind_is_refused(name, tmp_path):
    (other,) = set(CASES) - {name}
    CASES[other].write(tmp_path / "file")
    with pytest.raises(SessionError, match=f"is no {name} file of kvcompile: it begins with b'KVC"):
        CASES[name].read(tmp_path / "file")
    assert file_kind(tmp_path / "file", (SESSION_FILE, INDEX_FILE)) == CASES[other].kind
    assert file_kind(tmp_path, (SESSION_FILE, INDEX_FILE)) is None
    (tmp_path / "file").write_bytes(b"GGUF" * 9)
    assert file_kind(tmp_path / "file", (SESSION_FILE, INDEX_FILE)) is None


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_read_as_it_was_written(name, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(written(name))
    first, second = (CASES[name].read(path) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True)) and first
    assert path.read_bytes() == written(name)
    sections = description(written(name))["sections"]
    assert all(offset % PAGE == 0 for _, offset, _, _ in sections)


def test_a_forged_section_keeps_its_checksum(tmp_path):
    """The helper of the tests that forge: what they prove is not that a checksum was wrong."""
    offset, size = section(written("index"), "gaps_HN")
    same = with_section(written("index"), "gaps_HN", written("index")[offset : offset + size])
    (tmp_path / "file").write_bytes(same)
    CASES["index"].read(tmp_path / "file")


# --- writing ---------------------------------------------------------------------------------------------------------------------------


def put(path: Path, *numbers: int) -> None:
    with writing(path, KIND) as file:
        file.content["all"] = [file.put(f"number {number}", torch.full((5000,), number)) for number in numbers]


def numbers(path: Path) -> list[int]:
    with open_checked(path, KIND) as file, file.believed():
        file.read_sections()
        found = [file.tensor(each) for each in file.content["all"]]
    return [int(each.unique()) for each in found]


def test_tensors_of_every_dtype_and_of_no_element_come_back(tmp_path):
    dtypes = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.float64]
    given = [torch.arange(24).view(2, 3, 4).to(dtype).transpose(0, 2) for dtype in dtypes] + [torch.zeros(3, 0, 2), torch.tensor(7)]
    with writing(tmp_path / "file", KIND) as file:
        file.content["all"] = [file.put("one", each) for each in given]
    with open_checked(tmp_path / "file", KIND) as file:
        file.read_sections()
        found = [file.tensor(each) for each in file.content["all"]]
    (tmp_path / "file").unlink()  # a mapping keeps what it maps
    for one, other in zip(given, found, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_nothing_that_is_done_to_a_tensor_reaches_the_file(tmp_path):
    put(tmp_path / "file", 1, 2)
    with open_checked(tmp_path / "file", KIND) as file:
        file.read_sections()
        file.tensor(file.content["all"][0]).zero_()
    assert numbers(tmp_path / "file") == [1, 2]


def test_a_link_stays_one_and_rights_are_the_users(tmp_path):
    put(tmp_path / "file", 1)
    (tmp_path / "link").symlink_to("file")
    put(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink() and numbers(tmp_path / "file") == [2]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    (tmp_path / "file").chmod(0o600)
    put(tmp_path / "file", 3)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_what_is_no_plain_file_stays(tmp_path):
    """A rename would put a file in place of a device or a pipe."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(SessionError, match="is no file but a device, a pipe or a socket"), writing(place, KIND):
            pass
        assert not place.is_file() and place.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "'': is no name of a file"),
        ("x" * 300, "File name too long.\n  Give it a shorter name"),
        ("none/x", "No such file or directory"),
    ],
)
def test_names_that_nothing_can_be_written_to(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SessionError, match=said), writing(name, KIND):
        pass
    assert not list(tmp_path.iterdir())


def test_an_index_is_saved_as_a_kind_that_there_is(tmp_path):
    with pytest.raises(SessionError, match="there is no kind of index 'ifv'"):
        save_index(tmp_path / "x", "ifv", index())
    with pytest.raises(SessionError, match="there is no index yet"):
        save_index(tmp_path / "x", "ivf", None)
    assert not list(tmp_path.iterdir())


def test_inspect_says_what_a_file_is_not(tmp_path):
    for number, content in enumerate((b"", b"KVCSESX\n" + bytes(100))):
        path = tmp_path / f"{number}.session"
        path.write_bytes(content)
        with pytest.raises(SessionError, match="is no file of a session or an index"):
            inspect_file(path)


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    with pytest.raises(SessionError, match=r"is a folder\.\n  Name the file that the thing is to be written to"):
        put(tmp_path, 1)
    with pytest.raises(SessionError, match=r"cannot be written: No such file or directory\.\n  Make the folder"):
        put(tmp_path / "missing" / "file", 1)


class Full(Exception):
    pass


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(error, tmp_path, monkeypatch):
    put(path := tmp_path / "file", 1, 2)
    real, left = checked_file._write, 3

    def failing(file: Any, data: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            file.write(memoryview(data)[:7])  # as full disks do: a part of it
            raise OSError(error, os.strerror(error))
        real(file, data)

    monkeypatch.setattr(checked_file, "_write", failing)
    full = r"the disk is full \([\d,]+ bytes were written, [\d,]+ are free\)\.\n  Make room"
    told = full if error == errno.ENOSPC else r"Input/output error\.\n  Look at the disk"
    with pytest.raises(SessionError, match=f"the thing cannot be written: {told}"):
        put(path, 3, 4)
    assert numbers(path) == [1, 2] and list(tmp_path.iterdir()) == [path]


def test_a_limit_of_the_system_is_told_by_the_system_itself(tmp_path):
    put(path := tmp_path / "file", 1, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(SessionError, match=r"the system allows no file of this size.*\n  Make room, raise the limit"):
            put(path, 3, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert numbers(path) == [1, 2] and list(tmp_path.iterdir()) == [path]


def test_what_is_raised_while_a_file_is_written_leaves_the_old_one(tmp_path):
    put(path := tmp_path / "file", 1)
    with contextlib.suppress(Full), writing(path, KIND) as file:
        file.put("one", torch.ones(5000))
        raise Full
    assert numbers(path) == [1] and list(tmp_path.iterdir()) == [path]


KILLED = """
    import os, signal, sys, torch
    from pathlib import Path
    from kvcompile.runtime import checked_file
    from kvcompile.runtime.checked_file import FileKind, writing

    left = int(sys.argv[2])

    def count(function):  # dies in the given call that the system sees, half of it done
        def counted(*given):
            global left
            left -= 1
            if left < 0:
                if function is real_write:
                    given[0].write(memoryview(given[1])[: len(given[1]) // 2])
                os.kill(os.getpid(), 9)
            return function(*given)
        return counted

    real_write = checked_file._write
    checked_file._write = count(real_write)
    os.fsync, os.replace = count(os.fsync), count(os.replace)
    kind = FileKind("thing", b"KVCTEST\\n", 5, "Make it again.")
    with writing(Path(sys.argv[1]), kind) as file:
        file.content["all"] = [file.put(f"number {number}", torch.full((5000,), number)) for number in (3, 4)]
"""


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    """Before each write and after half of it, before the file is synced, before and after it is renamed."""
    seen = []
    for moment in range(11):
        put(path := tmp_path / "file", 1, 2)
        assert list(tmp_path.iterdir()) == [path]  # the writing of a whole file takes away what the one before left
        ended = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(path), str(moment)], check=False)
        seen.append((ended.returncode, numbers(path)[0], len(list(tmp_path.iterdir()))))
    kept, renamed, done = (-signal.SIGKILL, 1, 2), (-signal.SIGKILL, 3, 1), (0, 3, 1)
    assert seen == [kept] * 9 + [renamed, done]
    left = [each for each in tmp_path.iterdir() if each != path]
    assert not left


def test_a_file_that_another_process_is_writing_is_not_taken_for_a_stale_one(tmp_path):
    with writing(tmp_path / "file", KIND) as first:
        first.content["all"] = [first.put("one", torch.full((5,), 1))]
        put(tmp_path / "file", 2)
        assert len(list(tmp_path.iterdir())) == 2
    assert numbers(tmp_path / "file") == [1]  # the last to be finished
    (tmp_path / ".file.abc.unfinished").write_bytes(b"left by a process that died")
    (tmp_path / ".file2.abc.unfinished").write_bytes(b"of another file")
    put(tmp_path / "file", 3)
    assert sorted(each.name for each in tmp_path.iterdir()) == [".file2.abc.unfinished", "file"]
