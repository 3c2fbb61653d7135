"""The Hugging Face front end: transformers' attention interface, so that each attention becomes one `kvc.attend` node.

Both registries are needed.  A custom attention without a mask function gets `attention_mask=None` even for a padded
batch, and the mask is lost without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import Problem, UnsupportedGraphError

NAME = "kvcompile"
# what a packed batch adds: traced graphs hold one sequence, sessions keep theirs apart
_KNOWN_MASKS = frozenset({"causal_mask_function", "packed_sequence_mask_function"})
_LEARNT_SINKS = ("s_aux", "sinks")
# keyword tensors that repeat what positions and sites already say
_HARMLESS = frozenset({"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"})


def is_huggingface(module: torch.nn.Module) -> bool:
    """Whether `module` is a transformers model that dispatches its attention by name (no import of transformers)."""
    return hasattr(module, "set_attn_implementation") and hasattr(module, "config")


def _refuse(what: str, mend: str) -> UnsupportedGraphError:
    return UnsupportedGraphError(Problem("trace", what, mend))


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """What transformers calls at each attention; shapes as in `kvc.attend`."""
    owner = type(module).__name__
    if attention_mask is not None:
        raise _refuse(f"{owner} passes an attention mask of its own.", "Models whose mask is not causal or sliding are not supported.")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise _refuse(f"{owner} attends without a causal mask.", "Only causal language models can be compiled.")
    sinks = [keywords.pop(name) for name in _LEARNT_SINKS if keywords.get(name) is not None]
    for name, given in keywords.items():
        if isinstance(given, Tensor) and name not in _HARMLESS:
            raise _refuse(
                f"{owner} passes the tensor {name!r} to its attention, which kvcompile does not know.",
                "Its meaning would be lost; the model cannot be compiled yet.",
            )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if sliding_window is None:
        sliding_window = getattr(module, "sliding_window", None)
    out = ATTEND(query, key, value, sinks[0] if sinks else None, -1, float(scale), int(sliding_window or 0), float(softcap or 0.0))
    return out, None


def _leaf_masks(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The mask functions that transformers combined into `function`, found in its closures."""
    inner = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,)) if callable(part)]
    if not parts:
        yield function
    for part in parts:
        yield from _leaf_masks(part)


@dataclass
class MaskRecorder:
    """Stands for transformers' mask factory: makes no tensor, since sites know causal and sliding windows.

    Records the windows of the sliding masks that the model asked for, so that `trace` can see that each reached its
    site; refuses every other kind of mask by the name transformers gives it.
    """

    windows: set[int] = field(default_factory=set)

    def __call__(
        self,
        *shape: Any,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        **keywords: Any,
    ) -> None:
        if attention_mask is not None:
            raise _refuse(
                "the model was called with a padded batch (an attention_mask).", "Give each sequence its own session instead of padding."
            )
        for leaf in _leaf_masks(mask_function) if mask_function is not None else ():
            kind = leaf.__qualname__.split(".")[0]
            if kind == "sliding_window_overlay":
                assert leaf.__closure__ is not None
                self.windows.add(int(leaf.__closure__[0].cell_contents))
            elif kind not in _KNOWN_MASKS:
                raise _refuse(f"the model's attention mask uses {kind}.", "Built: causal and sliding-window masks.")


@contextlib.contextmanager
def attention_as_nodes(model: torch.nn.Module) -> Iterator[MaskRecorder]:
    """While open, `model`'s attention is `kvc.attend`; its own implementation is restored afterwards."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    recorder = MaskRecorder()
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, recorder)
    config: Any = model.config
    before = config._attn_implementation
    set_implementation: Any = model.set_attn_implementation
    set_implementation(NAME)
    try:
        yield recorder
    finally:
        set_implementation(before)
