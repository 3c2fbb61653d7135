"""What a spec's policies mean for a traced model, in float64 and without a store: streaming is held against it.

The graph as the first passes leave it (one `kvc.attend` a site, positions explicit) runs over the whole sequence; every
attention is `runtime.reference.attend` over what its KV heads' zone lets each query see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.choose_keys import hidden_by_choice
from kvcompile.ir.policy import All, SinkRecent, Zone
from kvcompile.runtime.reference import alibi, apply_learnt_sinks, attend, visible

_NARROWER = (torch.float32, torch.bfloat16, torch.float16)


class Oracle(torch.fx.Interpreter):
    """Runs a graph in float64 with every head's memory as `zone`; a site with a window or chunks of its own has those instead."""

    def __init__(self, graph: torch.fx.GraphModule, zone: Zone) -> None:
        super().__init__(graph)
        self._zone = zone
        self._keys: list[Tensor] = []

    def logits(self, ids: Tensor, first_position: int = 0) -> Tensor:
        """ids [tokens] at consecutive positions -> float64 logits [tokens, vocabulary]."""
        self._keys = []
        with torch.no_grad():
            logits: Tensor = self.run(ids[None], torch.arange(first_position, first_position + len(ids))[None])
        return logits[0]

    def rotated_share(self, ids: Tensor, shift: int = 5) -> list[float]:
        """Of each site, the share of a key's numbers that are others when all tokens stand `shift` places later, 0 to 1.

        1 is a full rotation (or a learnt position in the hidden state), 0 a layer that knows no positions.
        """
        self.logits(ids)
        here = self._keys
        self.logits(ids, shift)
        changed = [
            (first - second).abs().amax((0, 1, 2)) > 1e-6 * first.abs().max() for first, second in zip(here, self._keys, strict=True)
        ]
        return [float(numbers.double().mean()) for numbers in changed]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _widened(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is ATTEND:
            return self._attend(*args, **kwargs)
        args, kwargs = torch.utils._pytree.tree_map(lambda item: torch.float64 if _is_narrower(item) else item, (args, kwargs))
        return torch.utils._pytree.tree_map(_widened, super().call_function(target, args, kwargs))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        learnt_sinks: Tensor | None,
        site: int,
        scale: float,
        sliding_window: int,
        soft_cap: float,
        chunk_tokens: int = 0,
        slopes: Any = (),
        sink_query: Tensor | None = None,
        choosing: Tensor | None = None,
        chosen_tokens: int = 0,
    ) -> Tensor:
        self._keys.append(key)
        kv_heads, tokens = key.shape[1], query.shape[2]
        positions = torch.arange(tokens)
        zone = All() if sliding_window or chunk_tokens else self._zone
        seen_ST = visible(zone, positions, positions, chunk_tokens or None)
        if sliding_window:
            seen_ST &= visible(SinkRecent(0, sliding_window), positions, positions)
        if choosing is not None:
            seen_ST = ~hidden_by_choice(choosing[0], key[0, 0, :, key.shape[3] - choosing.shape[3] + 1 :], ~seen_ST, chosen_tokens)
        slopes_HG = torch.tensor(slopes, dtype=torch.float64).unflatten(0, (kv_heads, -1)) if slopes else None
        state = attend(
            query[0].unflatten(0, (kv_heads, -1)),
            key[0],
            value[0],
            seen_ST,
            scale,
            soft_cap or None,
            None if slopes_HG is None else alibi(slopes_HG, positions, positions),
        )
        if learnt_sinks is not None:
            state = apply_learnt_sinks(state, learnt_sinks.unflatten(0, (kv_heads, -1)))
        return state.out.flatten(0, 1).transpose(0, 1)[None].contiguous()  # as the operator's own: views of it follow


def _is_narrower(item: Any) -> bool:
    return isinstance(item, torch.dtype) and item in _NARROWER


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in _NARROWER else value
