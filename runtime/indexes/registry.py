"""Indexes by name, and as files.

A file (runtime/checked_file.py) holds the index's tensors, its kind and its numbers.  It belongs to the keys that it was made from: who
restores it must have them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.ir.indexes import index_facts, index_names
from kvcompile.runtime.checked_file import FileKind, open_checked, writing
from kvcompile.runtime.indexes.clusters import Clusters
from kvcompile.runtime.indexes.flat import Flat
from kvcompile.runtime.indexes.hnsw import Hnsw
from kvcompile.runtime.indexes.index import IndexKind, KeyIndex
from kvcompile.runtime.indexes.ivf import Ivf
from kvcompile.runtime.indexes.lsh import Lsh
from kvcompile.runtime.indexes.pages import Cuboid, Mean, MinMax, Representatives
from kvcompile.runtime.indexes.roargraph import RoarGraph
from kvcompile.runtime.indexes.sketch import Sketch

INDEX_FILE = FileKind("index", b"KVCINDX\n", 3, "Build the index again from the keys.")
_BUILT_IN: dict[str, IndexKind] = {
    kind.name: kind
    for kind in (Flat(), Sketch(), RoarGraph(), MinMax(), Cuboid(), Representatives(), Mean(), Ivf(), Hnsw(), Clusters(), Lsh())
}


def index_kind(name: str) -> IndexKind:
    """The kind of this name: built in, or an entry point's.  Raises LookupError for one that is not there."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    kind: Any = index_facts(name)
    return kind  # type: ignore[no-any-return]


def save_index(path: str | Path, name: str, index: KeyIndex | None) -> None:
    """Writes an index of kind `name`; the file appears whole or not at all.

    Raises SessionError where it cannot be written, for a name of no kind, and for None, which a store without an index yet has.
    """
    try:
        index_kind(name)
    except LookupError as error:
        known = ", ".join(index_names())
        raise SessionError(Problem("save_index", f"there is no kind of index {name!r} ({error}).", f"Name one of {known}.")) from error
    if index is None:
        what = "there is no index yet: a store makes it when the first token is generated."
        raise SessionError(Problem("save_index", what, "Generate a token first."))
    tensors, numbers = index.state()
    with writing(path, INDEX_FILE) as file:
        written = {each: file.put(f"the tensor {each}", tensor) for each, tensor in tensors.items()}
        file.content |= {"kind": name, "numbers": dict(numbers), "tensors": written}


def load_index(path: str | Path) -> KeyIndex:
    """The index in a file.  Raises SessionError for what is no such file, was made by another version or is damaged."""
    with open_checked(path, INDEX_FILE) as file, file.believed():
        file.read_sections()
        name, numbers, written = str(file.content["kind"]), file.content["numbers"], file.content["tensors"]
        tensors = {each: file.tensor(found).clone() for each, found in written.items()}
        try:
            kind = index_kind(name)
        except LookupError as error:
            known = ", ".join(index_names())
            what = f"holds an index of a kind that is not installed ({error}); there are the indexes {known}."
            raise SessionError(Problem(str(path), what, "Install the package that has it.")) from error
        return kind.restore(tensors, numbers)
