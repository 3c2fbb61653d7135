"""The specs that the package carries: `builtin:NAME`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from kvcompile.ir.errors import SpecError

PREFIX = "builtin:"


def folder() -> Path:
    return Path(str(resources.files("kvcompile.specs")))


def bundled_specs() -> tuple[str, ...]:
    """Names, sorted."""
    return tuple(sorted(file.stem for file in folder().glob("*.yaml")))


def bundled_path(source: str) -> Path:
    """builtin:NAME -> the file."""
    name = source.removeprefix(PREFIX)
    names = bundled_specs()
    if name not in names:
        from kvcompile.spec.messages import nearest

        near = nearest(name, names)
        listed = f"there are {', '.join(names)}" if names else "this installation has none"
        mend = f'Did you mean "{PREFIX}{near}"?' if near else "Name one of them, or a file."
        raise SpecError.at(source, f"there is no bundled spec of this name ({listed}).", mend)
    return folder() / f"{name}.yaml"
