"""The Hugging Face front end: transformers' attention interface, so that each attention becomes one `kvc.attend` node.

Both registries are needed.  A custom attention without a mask function gets `attention_mask=None` even for a padded
batch, and the mask is lost without a word.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.passes.fix_frequency_branch import frequencies_chosen_in_the_graph

NAME = "kvcompile"
# what a packed batch adds: traced graphs hold one sequence, sessions keep theirs apart
_KNOWN_MASKS = frozenset({"causal_mask_function", "packed_sequence_mask_function", "sliding_window_overlay", "chunked_overlay"})
_LEARNT_SINKS = ("s_aux", "sinks")
# keyword tensors that repeat what positions and sites already say
_HARMLESS = frozenset({"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"})

_NOT_GIVEN: Any = object()  # a layer that says sliding_window=None has none; one that says nothing may have it as an attribute


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
    sliding_window: int | None = _NOT_GIVEN,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """What transformers calls at each attention; shapes as in `kvc.attend`."""
    owner = type(module).__name__
    if attention_mask is not None and not _is_marker(attention_mask):
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
    if attention_mask is not None:
        window, chunk = _marked_bounds(attention_mask)  # what the model's own attention sees; the keyword is only flash attention's
    else:
        chunk = 0
        window = int((getattr(module, "sliding_window", None) if sliding_window is _NOT_GIVEN else sliding_window) or 0)
    out = ATTEND(query, key, value, sinks[0] if sinks else None, -1, float(scale), window, float(softcap or 0.0), chunk)
    return out, None


def _marker(window: int, chunk: int) -> Tensor:
    """Stands for a mask on its way from the model's mask factory to its attention: its sizes tell window and chunk, 0 for none.

    It holds no element, so slicing its last dimension, as models do, changes nothing.
    """
    return torch.empty(1, chunk + 1, window + 1, 0)


def _is_marker(mask: Tensor) -> bool:
    return mask.dim() == 4 and mask.shape[3] == 0


def _marked_bounds(mask: Tensor) -> tuple[int, int]:
    """(window, chunk)."""
    return int(mask.shape[2]) - 1, int(mask.shape[1]) - 1


def _leaf_masks(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The mask functions that transformers combined into `function`, found in its closures."""
    inner = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,)) if callable(part)]
    if not parts:
        yield function
    for part in parts:
        yield from _leaf_masks(part)


def _mask_name(leaf: Callable[..., Any]) -> str:
    return leaf.__qualname__.split(".")[0]


def foreign_mask(function: Callable[..., Any]) -> str:
    """The first of what `function` combines that is neither causal, packed, sliding nor chunked, as transformers names it; "" for none.

    function: the mask function that transformers gives a mask factory.
    """
    return next((name for name in map(_mask_name, _leaf_masks(function)) if name not in _KNOWN_MASKS), "")


@dataclass
class MaskRecorder:
    """Stands for transformers' mask factory: makes a marker that tells each attention its window.

    Refuses every mask that is not causal, sliding or chunked, by the name transformers gives it.  Keeps the windows it gave out, so
    that `trace` can see that each reached a site.
    """

    windows: set[int] = field(default_factory=set)

    def __call__(
        self,
        *shape: Any,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        **keywords: Any,
    ) -> Tensor:
        window = chunk = 0
        if attention_mask is not None:
            raise _refuse(
                "the model was called with a padded batch (an attention_mask).", "Give each sequence its own session instead of padding."
            )
        if mask_function is not None and (foreign := foreign_mask(mask_function)):
            raise _refuse(f"the model's attention mask uses {foreign}.", "Built: causal, sliding-window and chunked masks.")
        for leaf in _leaf_masks(mask_function) if mask_function is not None else ():
            kind = _mask_name(leaf)
            if kind == "sliding_window_overlay":
                assert leaf.__closure__ is not None
                window = int(leaf.__closure__[0].cell_contents)
                self.windows.add(window)
            elif kind == "chunked_overlay":
                assert leaf.__closure__ is not None
                chunk = _chunk_of(leaf)
                self.windows.add(chunk)
        return _marker(window, chunk)


def _chunk_of(leaf: Callable[..., Any]) -> int:
    """The chunk that transformers' `chunked_overlay(chunk_size, left_padding)` closed over."""
    return int(inspect.getclosurevars(leaf).nonlocals["chunk_size"])


@contextlib.contextmanager
def attention_as_nodes(model: torch.nn.Module) -> Iterator[MaskRecorder]:
    """While open, `model`'s attention is `kvc.attend`; its own implementations are restored afterwards."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    recorder = MaskRecorder()
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, recorder)
    with own_attention(model, NAME):
        yield recorder


@contextlib.contextmanager
def own_attention(model: torch.nn.Module, implementation: str) -> Iterator[None]:
    """While open, `model` runs transformers' own "sdpa" or "eager" attention, which the graph then spells out.

    Raises UnsupportedGraphError for a model that has no such implementation.
    """
    config: Any = model.config
    before = config._attn_implementation
    set_implementation: Any = model.set_attn_implementation
    try:
        set_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise _refuse(f"{type(model).__name__} has no {implementation} attention.", "") from error
    try:
        with _batched_experts(model), _without_cache(config), frequencies_chosen_in_the_graph(model):
            yield
    finally:
        set_implementation(before)


@contextlib.contextmanager
def _without_cache(config: Any) -> Iterator[None]:
    """A forward that hides `use_cache` among its keywords asks its configuration."""
    parts: list[Any] = [part for part in (config, getattr(config, "text_config", None)) if hasattr(part, "use_cache")]
    before = [part.use_cache for part in parts]
    for part in parts:
        part.use_cache = False
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.use_cache = value


@contextlib.contextmanager
def _batched_experts(model: Any) -> Iterator[None]:
    """Mixtures of experts run every expert's tokens as one batched product: the other ways sort tokens by expert, and a graph
    that sorts tokens cannot be seen to keep them apart.
    """
    if not getattr(model, "_can_set_experts_implementation", lambda: False)():
        yield
        return
    before = model.config._experts_implementation
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
