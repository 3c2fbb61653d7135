"""Sizes as people write them: `256MiB`, `4GB`.  Here because the spec has them and so has what is called from Python."""

from __future__ import annotations

import re

_BYTES = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMGT])(i?)B")


def parse_bytes(value: object) -> int:
    """A size in bytes: 1000000, "256MiB" (1024 * 1024), "4GB" (1000 * 1000 * 1000).

    Refuses with a ValueError that has no text of its own: who asked says what is allowed.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _BYTES.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2]) + 1))
