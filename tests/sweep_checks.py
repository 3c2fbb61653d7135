"""What workers of a sweep do in tests: spawned processes import it by name."""

from __future__ import annotations

import os
import time

from kvcompile.sweep.family import FamilyResult


def check(name: str) -> FamilyResult:
    """A name that begins with `dies` or `hangs` does so; `late` comes late; any other works at once."""
    if name.startswith("dies"):
        os._exit(3)
    if name.startswith("hangs"):
        time.sleep(600)
    if name == "late":
        time.sleep(1)
    return FamilyResult(name, "works", 0.0, reason=f"process {os.getpid()}")


def never(name: str) -> FamilyResult:
    raise AssertionError(f"{name} was checked")
