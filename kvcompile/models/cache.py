"""What is made once and kept on disk: converted models, compiled code, and small JSON records.

    $KVCOMPILE_CACHE_DIR (default ~/.cache/kvcompile)
      models/KEY/       a folder entry: files, and manifest.json that says what they must be
      kernels/KEY/  segments/KEY/  launcher/KEY/    folder entries too
      <kind>/KEY.json   a record
      failed/KEY/       sources that the compiler refused, for who reads the error; the newest MOST_FAILED
      locks/  tmp/      one lock file an entry; entries that are being made

Rules:
1. An entry appears whole or not at all: it is made in tmp/, its files are synced, and os.replace puts it in its place.
2. One process makes an entry, others wait for it (flock; a process that dies lets go by itself).
3. An entry in use is not removed: its user holds the lock shared, a remover needs it alone.
4. An entry that does not match its manifest (missing or truncated file, changed content) is made again, and says so.
   Files up to SAMPLED_BYTES are hashed whole; of larger ones the size and three blocks are, which costs milliseconds.
5. Above KVCOMPILE_CACHE_LIMIT (default 20GiB) the entries that were used least recently go.  Nothing is ever unpickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompile.ir.errors import KvcompileError

Progress = Callable[[str], None]

DEFAULT_LIMIT = 20 * 1024**3
SAMPLED_BYTES = 4 * 1024**2
BLOCK_BYTES = 64 * 1024
MOST_RECORDS = 2000  # of one kind; a record is about 1 KB
MOST_FAILED = 20
MODELS = "models"
# The kinds of folder entries.  A closed list: `clear` removes whole folders, and KVCOMPILE_CACHE_DIR may name one that others use.
KINDS = (MODELS, "kernels", "segments", "launcher")
_MANIFEST = "manifest.json"
_UNITS = {"": 1, "b": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4}


@dataclass(frozen=True)
class CacheEntry:
    """A folder entry.  kind: one of KINDS; used_at: seconds since the epoch when it was used last."""

    kind: str
    key: str
    path: Path
    bytes: int
    used_at: float


def silent(_line: str) -> None:
    """A progress callback that says nothing."""


def root() -> Path:
    """The cache folder; it may not exist yet."""
    given = os.environ.get("KVCOMPILE_CACHE_DIR")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "kvcompile"


def limit_bytes() -> int:
    """Bytes that all folder entries together may take."""
    given = os.environ.get("KVCOMPILE_CACHE_LIMIT")
    if not given:
        return DEFAULT_LIMIT
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B|)\s*", given, re.IGNORECASE)
    if not found:
        raise KvcompileError.at("KVCOMPILE_CACHE_LIMIT", f"{given!r} is no size.", "Write a number and a unit, such as 20GiB or 500MiB.")
    return int(float(found[1]) * _UNITS[found[2].lower()])


@contextmanager
def use(key: str, build: Callable[[Path], None], *, what: str, kind: str = MODELS, progress: Progress = silent) -> Iterator[Path]:
    """The folder of entry `key`, kept in place while the context lasts; `build(folder)` fills an empty folder if it is not there.

    what: the entry in words, for progress lines ("the converted copy of SmolLM2.gguf"); kind: one of KINDS.
    Raises KvcompileError where the cache folder cannot be written.
    """
    assert kind in KINDS, f"not a kind of folder entry: {kind!r}"
    place = _place(kind, key)
    name = _name(kind, key)
    try:
        lock = _open_lock(name)
    except OSError as error:
        if find_fault(place) is not None:
            raise _unwritable(error) from error
        yield place  # a cache that is read only serves too
        return
    try:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if find_fault(place) is None:
                break
            fcntl.flock(lock, fcntl.LOCK_EX)
            fault = find_fault(place)  # another process may have made it while this one waited
            if fault is not None:
                if place.exists():
                    progress(f"{what} is broken ({fault}); making it again")
                _make(name, place, build)
                _keep_below_limit(keep=name, progress=progress)
        with suppress(OSError):
            os.utime(place)
        yield place
    finally:
        os.close(lock)


def has(key: str, kind: str = MODELS) -> bool:
    """Whether a whole entry is there; the next `use` need not make it."""
    return find_fault(_place(kind, key)) is None


def find_fault(folder: Path) -> str | None:
    """What is wrong with an entry in a few words, None if it matches its manifest."""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, known in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != known["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {known['bytes']}"
            if _sample(path) != known["sample"]:
                return f"{name} has changed"
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def entries() -> list[CacheEntry]:
    """All folder entries of every kind, the one used last first."""
    found = []
    for kind in KINDS:
        for path in _listed(root() / kind):
            with suppress(OSError):  # removed by another process meanwhile
                found.append(CacheEntry(kind, path.name, path, _folder_bytes(path), path.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used_at)


def size() -> int:
    """Bytes of everything in the cache."""
    return _folder_bytes(root())


def clear() -> int:
    """Removes every entry and record that no process is using, and what failed; the bytes that this freed."""
    before = size()
    with _writable():
        for entry in entries():
            _remove(entry.kind, entry.key)
        for kind in _listed(root()):
            if kind.name not in {*KINDS, "failed", "locks", "tmp"}:
                for record_file in kind.glob("*.json"):
                    record_file.unlink(missing_ok=True)
        for path in _listed(root() / "failed"):
            shutil.rmtree(path, ignore_errors=True)
        for path in _listed(root() / "tmp"):
            with _alone(path.name.rsplit("--", 1)[0]) as got:
                if got:
                    _discard(path)
    return before - size()


def failed(key: str) -> Path:
    """Where the sources of an entry that could not be made are kept; not made here.  Removes the oldest beyond MOST_FAILED."""
    place = _place("failed", key)
    with suppress(OSError):
        kept = sorted((path for path in _listed(place.parent) if path != place), key=lambda path: path.stat().st_mtime)
        for path in kept[: max(0, len(kept) + 1 - MOST_FAILED)]:
            shutil.rmtree(path, ignore_errors=True)
    return place


def record(kind: str, key: str, value: Mapping[str, Any]) -> bool:
    """Keeps a small JSON object; False where the cache cannot be written (a record only saves time)."""
    place = _place(kind, key).with_name(f"{key}.json")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _write_json(place, dict(value))
        kept = sorted(place.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in kept[: max(0, len(kept) - MOST_RECORDS)]:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def recall(kind: str, key: str) -> dict[str, Any] | None:
    """The object that `record` kept; None if there is none or it cannot be read."""
    try:
        value = json.loads(_place(kind, key).with_name(f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def checksum(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, remembered by (path, size, modification time in ns)."""
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()[:32]
    known = recall("checksums", key)
    if known is not None and re.fullmatch(r"[0-9a-f]{64}", str(known.get("sha256"))):
        return str(known["sha256"])
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    record("checksums", key, {"sha256": found})
    return found


def _place(kind: str, key: str) -> Path:
    for word in (kind, key):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", word), f"not a cache key: {word!r}"
    return root() / kind / key


def _name(kind: str, key: str) -> str:
    """The name of an entry's lock and of its folders in tmp/: one that no other kind and key have, for neither holds a "+"."""
    return key if kind == MODELS else f"{kind}+{key}"  # models had no kind in 0.1, whose processes may be running


@contextmanager
def _writable() -> Iterator[None]:
    """Turns an OSError of the cache folder into a message that says what to do."""
    try:
        yield
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> KvcompileError:
    return KvcompileError.at(
        str(root()),
        f"the cache folder cannot be written: {error.strerror or error}.",
        "Set KVCOMPILE_CACHE_DIR to a folder that you may write to and that has space.",
    )


def _open_lock(name: str) -> int:
    path = root() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


@contextmanager
def _alone(name: str) -> Iterator[bool]:
    """Whether this process now has the entry of that `_name` to itself; it never waits."""
    lock = _open_lock(name)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def _make(name: str, place: Path, build: Callable[[Path], None]) -> None:
    """Makes an entry; the caller holds its lock alone, so what is in tmp/ for it was left by a process that died."""
    with _writable():
        waiting = root() / "tmp"
        waiting.mkdir(parents=True, exist_ok=True)
        for left in _listed(waiting):
            if left.name.rsplit("--", 1)[0] == name:
                _discard(left)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}--", dir=waiting))
    try:
        build(folder)
        with _writable():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in files:
                _sync(path)
            known = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sample": _sample(path)} for path in files}
            _write_json(folder / _MANIFEST, {"version": 1, "files": known})
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():
                os.replace(place, waiting / f"{folder.name}.old")
                shutil.rmtree(waiting / f"{folder.name}.old", ignore_errors=True)
            os.replace(folder, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep_below_limit(keep: str, progress: Progress) -> None:
    limit = limit_bytes()
    found = entries()
    total = sum(entry.bytes for entry in found)
    for entry in reversed(found):
        if total <= limit:
            return
        if _name(entry.kind, entry.key) != keep and _remove(entry.kind, entry.key):
            progress(f"the cache is above its limit; removed {entry.key}, used least recently")
            total -= entry.bytes


def _discard(left: Path) -> None:
    """Removes what a dead process left in tmp/; a compiler that it had started may write there for some ms more."""
    for _ in range(20):
        shutil.rmtree(left, ignore_errors=True)
        if not left.exists():
            return
        time.sleep(0.05)


def _remove(kind: str, key: str) -> bool:
    """Removes an entry unless a process is using it."""
    place, name = _place(kind, key), _name(kind, key)
    with _alone(name) as got:
        if not got:
            return False
        waiting = root() / "tmp"
        waiting.mkdir(parents=True, exist_ok=True)
        doomed = Path(tempfile.mkdtemp(prefix=f"{name}--", dir=waiting))
        with suppress(FileNotFoundError):
            os.replace(place, doomed)  # first out of sight, so that nobody sees half of it
        shutil.rmtree(doomed, ignore_errors=True)
        return True


def _sample(path: Path) -> str:
    """Hash of a file's content: all of it up to SAMPLED_BYTES, else of its first, middle and last block."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        if size_bytes <= SAMPLED_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for start in (0, size_bytes // 2, size_bytes - BLOCK_BYTES):
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
        return digest.hexdigest()


def _write_json(place: Path, value: Mapping[str, Any]) -> None:
    """Writes a file that is seen whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, sort_keys=True, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, place)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file():
                total += path.stat().st_size
    return total
