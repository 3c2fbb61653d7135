"""A `transformers.Cache` whose rows are sessions: what `generate()` asks of any cache, beams and rollbacks included.

`kvcompile.Cache` adds an attention to it (transformers_cache.py), `as_transformers` reads it with a compiled model (transformers_model.py).
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.ir.plan import Plan
from kvcompile.runtime.rows import SessionRows


class RowsCache(transformers.Cache):  # type: ignore[misc]  # transformers is not followed
    """Keys and values of a batch of sequences, each KV head's as the plan says."""

    def __init__(self, rows: SessionRows) -> None:
        self._rows = rows
        self.plan: Plan = rows.model.plan
        super().__init__(layers=[_Layer(rows) for _ in self.plan.sites])

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens that the sequences have read, padding included."""
        return self._rows.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[Any, int]:
        """Keys that a full layer would have; no mask of that size is ever made."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is none."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove tokens of every row (transformers counts them negatively).

        Raises SessionError, and changes nothing, beyond what a ring still holds (`rollback: n` in a policy).
        """
        if tokens_to_remove > 0:
            raise SessionError(
                Problem("crop", f"{tokens_to_remove} is not negative.", "Give minus the number of tokens that are to be taken back.")
            )
        self._rows.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; what is taken twice is forked and shares its past."""
        self._rows.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        self._rows.select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, side by side."""
        self._rows.select([row for row in range(self._rows.rows) for _ in range(repeats)])

    def reset(self) -> None:
        """Empty again, for a batch of any size."""
        self._rows.reset()

    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self._rows.nbytes()

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return self._rows.rows or -1

    @property
    def is_initialized(self) -> bool:
        return self._rows.rows > 0

    @property
    def is_croppable(self) -> bool:
        """Whether crop always works: no ring without `rollback`, and nothing that lets go of a prompt."""
        policies = [group.policy for site in self.plan.sites for group in site.groups]
        return all(
            policy.window is None or policy.looked_up is not None or (policy.found is None and policy.rollback_tokens > 0)
            for policy in policies
        )


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """What transformers asks of one layer; the sequences belong to the cache."""

    is_compileable = False  # of transformers' own compiling, which wants a mask of the cache's size
    is_sliding = False
    supports_early_init = False

    def __init__(self, rows: SessionRows) -> None:
        super().__init__()
        self._rows = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Stores are made by the first call."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        raise SessionError(Problem("kvcompile.Cache", "a layer was updated by itself.", "Call update of the cache."))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._rows.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self._rows.tokens

    def get_max_length(self) -> int:
        return -1


__all__ = ["RowsCache"]
