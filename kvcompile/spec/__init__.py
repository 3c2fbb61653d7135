"""The spec: YAML -> `kvcompile.ir.spec.Spec`, every mistake with its file, line and mend.  Imports neither torch nor transformers.

pydantic and PyYAML are imported when the first spec is read, so that the names below cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcompile.ir.errors import SpecError
from kvcompile.ir.spec import Spec

__all__ = ["bundled_specs", "json_schema", "load_spec"]


def load_spec(source: str | Path | Mapping[str, Any] | Spec, *, overrides: Sequence[str] = (), check_model: bool = True) -> Spec:
    """Reads and checks a spec; raises SpecError with all problems that can be found at once.

    source:      a file, `builtin:NAME`, a dict of the same shape, or a Spec, which is returned as it is.
    overrides:   `a.b=value` as `--set` takes them; they win over the file, relative paths in them start at the working directory.
    check_model: reads the model's header (config.json or GGUF) and compares layers, KV heads and patterns with it.
    """
    if isinstance(source, Spec):
        if overrides:
            raise SpecError.at(
                source.source,
                "this spec was read already; --set changes a file or a dict.",
                "Give the overrides to load_spec with the file.",
            )
        return source
    from kvcompile.spec.resolve import read

    return read(source, overrides, check_model)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors and `kvcompile schema`."""
    from kvcompile.spec.schema import json_schema

    return json_schema()


def bundled_specs() -> tuple[str, ...]:
    """Names of the specs that the package carries; `builtin:NAME` loads one."""
    from kvcompile.spec.bundled import bundled_specs

    return bundled_specs()
