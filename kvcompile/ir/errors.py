"""What a user is told when something is wrong: where, what, how to mend.

Every error a user can cause is a `KvcompileError` made of `Problem`s; their text is made here and nowhere else.
A mistake of ours is an `assert`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    where: the place as its reader finds it (`specs/duo.yaml:14: heads[2].kv_heads`, a node's name, a path).
    what:  one sentence: the value found and what is allowed.
    mend:  one sentence: what to write or do instead.
    """

    where: str
    what: str
    mend: str

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  {self.mend}" if self.mend else head


class KvcompileError(Exception):
    """Base of all errors that the user can mend; holds every problem found, not only the first."""

    def __init__(self, *problems: Problem) -> None:
        assert problems, "an error without a problem"
        self.problems: tuple[Problem, ...] = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    @classmethod
    def at(cls, where: str, what: str, mend: str) -> Self:
        return cls(Problem(where, what, mend))


class SpecError(KvcompileError, ValueError):
    """The YAML spec, a pattern file or an override is wrong."""


class ModelError(KvcompileError, ValueError):
    """The model cannot be found, read or loaded."""


class UnsupportedGraphError(KvcompileError):
    """The model was read but a pass cannot compile its graph; `where` names the pass and the node."""


class CapacityError(KvcompileError):
    """The plan does not fit the memory that the target declares."""


class TargetError(KvcompileError):
    """The target device is missing, or something it needs is."""


class BuildError(KvcompileError):
    """The C++ compiler refused a source or took too long; `where` is the folder in which the sources are kept."""


class SessionError(KvcompileError, ValueError):
    """A session was asked for what it cannot do (a rollback beyond its promise, an empty prompt, a broken session)."""


class VerificationError(KvcompileError):
    """The compiled model differs from the original by more than the tolerance."""
