"""Whether a running model attends, seen at its operators: what its modules are called proves nothing.

1. An attention is a fused one of torch over at least `_PLACES` keys, or a softmax over as many places whose weights multiply a
   product of their own: moving, cutting and casting the weights changes nothing.  A router's weights go to a few experts, those
   of a residual stream to a few layers.  exp(x - logsumexp(x)) is a softmax too.
2. With every attention's result replaced by zeros, a token that still changes a later one's logits goes through another mixer:
   a convolution, a recurrence.
3. A token whose logits change with what stands behind it, or with how much does, belongs to no causal model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PLACES = 8  # a tiny model has fewer experts, and no smaller window
_FUSED = "scaled_dot_product"
_SOFTMAX = ("_softmax", "_safe_softmax")
_PRODUCTS = ("bmm", "mm", "baddbmm")
_MOVES = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "expand", "clone", "_to_copy", "slice", "permute", "transpose", "t", "unsqueeze", "squeeze"),
        *("native_dropout", "dropout", "select", "nan_to_num", "where", "masked_fill", "split_with_sizes", "split", "as_strided", "copy_"),
        *("contiguous", "alias", "detach", "cat", "slice_scatter", "_reshape_alias", "mul", "add", "sub", "div", "scatter", "gather"),
    }
)


class AttentionWatch(TorchDispatchMode):
    """Counts attentions (`seen`); silence: their results are zeros."""

    def __init__(self, silence: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0
        self._silence = silence
        self._kept: list[Tensor] = []  # alive, so that an id stays one tensor's
        self._weights: set[int] = set()  # ids: of softmax weights, of log-sum-exps, of what those were taken from
        self._sums: set[int] = set()
        self._shifted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        out = func(*args, **(kwargs or {}))
        tensors = [item for item in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        if _FUSED in name:
            return self._attended(out) if args[1].shape[-2] >= _PLACES else out
        if name in _SOFTMAX:
            if out.shape[args[1]] >= _PLACES:
                self._mark(out, self._weights)
        elif name == "logsumexp":
            if args[0].shape[args[1][0]] >= _PLACES:
                self._mark(out, self._sums)
        elif name == "sub" and self._any(tensors, self._sums):
            self._mark(out, self._shifted)
        elif name == "exp" and self._any(tensors, self._shifted):
            self._mark(out, self._weights)
        elif name in _PRODUCTS:
            if self._any(tensors, self._weights) and not any(isinstance(tensor, torch.nn.Parameter) for tensor in tensors):
                return self._attended(out)
        elif name in _MOVES:
            for marks in (self._weights, self._sums, self._shifted):
                if self._any(tensors, marks):
                    for item in torch.utils._pytree.tree_leaves(out):
                        self._mark(item, marks)
        return out

    def _any(self, tensors: list[Tensor], marks: set[int]) -> bool:
        return any(id(tensor) in marks for tensor in tensors)

    def _mark(self, item: Any, marks: set[int]) -> None:
        if isinstance(item, Tensor):
            self._kept.append(item)
            marks.add(id(item))

    def _attended(self, out: Any) -> Any:
        self.seen += 1
        if not self._silence:
            return out
        return torch.utils._pytree.tree_map(lambda item: torch.zeros_like(item) if isinstance(item, Tensor) else item, out)


def attends(logits: Callable[[Tensor], Tensor], ids: Tensor) -> bool:
    """Rule 1 of the model behind `logits`, on ids [1, tokens]."""
    with AttentionWatch() as watch:
        logits(ids)
    return bool(watch.seen)


def mixes_otherwise(logits: Callable[[Tensor], Tensor], ids: Tensor, threshold: float = 1e-4) -> bool:
    """Rule 2: whether another second token changes logits after it while no attention tells of it.

    threshold: of a logit; batched products of a mixture of experts differ by 1e-6 with the routing of other tokens.
    """
    other = ids.clone()
    other[0, 1] = ids[0, 1] % 100 + 101
    with AttentionWatch(silence=True):
        first, second = logits(ids), logits(other)
    return bool((first - second)[0, 2:].abs().max() > threshold)


def looks_ahead(logits: Callable[[Tensor], Tensor], ids: Tensor, threshold: float = 1e-3) -> bool:
    """Rule 3: whether another last token changes logits before it, or leaving out the second half changes those of the first."""
    other, half = ids.clone(), ids.shape[1] // 2
    other[0, -1] = ids[0, -1] % 100 + 101
    whole = logits(ids)[0]
    if (logits(other)[0] - whole)[:-1].abs().max() > threshold:
        return True
    return bool((logits(ids[:, :half])[0] - whole[:half]).abs().max() > threshold)
