"""kvcompile compiles a causal language model that knows nothing of KV caches into an incremental decoder.

Every name below is imported when it is first used, so that `import kvcompile` costs nothing and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcompile.compiler import compile, trace
    from kvcompile.ir.errors import KvcompileError
    from kvcompile.pipeline import Pipeline
    from kvcompile.runtime.model import CompiledModel
    from kvcompile.runtime.prefix_tree import PrefixTree
    from kvcompile.runtime.session import Session
    from kvcompile.spec import load_spec
    from kvcompile.transformers_cache import Cache

__version__ = "0.1.0"

__all__ = ["Cache", "CompiledModel", "KvcompileError", "Pipeline", "PrefixTree", "Session", "__version__", "compile", "load_spec", "trace"]

_HOME = {
    "compile": "kvcompile.compiler",
    "trace": "kvcompile.compiler",
    "load_spec": "kvcompile.spec",
    "Pipeline": "kvcompile.pipeline",
    "CompiledModel": "kvcompile.runtime.model",
    "PrefixTree": "kvcompile.runtime.prefix_tree",
    "Session": "kvcompile.runtime.session",
    "Cache": "kvcompile.transformers_cache",
    "KvcompileError": "kvcompile.ir.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'kvcompile' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
