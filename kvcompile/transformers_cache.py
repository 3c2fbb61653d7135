"""`kvcompile.Cache`: a `transformers.Cache` over our stores, so that `generate` of a Hugging Face model keeps and reads what a spec says.

    model.generate(ids, past_key_values=kvcompile.Cache(model, spec="duo.yaml"))

The cache gives new keys and values through to the attention, marked with whose they are, and transformers' attention implementation
"kvcompile_cache" appends and attends in one operator (runtime/cached.py).  Two registrations are needed: without a mask function a
custom attention gets no mask at all, even for a padded batch.  Source: transformers.cache_utils and masking_utils, 5.17 to 5.23.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import Problem, SessionError, SpecError, UnsupportedGraphError
from kvcompile.ir.sites import AttentionSite
from kvcompile.ir.spec import Spec, Target
from kvcompile.ir.unit import Unit
from kvcompile.link import link
from kvcompile.passes.assign_policies import AssignPolicies
from kvcompile.passes.build_zones import BuildZones
from kvcompile.passes.huggingface import attention_as_nodes, foreign_mask, is_huggingface
from kvcompile.passes.place import Place
from kvcompile.passes.request_kernels import RequestKernels
from kvcompile.rows_cache import RowsCache
from kvcompile.runtime.cached import ATTEND_CACHED, CachedSequences
from kvcompile.runtime.model import CompiledModel
from kvcompile.spec import load_spec

# not "kvcompile": that is what models are traced with (passes/huggingface.py)
NAME = "kvcompile_cache"
_WHERE = "kvcompile.Cache"
_LEARNT_SINKS = ("s_aux", "sinks")
_MARK = "_kvcompile_state"
_PROBE_TOKENS = 2
_PASSES = (AssignPolicies(), BuildZones(), Place(), RequestKernels())


class Cache(RowsCache):
    """Keys and values of a batch of sequences, each KV head's as the spec says.

    model: the Hugging Face model that will run with it; its attention implementation is set to "kvcompile_cache", with a warning.
           Or its configuration: then the model is built without weights to look at its attentions, and the caller sets it.
    spec:  policies, heads and what `target` says of the kernels; everything else is refused.
    Padding on either side takes no memory.  Raises SpecError, UnsupportedGraphError (an attention that our stores cannot serve), and
    what building kernels raises.
    """

    def __init__(self, model: Any, *, spec: str | Path | Mapping[str, Any] | Spec) -> None:
        checked = _read(spec)
        planned = _planned(model, checked)
        self._sequences = CachedSequences(planned)
        self.state = self._sequences.state
        super().__init__(self._sequences)
        for warning in planned.warnings:
            warnings.warn(warning, stacklevel=2)
        if isinstance(model, nn.Module):
            _select_attention(model)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values themselves, marked for the attention, which appends them.

        Raises SessionError where the layer before did not attend over this cache, or the model has more layers than it was made for.
        """
        if not torch.compiler.is_compiling():
            self._check_layer(layer_idx)
        setattr(key_states, _MARK, self.state)
        return key_states, value_states

    def _check_layer(self, layer: int) -> None:
        if layer >= len(self._sequences.model.plan.sites):
            what = f"layer {layer} was given to a cache of {len(self._sequences.model.plan.sites)} layers."
            raise SessionError(Problem(_WHERE, what, "Make a Cache of the model that runs with it."))
        if layer > 0 and not self._sequences.expects(layer):
            raise SessionError(
                Problem(
                    _WHERE,
                    f'layer {layer - 1} did not attend over this cache: the model\'s attention implementation is not "{NAME}".',
                    f"Make a Cache of the model that runs with it, or call model.set_attn_implementation({NAME!r}).",
                )
            )

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens that the sequences have read, padding included; while it is compiled, as a tensor."""
        return self.state[1] if torch.compiler.is_compiling() else super().get_seq_length()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """What transformers calls at each attention; scale, windows and soft caps are in the plan."""
    state = getattr(key, _MARK, None)
    if state is None:
        raise SessionError(
            Problem(
                _WHERE,
                f'{type(module).__name__} runs with attention implementation "{NAME}" on keys that no kvcompile.Cache gave it: '
                "it was called without one, or it changes the keys between the cache and the attention.",
                "Pass past_key_values=kvcompile.Cache(model, spec=...).  If you did, the model cannot run with it: use kvcompile.compile, "
                "or call model.set_attn_implementation('sdpa').",
            )
        )
    padding = None
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool or attention_mask.shape[2:] != (1, 1):
            raise SessionError(
                Problem(_WHERE, "the model was given an attention mask of its own.", "Give a mask of shape [batch, tokens], or none.")
            )
        padding = attention_mask[:, :, 0, 0]
    sinks = next((keywords[name] for name in _LEARNT_SINKS if keywords.get(name) is not None), None)
    return ATTEND_CACHED(query, key, value, padding, sinks, state, module.layer_idx), None


def _mask(
    *shape: Any,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    q_offset: Any = 0,
    config: Any = None,
    **keywords: Any,
) -> Tensor | None:
    """Which tokens are none of padding, [batch, tokens, 1, 1]: models cut the last dimension, which changes nothing here.

    Windows and chunks of `mask_function` are in the plan.  Raises SessionError for what is not.
    """
    foreign = "" if mask_function is None else _foreign_mask(mask_function, q_offset, config)
    if foreign:
        raise SessionError(
            Problem(
                _WHERE,
                f"the model's attention mask uses {foreign}: a token would see more or less than the tokens before it.",
                "Leave out what asks for it (token_type_ids of images, for example), or run the model's own attention: "
                "model.set_attn_implementation('sdpa').",
            )
        )
    return None if attention_mask is None else attention_mask[:, :, None, None]


def _foreign_mask(function: Callable[..., Any], q_offset: Any, config: Any) -> str:
    """`foreign_mask`, for Dynamo too: it does not look into closures, but runs a function on them while it translates.

    It cannot where one holds a tensor, as those of chunks and of masks joined by "or" do: there the graph is broken.
    """
    if not torch.compiler.is_compiling():
        return foreign_mask(function)
    if not isinstance(q_offset, Tensor):
        return ""  # no cache of ours (get_seq_length): the attention refuses the call
    holds_tensors = function.__code__.co_qualname.startswith("or_masks.") or bool(getattr(config, "attention_chunk_size", None))
    foreign: str = _foreign_mask_between_graphs(function) if holds_tensors else _foreign_mask_while_translating(function)
    return foreign


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _foreign_mask_while_translating(function: Callable[..., Any]) -> str:
    return foreign_mask(function)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _foreign_mask_between_graphs(function: Callable[..., Any]) -> str:
    return foreign_mask(function)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _select_attention(model: Any) -> None:
    before = model.config._attn_implementation
    if before == NAME:
        return
    model.set_attn_implementation(NAME)
    warnings.warn(
        f'kvcompile.Cache set the model\'s attention implementation to "{NAME}"; model.set_attn_implementation({before!r}) takes it back.',
        stacklevel=3,
    )


def _read(spec: str | Path | Mapping[str, Any] | Spec) -> Spec:
    from kvcompile.torch_backend import idle_fields

    checked = load_spec(spec, check_model=False)
    problems = [
        Problem(checked.where(name), f"means nothing to {_WHERE}, which is given a model.", "Leave it out.")
        for name in idle_fields(checked, ("target",))
    ]
    used = replace(checked.target, isa=None, kernels="generated", device="cpu", where="")
    if used != Target(where=""):
        problems.append(
            Problem(
                checked.where("target"),
                f"{_WHERE} reads device, isa and kernels of it; the rest means nothing where the model is the caller's.",
                "Leave the rest out.",
            )
        )
    problems += [
        Problem(
            checked.where(f"policies.{name}.positions"),
            f"{_WHERE} cannot rotate queries anew: the model has rotated them.",
            "Write `positions: absolute`, or use kvcompile.compile.",
        )
        for name, policy in checked.policies.items()
        if policy.positions != "absolute"
    ]
    if checked.target.device != "cpu":
        problems.append(Problem(checked.where("target.device"), f"{_WHERE} runs on the CPU.", "Write `device: cpu`."))
    if problems:
        raise SpecError(*problems)
    return checked


class _SiteRecorder(TorchDispatchMode):
    """Sites as they are called, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sites: list[AttentionSite] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function is ATTEND:
            self._record(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _record(
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
        slopes: tuple[float, ...] = (),
        sink_query: Tensor | None = None,
    ) -> None:
        number = len(self.sites)
        self.sites.append(
            AttentionSite(
                index=number,
                path=f"layers.{number}",
                query_heads=query.shape[1],
                kv_heads=key.shape[1],
                head_dim=query.shape[3],
                value_dim=value.shape[3],
                scale=scale,
                dtype=str(query.dtype).removeprefix("torch."),
                sliding_window=sliding_window or None,
                soft_cap=soft_cap or None,
                learnt_sinks=learnt_sinks is not None,
                chunk_tokens=chunk_tokens or None,
                slopes=tuple(slopes),
            )
        )


def attention_sites(model: Any) -> tuple[AttentionSite, ...]:
    """The attentions of a model in their order, from one call with two tokens; a configuration's model is built without weights.

    Raises UnsupportedGraphError for what transformers' attention interface does not show: models that do not use it, masks that are
    neither causal nor sliding, layers without an attention.
    """
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(model).eval()
    if not is_huggingface(model):
        raise UnsupportedGraphError(
            Problem(_WHERE, f"{type(model).__name__} is not a transformers model.", "Use kvcompile.compile, which takes any module.")
        )
    recorder = _SiteRecorder()
    device = next(model.parameters()).device
    # a cache of its own, because without one transformers looks for packed sequences, whose numbers a model without weights lacks
    call = {"past_key_values": transformers.DynamicCache(), "use_cache": True}
    with attention_as_nodes(model), torch.compiler.set_stance("force_eager"), recorder, torch.no_grad():
        model(input_ids=torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device=device), **call)
    config = model.config.get_text_config(decoder=True)
    layers = config.num_hidden_layers
    if len(recorder.sites) != layers:
        raise UnsupportedGraphError(
            Problem(
                _WHERE,
                f"{len(recorder.sites)} of the {layers} layers of {type(model).__name__} attend through transformers' attention interface.",
                "Use kvcompile.compile, which reads the model's graph.",
            )
        )
    return tuple(recorder.sites)


def _planned(model: Any, spec: Spec) -> CompiledModel:
    """Plan and kernels, with a program that nobody runs."""
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("input_ids"))
    module = torch.fx.GraphModule({}, graph)
    sites = attention_sites(model)
    config: Any = (model.config if isinstance(model, nn.Module) else model).get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    unit = Unit(module, spec, sites, context_tokens=getattr(config, "max_position_embeddings", None))
    for each in _PASSES:
        unit = each.run(unit)
        each.ensures(unit)
    assert unit.plan is not None
    eager = replace(spec, target=replace(spec.target, segments="eager"))  # there are no segments: nothing is to be said of them
    linked = link(module, (unit.plan,), eager, lambda name, line: contextlib.nullcontext())
    plan = replace(unit.plan, relay="off")  # of which a spec for a cache says nothing
    return CompiledModel(linked.program, plan, spec, config.vocab_size, linked.kernels, warnings=(*unit.warnings, *linked.warnings))


__all__ = ["NAME", "Cache", "attention_sites"]
