"""A file of tensors and a description of them, every byte of which is checked when it is read: what sessions and indexes are kept in.

    first page    4096 bytes: magic, format, where the description lies, the file's length, a checksum of all this and the description
    sections      one tensor each, one behind the other, each at a multiple of 4096 and filled up to one with zeros
    description   JSON: of each section its name, place and checksum; and what the tensors mean

Rules:
1. A file appears whole or not at all: it is written beside its place, synced, and renamed.  What a dead process left there goes with the
   next save of the same path.
2. Nothing in a file is ever run, and no number in it is believed before the checksums are right and it fits the others.
3. Tensors are views of a private mapping: they are read from where the file lies, which all readers share, and nothing that is done to them
   reaches the file.  The mapping outlives the file's name.
Checksums are SHA-256, against damage and not against forgery.  docs/session_file.md gives every offset.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import re
import stat
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvcompile.ir.errors import KvcompileError, Problem, SessionError
from kvcompile.runtime.address_space import MAP_NORESERVE, ON_LINUX

FILE_PAGE = 4096
_FIRST = struct.Struct("<8sIIQQQ")  # magic, format, 0, offset of the description, its bytes, bytes of the file
_DIGEST_END = _FIRST.size + hashlib.sha256().digest_size
_READ_BYTES = 1 << 20  # at once, to be checked
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
    )
}
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your quota is used up", errno.EFBIG: "the system allows no file of this size"}


@dataclass(frozen=True)
class FileKind:
    """noun: what a file holds.  magic: its first 8 bytes.  format: the version that is written and read.  again: how to get a new one."""

    noun: str
    magic: bytes
    format: int
    again: str


@dataclass(frozen=True)
class Section:
    name: str
    offset: int
    nbytes: int
    sha256: str


def file_pages(nbytes: int) -> int:
    """Bytes, rounded up to whole pages of a file."""
    return -(-nbytes // FILE_PAGE) * FILE_PAGE


class CheckedWriter:
    """What `writing` gives: sections go to the file as they come."""

    def __init__(self, file: Any, kind: FileKind) -> None:
        self.content: dict[str, Any] = {}
        self._file, self._kind = file, kind
        self._sections: list[Section] = []
        self._end = FILE_PAGE
        _write(file, bytes(FILE_PAGE))  # no magic yet

    def put(self, name: str, tensor: Tensor) -> dict[str, Any]:
        """Writes a section; returns what `CheckedFile.tensor` finds it by.  name: what a message calls it."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert dtype in _DTYPES, dtype
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        padding = bytes(file_pages(len(data)) - len(data))
        with ThreadPoolExecutor(1) as pool:  # both take about as long, and neither holds the interpreter
            digest = pool.submit(_sha256, data, padding)
            _write(self._file, data)
            _write(self._file, padding)
        self._sections.append(Section(name, self._end, len(data), digest.result()))
        self._end += len(data) + len(padding)
        return {"section": len(self._sections) - 1, "dtype": dtype, "shape": list(tensor.shape)}

    def finish(self) -> None:
        """The description, and the first page last: until then this is no such file."""
        written = {
            "kvcompile": _own_version(),
            "byte_order": sys.byteorder,
            "sections": [[each.name, each.offset, each.nbytes, each.sha256] for each in self._sections],
            "content": self.content,
        }
        description = json.dumps(written).encode()
        _write(self._file, description)
        numbers = _FIRST.pack(self._kind.magic, self._kind.format, 0, self._end, len(description), self._end + len(description))
        self._file.seek(0)
        _write(self._file, numbers + hashlib.sha256(numbers + description).digest())
        os.fsync(self._file.fileno())


def check_target(path: str | Path, kind: FileKind) -> Path:
    """Where a file of this name will stand.

    Raises SessionError, and writes nothing, for a name that no file can be written to: a folder, a device or pipe (which a rename would put
    a file in place of), a name that is empty or too long, one in a folder that is not there or read-only.
    """
    mend = f"Name the file that the {kind.noun} is to be written to."
    if not str(path):
        raise SessionError(Problem("''", "is no name of a file.", mend))
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode if target.exists() else stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise SessionError(Problem(str(path), "is a folder.", mend))
        if not stat.S_ISREG(mode):
            raise SessionError(Problem(str(path), "is no file but a device, a pipe or a socket.", mend))
        if not stat.S_ISDIR(target.parent.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if len(os.fsencode(target.name)) > os.pathconf(target.parent, "PC_NAME_MAX") - len(_prefix(Path())) - _RANDOM - len(_SUFFIX):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if not os.access(target.parent, os.W_OK | os.X_OK):
            read_only = os.statvfs(target.parent).f_flag & os.ST_RDONLY
            raise OSError(errno.EROFS if read_only else errno.EACCES, os.strerror(errno.EROFS if read_only else errno.EACCES))
    except OSError as error:
        raise _no_place(path, error) from error
    return target


def _no_place(path: str | Path, error: OSError) -> SessionError:
    mend = "Make the folder, or name a file in a folder that you may write to."
    if error.errno == errno.ENAMETOOLONG:
        mend = "Give it a shorter name."
    return SessionError(Problem(str(path), f"cannot be written: {error.strerror}.", mend))


@contextlib.contextmanager
def writing(path: str | Path, kind: FileKind) -> Iterator[CheckedWriter]:
    """A file to write to, which has the name `path` when the block ends and not before.

    Raises SessionError where the system refuses; then, and after any exception, what stood at `path` is as it was.
    """
    target = check_target(path, kind)
    try:
        _remove_stale(target)
        descriptor, aside = _made_beside(target)
    except OSError as error:
        raise _no_place(path, error) from error
    renamed = False
    try:
        with open(descriptor, "wb", buffering=0) as file:  # no buffer, so that nothing is left to be written when it is closed
            writer = CheckedWriter(file, kind)
            yield writer
            writer.finish()
            os.replace(aside, target)
            renamed = True
        _sync_folder(target.parent)
    except OSError as error:
        _refuse_write(path, kind, error, Path(aside), renamed)
    finally:
        if not renamed:
            Path(aside).unlink(missing_ok=True)


def _refuse_write(path: str | Path, kind: FileKind, error: OSError, aside: Path, renamed: bool) -> NoReturn:
    what = f"the {kind.noun} cannot be written: {_FULL.get(error.errno or 0, error.strerror or str(error))}"
    mend = "Look at the disk; what stood there before is as it was."
    if error.errno in _FULL:
        with contextlib.suppress(OSError):
            disk = os.statvfs(aside.parent)
            what += f" ({aside.stat().st_size:,} bytes were written, {disk.f_bavail * disk.f_frsize:,} are free)"
        mend = "Make room, raise the limit, or name a file on another disk; what stood there before is as it was."
    if renamed:
        mend = "The file is there, but it may be lost if the machine stops now; save it again."
    raise SessionError(Problem(str(path), f"{what}.", mend)) from error


class CheckedFile:
    """What `open_checked` gives.  content: what `CheckedWriter.content` was; written_by: the version of kvcompile; nbytes: of the file."""

    def __init__(self, path: str, kind: FileKind, file: int) -> None:
        self.path, self.kind = path, kind
        self.nbytes = os.fstat(file).st_size
        description = _description(path, kind, file, self.nbytes)
        self.content: dict[str, Any] = description["content"]
        self.written_by = str(description["kvcompile"])
        self.sections = _sections(description["sections"])
        self._file = file
        self._mapping: Tensor | None = None

    def read_sections(self) -> None:
        """Checks every section; `tensor` gives them afterwards.  Raises SessionError for one that is damaged."""
        _check_sections(self.path, self.kind, self._file, self.sections)
        self._mapping = _mapped(self._file, self.nbytes)

    def tensor(self, found: Mapping[str, Any]) -> Tensor:
        """The tensor that `CheckedWriter.put` returned this for: a view of the mapping.  Raises ValueError for what it did not return."""
        assert self._mapping is not None, "its sections were not read"
        number, dtype, shape = found["section"], _DTYPES.get(found["dtype"]), found["shape"]
        if type(number) is not int or not 0 <= number < len(self.sections) or dtype is None:
            raise ValueError(f"there is no section {number} of {found['dtype']}")
        section = self.sections[number]
        if any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"{shape} is no shape of {section.name}")
        if math.prod(shape) * dtype.itemsize != section.nbytes:
            raise ValueError(f"{section.name} has {section.nbytes} bytes, and is to be {dtype} {shape}")
        return self._mapping[section.offset : section.offset + section.nbytes].view(dtype).view(shape)

    @contextlib.contextmanager
    def believed(self, what: str = "") -> Iterator[None]:
        """While the content is made use of: what does not fit becomes a SessionError.  what: which part of the content."""
        try:
            yield
        except KvcompileError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            fault = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
            of = f" of {what}" if what else ""
            raise _damaged(self.path, self.kind, f"what it says{of} does not fit ({fault})") from error


@contextlib.contextmanager
def open_checked(path: str | Path, kind: FileKind) -> Iterator[CheckedFile]:
    """A file whose first page and description are checked.

    Raises SessionError for what is no such file, was cut off, is damaged, or was written by another version.
    """
    path, mend = str(path), f"Name the file that the {kind.noun} was saved to."
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise SessionError(Problem(path, "is a folder." if stat.S_ISDIR(mode) else "is no regular file.", mend))
        with open(path, "rb", buffering=0) as file:
            yield CheckedFile(path, kind, file.fileno())
    except OSError as error:
        raise SessionError(Problem(path, f"cannot be read: {error.strerror or error}.", mend)) from error


def file_kind(path: str | Path, kinds: tuple[FileKind, ...]) -> FileKind | None:
    """Which of these kinds a file says that it is; None of any other, and of what cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        magic = file.read(len(kinds[0].magic))
        return next((kind for kind in kinds if kind.magic == magic), None)
    return None


def _description(path: str, kind: FileKind, file: int, nbytes: int) -> dict[str, Any]:
    """What stands in the file beside its sections, checked."""
    if nbytes == 0:
        raise _damaged(path, kind, "it is empty")
    first = os.pread(file, FILE_PAGE, 0)
    if not first.startswith(kind.magic[: len(first)]):
        raise SessionError(
            Problem(path, f"is no {kind.noun} file of kvcompile: it begins with {first[:8]!r}.", f"Name the file of a {kind.noun}.")
        )
    if nbytes < FILE_PAGE:
        raise _damaged(path, kind, f"it is cut off: it has {nbytes} bytes, fewer than its first page")
    _, written, _, offset, length, whole = _FIRST.unpack_from(first)
    if written != kind.format:
        when = "a later" if written > kind.format else "an earlier"
        what = f"was written in format {written} by {when} version of kvcompile; this one reads format {kind.format}."
        raise SessionError(Problem(path, what, f"Use the version that wrote it.  {kind.again}"))
    if nbytes != whole:
        raise _damaged(path, kind, f"it {'is cut off' if nbytes < whole else 'has grown'}: it has {nbytes} bytes, and {whole} were written")
    if offset < FILE_PAGE or offset % FILE_PAGE or offset + length != whole:
        raise _damaged(path, kind, f"its description would lie at {offset} to {offset + length} of {whole} bytes")
    text = os.pread(file, length, offset)
    digest, rest = first[_FIRST.size : _DIGEST_END], first[_DIGEST_END:]
    if hashlib.sha256(first[: _FIRST.size] + text).digest() != digest or any(rest):
        raise _damaged(path, kind, "its first page and its description do not have the checksum that was written with them")
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or not isinstance(found.get("content"), dict):
            raise ValueError("it is no JSON object with a content")
        at = FILE_PAGE
        for each in _sections(found["sections"]):
            if each.offset != at or each.nbytes < 0:
                raise ValueError(f"{each.name} lies at {each.offset} with {each.nbytes} bytes, and the section before it ends at {at}")
            at += file_pages(each.nbytes)
        if at != offset:
            raise ValueError(f"its sections end at {at}, and it lies at {offset}")
        order, _ = found["byte_order"], found["kvcompile"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, kind, f"its description does not fit ({error})") from error
    if order != sys.byteorder:
        what = f"was written by a machine with {order}-endian numbers; this one's are {sys.byteorder}-endian."
        raise SessionError(Problem(path, what, kind.again))
    return found


def _sections(found: Any) -> list[Section]:
    sections = [Section(*each) for each in found]
    for each in sections:
        if (type(each.name), type(each.offset), type(each.nbytes), type(each.sha256)) != (str, int, int, str):
            raise ValueError(f"{each} is no section")
    return sections


def _check_sections(path: str, kind: FileKind, file: int, sections: list[Section]) -> None:
    """Read, not mapped: a disk that fails is then an error and not a signal."""

    def digest(section: Section) -> str:
        found, at = hashlib.sha256(), section.offset
        buffer, end = bytearray(_READ_BYTES), section.offset + file_pages(section.nbytes)
        while at < end:
            read = os.preadv(file, [memoryview(buffer)[: min(_READ_BYTES, end - at)]], at)
            if not read:
                raise _damaged(path, kind, f"it was cut off at {at} bytes while it was read")
            found.update(memoryview(buffer)[:read])
            at += read
        return found.hexdigest()

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for section, found in zip(sections, pool.map(digest, sections), strict=True):
            if found != section.sha256:
                where = f"at {section.offset} to {section.offset + section.nbytes}"
                raise _damaged(path, kind, f"{section.name} ({where}) does not have the checksum that was written with it")


def _mapped(file: int, nbytes: int) -> Tensor:
    """The file, uint8; private, so that nothing is written to it, and good when its name is gone: a mapping keeps what it maps."""
    flags = mmap.MAP_PRIVATE | (MAP_NORESERVE if ON_LINUX else 0)
    return torch.frombuffer(mmap.mmap(file, nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE), dtype=torch.uint8)


def _damaged(path: str, kind: FileKind, what: str) -> SessionError:
    return SessionError(Problem(path, f"is damaged: {what}.", f"Copy the file again.  {kind.again}"))


def _sha256(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _write(file: Any, data: bytes | memoryview) -> None:
    """All of it: one call writes as much as the system likes, which before a full disk is less."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest) :]


def _made_beside(target: Path) -> tuple[int, str]:
    """A new file in the target's folder, locked as long as its descriptor is open: so that others can tell it from one that was left."""
    while True:
        descriptor, aside = tempfile.mkstemp(prefix=_prefix(target), suffix=_SUFFIX, dir=target.parent)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(aside).st_ino == os.fstat(descriptor).st_ino:  # nobody took it for a stale one before it was locked
                os.fchmod(descriptor, _rights(target))  # mkstemp's 0600 is for secrets
                return descriptor, aside
        os.close(descriptor)


def _rights(target: Path) -> int:
    """Those of the file that is to be replaced, or those that a new one has."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    if ON_LINUX:  # os.umask tells what it was by changing it, for all threads
        told = re.search(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
        if told:
            return 0o666 & ~int(told[1], 8)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _remove_stale(target: Path) -> None:
    """What processes that died while they wrote the same file have left: nobody holds its lock."""
    for left in target.parent.iterdir():
        if not (left.name.startswith(_prefix(target)) and left.name.endswith(_SUFFIX)):
            continue
        with contextlib.suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


_SUFFIX = ".unfinished"
_RANDOM = 8  # characters that tempfile puts between


def _prefix(target: Path) -> str:
    return f".{target.name}."


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_version() -> str:
    try:
        return version("kvcompile")
    except PackageNotFoundError:  # run from its sources
        return "unknown"
