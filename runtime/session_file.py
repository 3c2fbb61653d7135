"""Sessions as files: what a session has read, kept so that another process goes on with it.  docs/session_file.md has every offset.

A file holds the token ids, the state of each store (runtime/store.py: SavedStore) and of each convolution, and what they belong to: the
model by its hash, and the facts of the plan that decide how stores lie (policies, groups of KV heads, dtypes, the attentions' shapes).
Where keys lie otherwise in memory here than where the session was saved (blocks for C++ kernels, rows for torch) they are copied.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.ir.plan import HeadGroup, Plan, SitePlan
from kvcompile.runtime.checked_file import CheckedFile, CheckedWriter, FileKind, open_checked, writing
from kvcompile.runtime.convolution_state import ConvolutionState
from kvcompile.runtime.store import KVStore, StoreState, saved

if TYPE_CHECKING:
    from kvcompile.runtime.model import CompiledModel
    from kvcompile.runtime.session import Session

SESSION_FILE = FileKind("session", b"KVCSESS\n", 2, "Read the prompt again, and save the session anew.")
_SHOWN = 12  # digits of a hash in a message


def save_session(session: Session, path: str | Path) -> None:
    """As Session.save."""
    session.check_usable()
    model, facts = session.model, plan_facts(session.model.plan)
    assert model.hash, "a model that no compile made"
    with writing(path, SESSION_FILE) as file:
        file.content["model"] = {"name": model.name, "hash": model.hash, "vocabulary": model.vocabulary}
        file.content["plan"] = {"hash": facts_hash(facts), "facts": facts}
        file.content["tokens"] = file.put("the token ids", torch.tensor(session.tokens, dtype=torch.int64))
        file.content["stores"] = [
            [
                _written(file, saved(store).state(), group_name(site, group))
                for group, store in zip(site.groups, session.stores(number), strict=True)
            ]
            for number, site in enumerate(model.plan.sites)
        ]
        file.content["convolutions"] = [_written(file, each.state(), each.plan.site.path) for each in session.convolutions]


def read_session(
    model: CompiledModel, path: str | Path, stores: Sequence[Sequence[KVStore]], convolutions: Sequence[ConvolutionState]
) -> tuple[tuple[ConvolutionState, ...], list[int]]:
    """Fills empty stores; returns the states of convolutions and the token ids.  Raises as CompiledModel.restore."""
    with open_checked(path, SESSION_FILE) as file:
        with file.believed():
            _check_belongs(file, model)  # before what may be gigabytes is read
        file.read_sections()
        with file.believed("the tokens"):
            tokens = _tokens(file, model.vocabulary)
        with file.believed():
            groups = [
                (site, *each)
                for site, own, written in zip(model.plan.sites, stores, file.content["stores"], strict=True)
                for each in zip(site.groups, own, written, strict=True)
            ]
            filters = list(zip(convolutions, file.content["convolutions"], strict=True))
        for site, group, store, record in groups:
            with file.believed(group_name(site, group)):
                saved(store).restore(_read(file, record))
                _check_tokens(store.tokens, tokens)
        states = []
        for state, record in filters:
            with file.believed(state.plan.site.path):
                states.append(state.restored(_read(file, record)))
                _check_tokens(states[-1].tokens, tokens)
    return tuple(states), tokens


def group_name(site: SitePlan, group: HeadGroup) -> str:
    """What a message calls the store of a group: `model.layers.3.self_attn, KV heads 0 1`."""
    return f"{site.site.path}, KV heads {' '.join(map(str, group.kv_heads))}"


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Everything that decides how stores lie and what their numbers mean, as JSON has it: no name of a policy, no path, no budget."""
    facts = {
        "sites": [
            {
                "site": _without(asdict(each.site), "path"),
                "groups": [{"kv_heads": group.kv_heads, "device": group.device, "policy": _policy_facts(group)} for group in each.groups],
            }
            for each in plan.sites
        ],
        "convolutions": [
            {"site": _without(asdict(each.site), "path"), "rollback_tokens": each.rollback_tokens} for each in plan.convolutions
        ],
    }
    found: dict[str, Any] = json.loads(json.dumps(facts))  # tuples become lists, as in the file
    return found


def facts_hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _policy_facts(group: HeadGroup) -> dict[str, Any]:
    policy = group.policy
    kinds = {"zones": [{type(zone).__name__: asdict(zone)} for zone in policy.zones]}
    quantised = policy.store.quantised
    store = {"dtype": policy.store.dtype, "quantised": quantised and {type(quantised).__name__: asdict(quantised)}}
    return kinds | {"positions": policy.positions, "rollback_tokens": policy.rollback_tokens, "store": store}


def _without(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != name}


def _check_belongs(file: CheckedFile, model: CompiledModel) -> None:
    """Raises SessionError for a file of another model, or of this one under another plan, and names what differs."""
    theirs, own, facts = file.content["model"], file.content["plan"]["facts"], plan_facts(model.plan)
    difference = first_difference(own, facts)
    if difference is not None and difference[0].endswith(".site.dtype"):  # first: a module's hash depends on it too
        what = f"was saved by a model that computes in {difference[1]}; this one computes in {difference[2]}."
        raise SessionError(Problem(file.path, what, f"Write `dtype: {difference[1]}` in `model:`, or read the prompt again."))
    if theirs["hash"] != model.hash or theirs["vocabulary"] != model.vocabulary:
        they, we = f"{theirs['name']} (hash {str(theirs['hash'])[:_SHOWN]})", f"{model.name} (hash {model.hash[:_SHOWN]})"
        what = f"was saved by another model: {they}; this one is {we}."
        raise SessionError(Problem(file.path, what, "Restore it with the model that saved it, or read the prompt again."))
    if difference is not None:
        place, written, here = difference
        what = f"was saved under another plan: {_place(place, model.plan)} is {_short(written)} in the file and {_short(here)} here."
        raise SessionError(Problem(file.path, what, "Compile with the policies that it was saved under, or read the prompt again."))
    if file.content["plan"]["hash"] != facts_hash(facts):
        raise ValueError("the plan's hash is another one's")


def first_difference(written: Any, here: Any, place: str = "") -> tuple[str, Any, Any] | None:
    """Where two JSON values differ first, and what stands there; None where they are equal."""
    if isinstance(written, dict) and isinstance(here, dict) and written.keys() == here.keys():
        parts = [(f"{place}.{key}", (written[key], here[key])) for key in here]
    elif isinstance(written, list) and isinstance(here, list) and len(written) == len(here):
        parts = [(f"{place}[{number}]", pair) for number, pair in enumerate(zip(written, here, strict=True))]
    else:
        return None if written == here else (place, written, here)
    return next((found for name, pair in parts if (found := first_difference(*pair, name)) is not None), None)


def _place(place: str, plan: Plan) -> str:
    """`.sites[3].groups[0].policy` with the module's path."""
    place = place.removeprefix(".")
    kind, _, rest = place.partition("[")
    number = rest.partition("]")[0]
    if kind != "sites" or not number:
        return place
    return f"{place} ({plan.sites[int(number)].site.path})"


def _short(value: Any, most: int = 80) -> str:
    text = f"a list of {len(value)}" if isinstance(value, list) and len(value) > 4 else json.dumps(value)
    return text if len(text) <= most else f"{text[:most]} ..."


def _tokens(file: CheckedFile, vocabulary: int) -> list[int]:
    ids = file.tensor(file.content["tokens"])
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"{ids.dtype} {list(ids.shape)}")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"ids from {int(ids.min())} to {int(ids.max())} of a vocabulary of {vocabulary}")
    found: list[int] = ids.tolist()
    return found


def _check_tokens(held: int, tokens: list[int]) -> None:
    if held != len(tokens):
        raise ValueError(f"{held} of {len(tokens)} tokens")


def _written(file: CheckedWriter, state: StoreState, name: str) -> dict[str, Any]:
    return {
        "kind": state.kind,
        "numbers": dict(state.numbers),
        "tensors": {key: file.put(f"{name}: {key}", tensor) for key, tensor in state.tensors.items()},
        "inner": {key: _written(file, inner, f"{name}: {key}") for key, inner in state.inner.items()},
    }


def _read(file: CheckedFile, record: Mapping[str, Any]) -> StoreState:
    tensors = {key: file.tensor(found) for key, found in record["tensors"].items()}
    return StoreState(record["kind"], record["numbers"], tensors, {key: _read(file, inner) for key, inner in record["inner"].items()})
