"""Trap: an option silently ignored.  Every leaf of the schema changes the Spec or is refused by name."""

import copy
from typing import get_args, get_origin

import pytest
import yaml

from kvcompile.ir.errors import SpecError
from kvcompile.spec import load_spec
from kvcompile.spec.messages import form_of
from kvcompile.spec.patterns import write_pattern
from kvcompile.spec.schema import ClustersForm, SampleForm, SpecForm, ZoneKind

ZONES = {
    "all": {},
    "sink_recent": {"sink_tokens": 3, "recent_tokens": 5},
    "sample": {"lsh": {}},
    "static": {"keys": 7},
    "clusters": {"tokens_per_cluster": 8, "exact": "5%", "estimate": "11%"},
    "top_k": {"k": 9, "index": {"sketch": {"bytes_per_key": 12}}},
}
PAGES = {"pages": 5, "page_tokens": 48, "index": "minmax"}
BESIDE_SINKS = ("static", "top_k", "clusters", "sample")


def container(annotation):
    """list or dict when the annotation is one of forms, whatever it is wrapped in."""
    if get_origin(annotation) in (list, dict):
        return get_origin(annotation)
    return next((found for found in map(container, get_args(annotation)) if found), None)


def leaves(form, path=()):
    """(path, examples) of every field that is no mapping of further fields."""
    for name, info in form.model_fields.items():
        inner = form_of(info.annotation)
        if inner is None or not inner.model_fields:
            yield (*path, name), info.examples
        else:
            entry = {dict: ("mine",), list: (1 if name == "heads" else 0,), None: ()}[container(info.annotation)]
            yield from leaves(inner, (*path, name, *entry))


LEAVES = dict(leaves(SpecForm))


def base(path, folder):
    """A right spec in which the field at `path` could matter and is not written yet."""
    spec = {
        "kvcompile": 1,
        "model": {"path": "some/model"},
        "policies": {"mine": {"zones": [{"sink_recent": dict(ZONES["sink_recent"])}]}},
        "heads": [{"policy": "mine"}, {"policy": "mine"}],
        "output": {"directory": str(folder / "out")} if path[0] == "output" else {},
    }
    if path == ("target", "disk"):
        spec["policies"]["mine"]["zones"] = [{"all": {"device": "disk"}}]
    if path[-1] in ("pattern", "share"):
        spec["heads"][1] |= {"pattern": str(folder / "p.yaml"), "share": "30%"}
    if path[:2] == ("prefix", "shared"):
        text = {"file": str(folder / "p.yaml")} if path[-1] == "file" else {"text": "a text"}
        spec["prefix"] = {"shared": [{"name": "a", **text}, {"name": "system" if path[-1] == "after" else "b", "text": "another"}]}
    if "zones" in path:
        options = PAGES if path[-1] in ("pages", "page_tokens") else ZONES.get(path[4], {})
        spec["policies"]["mine"]["zones"] = [{path[4]: copy.deepcopy(options)}]
        if path[4] in BESIDE_SINKS:
            spec["policies"]["mine"]["zones"].insert(0, {"sink_recent": dict(ZONES["sink_recent"])})
    return spec


def put(spec, path, value):
    here = spec
    for step in path[:-1]:
        here = here[step] if isinstance(here, list) else here.setdefault(step, {})
    here[path[-1]] = value
    return spec


def outcome(spec):
    try:
        return load_spec(spec)
    except SpecError as error:
        return str(error)


def test_the_walk_finds_the_whole_schema():
    dotted = {".".join(map(str, path)) for path in LEAVES}
    assert {"kvcompile", "model.dtype", "target.memory", "heads.1.share", "policies.mine.store.kivi.bits"} <= dotted
    assert {"policies.mine.zones.0.sink_recent.sink_tokens", "policies.mine.zones.0.sample.lsh.tables", "prefix.shared.0.file"} <= dotted
    assert len(dotted) > 50
    assert {f"policies.mine.zones.0.clusters.{name}" for name in ClustersForm.model_fields if name != "store"} <= dotted
    assert set(SampleForm.model_fields) == {"store", "device", "lsh"}
    assert len(ZoneKind.model_fields) == 7


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: ".".join(map(str, path)))
def test_every_field_changes_the_spec_or_is_refused_by_name(path, tmp_path):
    write_pattern(tmp_path / "p.yaml", model="toy", scores=[[0.1, 0.9]])
    write_pattern(tmp_path / "q.yaml", model="toy", scores=[[0.2, 0.9]])
    plain = outcome(base(path, tmp_path))
    examples = [tmp_path / "q.yaml"] if path[-1] in ("pattern", "file") else [2] if path == ("kvcompile",) else LEAVES[path]
    assert examples, "a field without examples"
    changed = False
    for example in examples:
        value = yaml.safe_load(example) if isinstance(example, str) and example[0] in "[{" else example
        place = tuple(1 if step == 0 and "zones" in path and path[4] in BESIDE_SINKS else step for step in path)
        found = outcome(put(base(path, tmp_path), place, value))
        if isinstance(found, str):
            no_change = path[-1] == "device" and value == "cpu" and "it changes nothing" in found
            assert "is not built in kvcompile" in found or no_change or (path == ("kvcompile",) and "2 is not allowed" in found)
            changed = True
        else:
            changed = changed or found != plain
    assert changed, f"{path} is silently ignored"
