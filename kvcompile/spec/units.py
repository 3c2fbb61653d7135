"""Amounts as people write them: `8k` tokens, `256MiB`, `75%`, `0-2`.  Each function refuses with a ValueError that has no text of its own:
what is allowed is said once, by the field that asked."""

from __future__ import annotations

import re

from kvcompile.ir.byte_sizes import parse_bytes as parse_bytes

_TOKENS = re.compile(r"([0-9]{1,12})(k?)")
_PERCENT = re.compile(r"[0-9.]{1,20}%")
_NUMBERS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


def parse_tokens(value: object) -> int:
    """A number of tokens: 256, or "8k" with k = 1024."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _TOKENS.fullmatch(value) if isinstance(value, str) else None
    if match is None or (not match[2] and isinstance(value, str)):
        raise ValueError
    return int(match[1]) * 1024


def parse_percent(value: object) -> float:
    """A share of a whole: "75%" is 0.75.  Not bounded here."""
    if not (isinstance(value, str) and _PERCENT.fullmatch(value)):
        raise ValueError
    return float(value[:-1]) / 100


def parse_numbers(value: object) -> tuple[int, ...] | None:
    """Layers or KV heads: 3, "0-2" (both ends included), a list of both, sorted and each once; "all" is None."""
    if value == "all":
        return None
    chosen: set[int] = set()
    for item in value if isinstance(value, list) else [value]:
        match = _NUMBERS.fullmatch(str(item)) if isinstance(item, int | str) and not isinstance(item, bool) else None
        if match is None or (isinstance(item, str) and match[2] is None):
            raise ValueError
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError
        chosen.update(range(first, last + 1))
    if not chosen:
        raise ValueError
    return tuple(sorted(chosen))
