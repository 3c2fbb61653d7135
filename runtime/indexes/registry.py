"""Indexes by name, and as files.

A file is safetensors: the index's tensors, and in its metadata the version of this format, the kind, the numbers and a checksum of both,
as JSON.  Nothing in it is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.ir.indexes import index_facts, index_names
from kvcompile.runtime.indexes.clusters import Clusters
from kvcompile.runtime.indexes.flat import Flat
from kvcompile.runtime.indexes.hnsw import Hnsw
from kvcompile.runtime.indexes.index import IndexKind, KeyIndex
from kvcompile.runtime.indexes.ivf import Ivf
from kvcompile.runtime.indexes.pages import Cuboid, Mean, MinMax, Representatives
from kvcompile.runtime.indexes.roargraph import RoarGraph
from kvcompile.runtime.indexes.sketch import Sketch

FORMAT = 2
_BUILT_IN: dict[str, IndexKind] = {
    kind.name: kind for kind in (Flat(), Sketch(), RoarGraph(), MinMax(), Cuboid(), Representatives(), Mean(), Ivf(), Hnsw(), Clusters())
}


def index_kind(name: str) -> IndexKind:
    """The kind of this name: built in, or an entry point's.  Raises LookupError for one that is not there."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    kind: Any = index_facts(name)
    return kind  # type: ignore[no-any-return]


def save_index(path: str | Path, name: str, index: KeyIndex) -> None:
    """Writes an index of kind `name`; the file appears whole or not at all.  Raises SessionError where its folder cannot be written to."""
    tensors, numbers = index.state()
    written = {"format": FORMAT, "kind": name, "numbers": numbers, "checksum": _checksum(tensors, numbers)}
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        mend = "Make the folder, or name another one."
        raise SessionError(Problem(str(path), f"cannot be written ({error.strerror}).", mend)) from error
    os.close(handle)
    try:
        # safetensors keeps no metadata of a file without a tensor
        save_file({**tensors, "_": torch.zeros(1)}, temporary, {"kvcompile_index": json.dumps(written)})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_index(path: str | Path) -> KeyIndex:
    """The index in a file.  Raises SessionError for what is no such file, was made by another version or is damaged."""
    mend = "Build the index again from the keys."
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if key != "_"}  # noqa: SIM118
            described = (file.metadata() or {}).get("kvcompile_index")
    except (OSError, SafetensorError) as error:
        raise SessionError(Problem(str(path), f"is no index file ({error}).", mend)) from error
    if described is None:
        raise SessionError(Problem(str(path), "is a safetensors file without an index of kvcompile.", mend))
    try:
        header = json.loads(described)
        written, name, numbers, checksum = (header.get(field) for field in ("format", "kind", "numbers", "checksum"))
    except (ValueError, AttributeError) as error:
        raise SessionError(Problem(str(path), f"is damaged: its header is no JSON object ({error}).", mend)) from error
    if written != FORMAT:
        raise SessionError(Problem(str(path), f"was written in format {written}; this version reads format {FORMAT}.", mend))
    if checksum != _checksum(tensors, numbers):
        raise SessionError(Problem(str(path), "is damaged: its content does not have the checksum that was written with it.", mend))
    try:
        return index_kind(str(name)).restore(tensors, numbers)
    except SessionError:
        raise
    except LookupError as error:
        known = ", ".join(index_names())
        raise SessionError(Problem(str(path), f"cannot be read ({error}); there are the indexes {known}.", mend)) from error
    except (ValueError, TypeError) as error:
        raise SessionError(Problem(str(path), f"cannot be restored ({error}).", mend)) from error


def _checksum(tensors: Mapping[str, torch.Tensor], numbers: Any) -> str:
    """Of every tensor's name, dtype, shape and bytes, and of the numbers; hexadecimal."""
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
