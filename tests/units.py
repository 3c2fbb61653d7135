"""Toy units on their way through the passes, and what a pass adds to one as text."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kvcompile.ir.show import difference, graph_text, unit_text
from kvcompile.ir.spec import Spec
from kvcompile.ir.unit import Unit
from kvcompile.passes.trace import trace
from kvcompile.pipeline import PASSES, Pipeline
from kvcompile.spec import load_spec


def spec(**sections: Any) -> Spec:
    """A spec without a model; `short` is 2 sink + 4 recent tokens."""
    short = {"zones": [{"sink_recent": {"sink_tokens": 2, "recent_tokens": 4}}]}
    used = any(rule["policy"] == "short" for rule in sections.get("heads", []))
    policies = {**({"short": short} if used else {}), **sections.pop("policies", {})}
    return load_spec({"kvcompile": 1, "policies": policies, **sections})


def traced(model: nn.Module, **sections: Any) -> Unit:
    return Unit(trace(model), spec(**sections))


def before(name: str, model: nn.Module, **sections: Any) -> Unit:
    """The unit as pass `name` gets it."""
    names = ["trace", *(each.name for each in PASSES)]
    return Pipeline().run(traced(model, **sections), stop_after=names[names.index(name) - 1])


def after(name: str, model: nn.Module, **sections: Any) -> Unit:
    return Pipeline().run(traced(model, **sections), stop_after=name)


def both(name: str, model: nn.Module, **sections: Any) -> tuple[Unit, Unit]:
    """The unit before and after a pass, from one trace."""
    (this,) = (each for each in PASSES if each.name == name)
    unit = before(name, model, **sections)
    kept = replace(unit, graph=copy.deepcopy(unit.graph))
    done = this.run(unit)
    this.ensures(done)
    return kept, done


def texts(name: str, model: nn.Module, **sections: Any) -> tuple[str, str]:
    """The graph before and after a pass."""
    one, two = both(name, model, **sections)
    return graph_text(one.graph), graph_text(two.graph)


def learnt(name: str, model: nn.Module, **sections: Any) -> str:
    """What a pass adds to what is known of the model, as a difference."""
    one, two = both(name, model, **sections)
    return difference(unit_text(one), unit_text(two))


def logits(graph: torch.fx.GraphModule, ids: torch.Tensor) -> torch.Tensor:
    """What a graph computes at any stage [tokens, vocabulary]: `kvc.attend` runs as an operator."""
    with torch.no_grad():
        return graph(ids[None], torch.arange(len(ids))[None])[0]


def some_ids(tokens: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))


def agrees_before_and_after(name: str, model: nn.Module, vocabulary: int, **sections: Any) -> None:
    """Asserts that a pass does not change what the graph computes, for numbers of tokens that the trace did not see."""
    one, two = (unit.graph for unit in both(name, model, **sections))
    for tokens in (1, 5, 40):
        ids = some_ids(tokens, vocabulary)
        torch.testing.assert_close(logits(two, ids), logits(one, ids), rtol=1e-5, atol=1e-5)
