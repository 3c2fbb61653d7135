"""Files of `checked_file` that somebody changed: by accident, or with a right checksum."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

PAGE = 4096
FIRST = struct.Struct("<8sIIQQQ")


def description(whole: bytes) -> dict[str, Any]:
    _, _, _, offset, length, _ = FIRST.unpack_from(whole)
    return json.loads(whole[offset : offset + length])


def section(whole: bytes, name: str) -> tuple[int, int]:
    """Offset and bytes of the first section with something in it whose name ends so."""
    return next((offset, size) for found, offset, size, _ in description(whole)["sections"] if found.endswith(name) and size)


def flipped(whole: bytes, at: int, bit: int = 0) -> bytes:
    return whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]


def forged(whole: bytes, change: Callable[[Any], Any]) -> bytes:
    """With another description, and checksums that are right; sections that it still names are taken as they are."""
    magic, number, zero, offset, _, _ = FIRST.unpack_from(whole)
    found = description(whole)
    text = json.dumps(change(found) or found).encode()
    return sealed((magic, number, zero, offset, len(text), offset + len(text)), whole[PAGE:offset], text)


def sealed(numbers: tuple[Any, ...], data: bytes, text: bytes) -> bytes:
    first = FIRST.pack(*numbers)
    return (first + hashlib.sha256(first + text).digest()).ljust(PAGE, b"\0") + data + text


def with_section(whole: bytes, name: str, data: bytes) -> bytes:
    """With other bytes in a section, as many, and checksums that are right."""
    offset, size = section(whole, name)
    assert len(data) == size
    padded = data.ljust(-(-size // PAGE) * PAGE, b"\0")

    def change(found: dict[str, Any]) -> None:
        for each in found["sections"]:
            if each[1] == offset and each[2] == size:
                each[3] = hashlib.sha256(padded).hexdigest()

    return forged(whole[:offset] + padded + whole[offset + len(padded) :], change)
