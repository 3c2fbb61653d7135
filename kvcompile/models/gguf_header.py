"""The key-values at the front of a GGUF file (versions 2 and 3), read without loading a tensor.

Layout: magic, version u32, tensor count u64, key-value count u64, then for each: key (u64 length + bytes), type u32, value.  Every length
is compared with what is left of the file before it is believed.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from kvcompile.ir.errors import ModelError

_FORMAT = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEEP_ITEMS = 4096  # longer arrays (a vocabulary) are only counted
_KEYS_LIMIT = 1 << 16


@dataclass(frozen=True)
class ArrayLength:
    """What is kept of an array that is too long to keep."""

    items: int


@dataclass(frozen=True)
class GgufHeader:
    """values: key to number, text, tuple or ArrayLength.  hash: of the header's bytes and the file's size."""

    values: dict[str, object]
    hash: str


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises ModelError when the file is not GGUF or ends inside its header."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise ModelError.at(str(path), f"is not a GGUF file: it has {size} bytes.", "Download it again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).read()
    except OSError as error:
        raise ModelError.at(str(path), f"cannot be read: {error.strerror}.", "Check its permissions.") from None


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0

    def read(self) -> GgufHeader:
        if self.data[:4] != b"GGUF":
            raise ModelError.at(str(self.path), f"is not a GGUF file: it begins with {self.data[:4]!r}.", "Name a .gguf file.")
        self.at = 4
        version = self.number("I")
        if version not in (2, 3):
            what = f"is GGUF version {version}; versions 2 and 3 (little-endian) can be read."
            raise ModelError.at(str(self.path), what, "Convert the file again, with a current converter.")
        self.take(8)  # tensors
        count = self.number("Q")
        if count > _KEYS_LIMIT:
            raise self.broken(f"{count} keys")
        values: dict[str, object] = {}
        for _ in range(count):
            key = self.text()
            values[key] = self.value(self.number("I"))
        digest = hashlib.sha256(self.data[: self.at] + struct.pack("<Q", self.size)).hexdigest()[:16]
        return GgufHeader(values, digest)

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _FORMAT:
            raise self.broken(f"value type {kind}")
        return self.number(_FORMAT[kind])

    def array(self) -> object:
        kind, items = self.number("I"), self.number("Q")
        if kind in _FORMAT:
            width = struct.calcsize(_FORMAT[kind])
            start = self.take(items * width)
            if items > _KEEP_ITEMS:
                return ArrayLength(items)
            return struct.unpack_from(f"<{items}{_FORMAT[kind]}", self.data, start)
        if kind != _STRING:
            raise self.broken(f"an array of type {kind}")
        if items > self.size - self.at:
            raise self.broken(f"an array of {items} items")
        if items > _KEEP_ITEMS:
            self.skip_texts(items)
            return ArrayLength(items)
        return tuple(self.text() for _ in range(items))

    def skip_texts(self, items: int) -> None:
        """The hot loop: a vocabulary has 49,152 to 256,000 words."""
        length_at, data, at, end = struct.Struct("<Q").unpack_from, self.data, self.at, self.size - 8
        for _ in range(items):
            if at > end:
                raise self.broken("a text")
            at += 8 + length_at(data, at)[0]
        self.at = at
        self.take(0)

    def text(self) -> str:
        length = self.number("Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8", "replace")

    def number(self, form: str) -> int:
        start = self.take(struct.calcsize(form))
        (value,) = struct.unpack_from(f"<{form}", self.data, start)
        return value  # type: ignore[no-any-return]

    def take(self, count: int) -> int:
        """Moves over `count` bytes and returns where they start."""
        start = self.at
        if count > self.size - start:
            raise self.broken(f"{count} bytes")
        self.at = start + count
        return start

    def broken(self, wanted: str) -> ModelError:
        what = f"is damaged or cut short: its header asks for {wanted} at byte {self.at} of {self.size}."
        return ModelError.at(str(self.path), what, "Download it again.")
