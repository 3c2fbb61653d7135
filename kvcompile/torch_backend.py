"""`torch.compile(model, backend="kvcompile", options={"spec": ...})`: each KV head of a model's own cache reads what the spec lets it read.

Found by entry point (pyproject.toml, group torch_dynamo_backends), so that nobody imports kvcompile for it.  The cache stays the
model's: reading is saved, memory is not (`kvcompile.Cache` saves both).

Rules:
1. Dynamo's graph is rewritten before AOTAutograd, where attention still is one call of `scaled_dot_product_attention` with its mask;
   the rest goes to Inductor.
2. An attention whose KV heads are all `full` stays as it was.  Another becomes `kvc::attend_banded` (runtime/banded.py), over the KV
   heads as they were before they were repeated.
3. An attention that cannot be rewritten stays dense, and a warning says where it is and why.
4. A layer with a sliding window or chunks of its own keeps them whatever the policy; the model's configuration tells which.  Where none
   can be read, an attention with a mask stays dense (rule 3): the mask of one query does not tell padding, which sinks stand behind,
   from what a window hides.
5. A spec's `layers` count every attention of the graph, those of rule 3 too.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kvcompile.ir.errors import Problem, SpecError, UnsupportedGraphError
from kvcompile.ir.policy import All, HeadPolicy, SinkRecent
from kvcompile.ir.sites import AttentionSite
from kvcompile.ir.spec import Spec
from kvcompile.ir.unit import Unit
from kvcompile.passes.assign_policies import AssignPolicies
from kvcompile.runtime.banded import ATTEND_BANDED, VISIBLE_PLACES
from kvcompile.spec import load_spec

WHERE = 'torch.compile(backend="kvcompile")'
_OPTIONS = ("spec",)
_SDPA = (torch._C._nn.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_SOFTMAX = ("softmax",)
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_PRODUCT_DISTANCE = 12  # operations between a product and the softmax of an attention that is spelt out: scale, soft cap, mask, casts
_SPEC_FIELDS_USED = frozenset({"policies", "heads", "source", "lines"})

_said: set[str] = set()  # what is said once a process


def kvcompile_backend(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None, **other: Any
) -> Callable[..., Any]:
    """Compiles one graph of Dynamo.

    options: {"spec": a path, `builtin:NAME`, a dict or a Spec}, which names policies and heads and nothing else.
    mode:    Inductor's; `torch.compile` takes either mode or options, so that it comes from a caller of this function only.
    Returns what runs the graph.  Raises SpecError for options and specs that mean nothing here, and UnsupportedGraphError for a graph
    that holds only some of the model's attentions or is to be differentiated; torch wraps both in BackendCompilerFailed.
    """
    spec = _read_options(options, other)
    rewrite = rewrite_attention(gm, spec)
    for warning in rewrite.warnings:
        warnings.warn(warning, stacklevel=2)
    if rewrite.rewritten:
        _say_once(
            "the kvcompile backend saves reading, not memory: the model's own cache keeps every token. "
            "model.generate(..., past_key_values=kvcompile.Cache(model, spec=...)) saves both."
        )
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, example_inputs, config_patches=list_mode_options(mode) if mode else None)
    return compiled  # type: ignore[no-any-return]


def _read_options(options: Mapping[str, Any] | None, other: Mapping[str, Any]) -> Spec:
    given = {**(options or {}), **other}
    unknown = [name for name in given if name not in _OPTIONS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], _OPTIONS, 1)
        mend = f"Write {near[0]!r}." if near else 'Write options={"spec": ...} and nothing else.'
        raise SpecError(Problem(WHERE, f"the option {unknown[0]!r} is not known.", mend))
    if "spec" not in given:
        raise SpecError(
            Problem(WHERE, "there is no spec.", 'Write options={"spec": "duo.yaml"}, or a dict; {"kvcompile": 1} is policy full.')
        )
    spec = load_spec(given["spec"], check_model=False)
    problems = [
        Problem(spec.where(name), f"means nothing to {WHERE}, which is given a model.", "Leave it out.") for name in idle_fields(spec, ())
    ]
    for name, policy in spec.policies.items():
        for what, asked in (
            ("store", bool(policy.store.describe())),
            ("rollback", policy.rollback_tokens),
            ("positions", policy.positions != "absolute"),
        ):
            if asked:
                problems.append(
                    Problem(
                        spec.where(f"policies.{name}.{what}"),
                        f"means nothing to {WHERE}: the cache and the rotation are the model's.",
                        "Leave it out, or use kvcompile.compile or kvcompile.Cache.",
                    )
                )
    for rule in spec.heads:
        policy = spec.policies[rule.policy]
        if policy.found is not None:
            what = f"policy {policy.name} finds keys while tokens are generated, and {WHERE} is shown masks and a cache of the model's own."
            problems.append(
                Problem(f"{rule.where}.policy", what, "Use kvcompile.compile or kvcompile.Cache, or a policy of full or streaming.")
            )
    if problems:
        raise SpecError(*problems)
    return spec


def idle_fields(spec: Spec, used: Sequence[str]) -> list[str]:
    """What a spec says beyond its policies, its heads and the fields `used`, as the spec names it."""
    default = load_spec({"kvcompile": 1})
    names = {"prefill_chunk_tokens": "prefill", "verify_tokens": "verify"}
    said = {each.name: (getattr(spec, each.name), getattr(default, each.name)) for each in fields(Spec)}
    said["target"] = replace(spec.target, where=""), replace(default.target, where="")
    kept = _SPEC_FIELDS_USED.union(used)
    return [names.get(name, name) for name, (value, usual) in said.items() if name not in kept and value != usual]


@dataclass
class Rewrite:
    """What became of a graph's attentions.  rewritten: paths of those that now read less."""

    rewritten: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Call:
    """A call of scaled_dot_product_attention; key and value are those before the KV heads were repeated."""

    node: Node
    path: str
    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float

    def site(self, index: int) -> AttentionSite:
        query, key, value = (_value(each) for each in (self.query, self.key, self.value))
        return AttentionSite(
            index=index,
            path=self.path or f"attention {index}",
            query_heads=int(query.shape[1]),
            kv_heads=int(key.shape[1]),
            head_dim=int(query.shape[3]),
            value_dim=int(value.shape[3]),
            scale=self.scale,
            dtype=str(query.dtype).removeprefix("torch."),
        )


@dataclass(frozen=True)
class _Left:
    """An attention that stays as it is; kv_heads: None where its graph does not show them."""

    node: Node
    why: str
    kv_heads: int | None

    def site(self, index: int, usual_kv_heads: int) -> AttentionSite:
        """What takes its place among the layers; usual_kv_heads: of the attentions that are understood."""
        heads = self.kv_heads or usual_kv_heads
        path = _path(self.node) or f"attention {index}"
        return AttentionSite(index, path, query_heads=heads, kv_heads=heads, head_dim=0, value_dim=0, scale=0.0, dtype="")


def rewrite_attention(gm: GraphModule, spec: Spec) -> Rewrite:
    """Rules 2 to 5, in place.  Raises SpecError where a rule names heads that the graph does not have."""
    rewrite = Rewrite()
    attentions: list[_Call | _Left] = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _SDPA:
            found = _match(node)
            attentions.append(found if isinstance(found, _Call) else _Left(node, found, _shown_kv_heads(node)))
        elif _is_spelt_out(node):
            attentions.append(_Left(node, "it is spelt out as products and a softmax", None))
    calls = [each for each in attentions if isinstance(each, _Call)]
    rewrite.warnings += [_unmatched(each.node, each.why) for each in attentions if isinstance(each, _Left)]
    wants_less = any(not _is_full(spec.policies[rule.policy]) for rule in spec.heads)
    if not wants_less:
        rewrite.warnings.clear()  # dense is what the spec asks for
    if not calls or not wants_less:
        return rewrite
    _check_whole(calls[0])
    _check_gradients()
    usual = max(int(_value(call.key).shape[1]) for call in calls)
    sites = tuple(each.site(index) if isinstance(each, _Call) else each.site(index, usual) for index, each in enumerate(attentions))
    unit = AssignPolicies().run(Unit(gm, spec, sites))
    rewrite.warnings += unit.warnings
    own_windows = _layers_with_own_windows()
    keeping = 0
    places: dict[Node, Node] = {}
    for index, (call, policies) in enumerate(zip(attentions, unit.policies, strict=True)):
        if isinstance(call, _Left) or all(_is_full(policy) for policy in policies):
            continue
        if own_windows is None and call.mask is not None:
            rewrite.warnings.append(_unmatched(call.node, "no configuration of the model tells whether its mask holds a window of its own"))
        elif own_windows and _layer_number(call.path, index) in own_windows:
            keeping += 1
        else:
            _replace(gm.graph, call, policies, places)
            rewrite.rewritten.append(call.path)
    if keeping:
        rewrite.warnings.append(f"the kvcompile backend: {keeping} layers keep the model's own window or chunk whatever the policy.")
    gm.recompile()  # repeated heads that nobody reads any more are left to Inductor: fx takes what writes in place for dead
    return rewrite


def _replace(graph: torch.fx.Graph, call: _Call, policies: Sequence[HeadPolicy], places: dict[Node, Node]) -> None:
    zones = [policy.zones[0] for policy in policies]
    sinks = [zone.sink_tokens if isinstance(zone, SinkRecent) else 0 for zone in zones]
    recents = [zone.recent_tokens if isinstance(zone, SinkRecent) else 0 for zone in zones]
    with graph.inserting_before(call.node):
        if call.mask is not None and call.mask not in places:
            places[call.mask] = graph.call_function(VISIBLE_PLACES, (call.mask,))  # once for all layers that share the mask
        place = None if call.mask is None else places[call.mask]
        new = graph.call_function(ATTEND_BANDED, (call.query, call.key, call.value, call.mask, place, call.scale, sinks, recents))
    new.meta.update(call.node.meta)
    call.node.replace_all_uses_with(new)
    graph.erase_node(call.node)


def _match(node: Node) -> _Call | str:
    """The call, or why it cannot be rewritten."""
    given = dict(zip(_SDPA_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    query, key, value, mask = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
    if not (isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)):
        return "its query, key or value is a constant"
    if given.get("dropout_p"):
        return "it drops weights at random, as in training"
    shapes = [_value(each).shape for each in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        return "its query, key or value is not of shape [batch, heads, tokens, dimension]"
    key, value = _before_repeat(key), _before_repeat(value)
    if _value(key).shape[1] != _value(value).shape[1] or shapes[0][1] % _value(key).shape[1]:
        return "its keys and values have different numbers of heads"
    one_query = isinstance(shapes[0][2], int) and shapes[0][2] == 1
    if mask is not None and (not isinstance(mask, Node) or _value(mask).dim() != 4):
        return "its mask is not of shape [batch, heads, queries, keys]"
    causal = bool(given.get("is_causal", False))
    if mask is None and (not one_query if not causal else one_query and shapes[1][2] != 1):
        return "it is not causal, as far as its call tells"
    scale = given.get("scale")
    if scale is not None and not isinstance(scale, int | float):
        return "its scale is not a constant"
    mask = mask if isinstance(mask, Node) else None
    return _Call(node, _path(node), query, key, value, mask, int(shapes[0][3]) ** -0.5 if scale is None else float(scale))


def _shown_kv_heads(node: Node) -> int | None:
    """Of a call that was not matched; None where its key is not of shape [batch, heads, tokens, dimension]."""
    key = node.kwargs.get("key", node.args[1] if len(node.args) > 1 else None)
    return int(_value(_before_repeat(key)).shape[1]) if isinstance(key, Node) and _value(key).dim() == 4 else None


def _before_repeat(node: Node) -> Node:
    """What `node` repeats head by head, [B, H, T, D] -> [B, H x G, T, D]: unsqueezed, expanded, reshaped; or repeat_interleave."""
    name = _name(node)
    if name == "repeat_interleave" and isinstance(node.args[0], Node):
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
        repeats = node.kwargs.get("repeats", node.args[1] if len(node.args) > 1 else None)
        return node.args[0] if dim in (1, -3) and isinstance(repeats, int) else node
    if name not in ("reshape", "view", "flatten"):
        return node
    expanded = node.args[0]
    if not isinstance(expanded, Node) or _name(expanded) != "expand":
        return node
    opened = expanded.args[0]
    if not isinstance(opened, Node) or not isinstance(opened.args[0], Node):
        return node
    whole = slice(None, None, None)
    at_two = (_name(opened) == "getitem" and opened.args[1] == (whole, whole, None, whole, whole)) or (
        _name(opened) == "unsqueeze" and (opened.args[1:] or (opened.kwargs.get("dim"),)) == (2,)
    )
    source = opened.args[0]
    before, middle, after = (_value(each).shape for each in (source, expanded, node))
    if not at_two or (len(before), len(middle), len(after)) != (4, 5, 4):
        return node
    return source if int(before[1]) * int(middle[2]) == int(after[1]) else node


def _is_spelt_out(node: Node) -> bool:
    """A softmax between two products: attention written out by hand."""
    if _name(node) not in _SOFTMAX or _value_or_none(node) is None or _value(node).dim() < 3:
        return False
    return _near(node, lambda each: each.all_input_nodes) and _near(node, lambda each: list(each.users))


def _near(node: Node, neighbours: Callable[[Node], list[Node]]) -> bool:
    reached, frontier = {node}, [node]
    for _ in range(_PRODUCT_DISTANCE):
        frontier = [other for each in frontier for other in neighbours(each) if other not in reached]
        reached.update(frontier)
        if any(_name(each) in _PRODUCTS for each in frontier):
            return True
    return False


def _unmatched(node: Node, why: str) -> str:
    path, line = _path(node), _source_line(node)
    place = " at ".join(part for part in (path, line) if part) or node.name
    return f"the kvcompile backend leaves the attention of {place} as it is, reading every token: {why}."


def _check_whole(call: _Call) -> None:
    """A part of a model knows nothing of the layers before it, and a spec counts them from the model's first."""
    transaction = _current_translation()
    broken = transaction is not None and (
        transaction.f_code.co_name.startswith("torch_dynamo_resume")
        or getattr(getattr(transaction.output, "compile_subgraph_reason", None), "graph_break", False)
    )
    if broken:
        raise UnsupportedGraphError(
            Problem(
                f"{WHERE}: {call.path}",
                "Dynamo breaks the model into several graphs, so that its layers cannot be counted.",
                "torch.compile(..., fullgraph=True) shows where it breaks.",
            )
        )


def _check_gradients() -> None:
    if torch.is_grad_enabled():
        raise UnsupportedGraphError(
            Problem(WHERE, "the model is called with gradients enabled; heads that read less have none.", "Call it under torch.no_grad().")
        )


def _current_translation() -> Any:
    """What Dynamo is translating, None where this torch does not tell."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx()
    except (ImportError, AttributeError):
        return None


def _layers_with_own_windows() -> frozenset[int] | None:
    """Numbers of the layers with a window of their own, as the model's configuration says (rule 4).

    None where there is no one transformers configuration: neither the module that is compiled has it nor a single part of it.
    """
    scope = getattr(getattr(_current_translation(), "output", None), "local_scope", None) or {}
    root = scope.get("self")
    configs = _configurations(root) if isinstance(root, nn.Module) else []
    if len(configs) != 1:
        return None
    config = configs[0].get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        kinds = ["sliding_attention"] * getattr(config, "num_hidden_layers", 0) if windowed else []
    return frozenset(number for number, kind in enumerate(kinds) if "sliding" in kind or "chunked" in kind)


def _configurations(module: nn.Module) -> list[Any]:
    """Of the outermost modules that have one."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        return [config]
    return [config for part in module.children() for config in _configurations(part)]


def _layer_number(path: str, index: int) -> int:
    """index: the number among the attentions, for a path that tells none."""
    numbers = re.findall(r"\d+", path)
    return int(numbers[0]) if numbers else index


def _is_full(policy: HeadPolicy) -> bool:
    return policy.zones == (All(),)


def _path(node: Node) -> str:
    """`model.layers.3.self_attn`; "" where Dynamo does not tell."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path = re.sub(r"\.?_modules\['(\w+)'\]", r".\1", str(stack[-1][0]))
    path = re.sub(r"\[(?:'(\w+)'|(\d+))\]", lambda found: f".{found[1] or found[2]}", path)
    return re.sub(r"^L\.self\.?", "", path)


def _source_line(node: Node) -> str:
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return "" if not found else f"{found[-1][0].rpartition('/')[2]}:{found[-1][1]}"


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "").split(".")[0]


def _value(node: Node) -> Tensor:
    value = _value_or_none(node)
    assert value is not None, f"{node.name} has no example value"
    return value


def _value_or_none(node: Node) -> Tensor | None:
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, Tensor) else None


def _say_once(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        warnings.warn(sentence, stacklevel=3)


__all__ = ["Rewrite", "kvcompile_backend", "rewrite_attention"]
