"""Attention that a graph spells out becomes one `kvc.attend` node.

Two front ends: `scaled_dot_product_attention` with whatever mask (1), and  q @ k^T -> ... -> softmax -> ... @ v  (2).
What stands in the dots is not matched but probed as a function of the raw scores (`probe_scores`), so:

3. Everything between the scores and the second product must hang on the scores and on nothing else that knows tokens' content.
4. Query, key and value are the operands of the two products.  Leading dimensions are heads, whatever their number.
5. A KV head that was repeated for its query heads (expand, reshape, repeat_interleave) is found by sending numbers through the
   layout; every group of equal heads is one KV head.
7. A window wider than the tokens probed is a constant that something compares positions with: the constant is replaced by two
   small ones, and what the attention then sees tells the window.
6. A cast of query and key to a wider dtype than the value's belongs to the attention, which computes in float32 anyway.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.evaluate import ancestors, content_nodes, evaluate_nodes, opname, shape_at
from kvcompile.ir.graphs import constants
from kvcompile.ir.show import node_text
from kvcompile.ir.tokens import fake_value, place_of, token_dimensions
from kvcompile.passes.probe_scores import PROBE_TOKENS, TOLERANCE, LooksAhead, ScoreFacts, UnknownScores, probe_scores
from kvcompile.passes.recognise_choice import Choice, choosing_nodes, every_key, read_choice

_aten = torch.ops.aten
_SDPA = _aten.scaled_dot_product_attention.default
_SOFTMAX = (_aten.softmax.int, _aten._softmax.default, _aten._safe_softmax.default)
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default)
_LAYOUT = frozenset(
    {
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "expand", "unsqueeze", "squeeze", "transpose", "permute", "t"),
        *("reshape_as", "view_as"),
        *("clone", "contiguous", "repeat", "repeat_interleave", "alias", "detach", "expand_as", "movedim", "swapaxes"),
    }
)
_CASTS = frozenset({"to", "_to_copy", "type_as", "float"})
_NEARER = (11, 13)  # rule 7: what a constant is replaced by
_NO_WINDOW = 1 << 24  # a larger constant stands for minus infinity
_FAR_TOKENS, _FAR_NUMBERS = 2048, 1 << 24  # of a function looked at as a whole: tokens at most, and heads x tokens x tokens
_LONGER = 7  # tokens added to tell a size that was written into the graph from one that grows
_NO_SINK = -1e4  # a logit that takes no part


Arguments: TypeAlias = Mapping[torch.fx.Node, tuple[tuple[Any, ...], dict[str, Any]]]


# what was found of a function, by its text
_KnownFacts: TypeAlias = dict[str, ScoreFacts]


class _Weigh(Protocol):
    """Raw scores [heads, tokens, tokens] -> weights, as `probe_scores` takes it; with other arguments, other values of nodes."""

    def __call__(
        self, scores_HST: Tensor, arguments: Arguments | None = None, known: Mapping[torch.fx.Node, Tensor] | None = None
    ) -> Tensor: ...


def rewrite_attention(graph: torch.fx.Graph) -> set[str]:
    """Turns every attention that is spelt out in `graph` into a `kvc.attend` node; returns how they were: "sdpa", "products".

    Raises UnsupportedGraphError naming the first one that is not understood; FakeConstantError where a mask is a table whose
    numbers are not loaded.
    """
    _split_baddbmm(graph)
    _split_einsum(graph)
    input_ids, position_ids = graph.find_nodes(op="placeholder")
    chosen = tuple(choosing_nodes(graph))
    content = content_nodes(graph, input_ids, chosen)
    inputs = _Inputs(input_ids, position_ids, chosen)
    spelt: set[str] = set()
    known: _KnownFacts = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _SDPA:
            _rewrite(graph, _read_sdpa(node, inputs, content, known))
            spelt.add("sdpa")
        elif node.target in _SOFTMAX and len(token_dimensions(fake_value(node))) > 1 and node.users:
            _rewrite(graph, _read_products(node, inputs, content, known))
            spelt.add("products")
    graph.eliminate_dead_code()
    return spelt


@dataclass(frozen=True)
class _Inputs:
    """chosen: what chooses keys (`recognise_choice`), which is looked at apart: here every key is chosen."""

    input_ids: torch.fx.Node
    position_ids: torch.fx.Node
    chosen: tuple[torch.fx.Node, ...] = ()

    def of(self, tokens: int) -> dict[torch.fx.Node, Any]:
        """Some sequence of `tokens` tokens; which tokens they are must not matter."""
        return {self.input_ids: torch.arange(tokens)[None] % 7 + 3, self.position_ids: torch.arange(tokens)[None]}

    def at(self, tokens: int) -> dict[torch.fx.Node, Any]:
        return {**self.of(tokens), **{topk: every_key(topk, tokens) for topk in self.chosen}}


@dataclass(frozen=True)
class _Attention:
    """query [*lead, tokens, head_dim], key [*lead', tokens, head_dim] (or transposed), value [*lead', tokens, value_dim].

    grouped: keys and values have fewer heads, of which each serves as many queries side by side (enable_gqa).
    node: what the attention computes, [*lead, tokens, value_dim]; lead: its leading sizes, whose product is the query heads.
    """

    node: torch.fx.Node
    query: torch.fx.Node
    key: torch.fx.Node
    value: torch.fx.Node
    key_transposed: bool
    grouped: bool
    lead: tuple[int, ...]
    facts: ScoreFacts
    choice: Choice | None = None
    learnt_sinks: torch.fx.Node | None = None

    @property
    def heads(self) -> int:
        return math.prod(self.lead)


def _refuse(node: torch.fx.Node, what: str) -> UnsupportedGraphError:
    return UnsupportedGraphError(
        Problem(
            f"canonicalise_attention: {place_of(node)}",
            f"an attention that kvcompile does not recognise, {what}: {node_text(node).strip()}",
            "Recognised: softmax(scale * q @ k^T, capped, with ALiBi, under a causal, sliding or chunked mask) @ v.",
        )
    )


def _split_baddbmm(graph: torch.fx.Graph) -> None:
    """baddbmm(bias, q, k) -> bias * beta + bmm(q, k) * alpha: the bias (ALiBi) is then part of what is probed."""
    for node in graph.find_nodes(op="call_function", target=_aten.baddbmm.default):
        if len(token_dimensions(fake_value(node))) < 2:
            continue
        bias, left, right = node.args
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        with graph.inserting_before(node):
            product = graph.call_function(_aten.bmm.default, (left, right))
            scaled = graph.call_function(_aten.mul.Scalar, (product, alpha))
            weighed = graph.call_function(_aten.mul.Scalar, (bias, beta))
            total = graph.call_function(_aten.add.Tensor, (weighed, scaled))
        for made in (product, scaled, total):
            made.meta = dict(node.meta)
        weighed.meta = dict(bias.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def _split_einsum(graph: torch.fx.Graph) -> None:
    """einsum of two operands with one summed letter, and one of each operand's own: a matmul of permuted operands."""
    for node in graph.find_nodes(op="call_function", target=_aten.einsum.default):
        equation, operands = node.args[0].replace(" ", ""), node.args[1]
        if len(operands) != 2 or "->" not in equation or "." in equation:
            continue
        (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
        batch = [letter for letter in left if letter in right and letter in out]
        summed = [letter for letter in left if letter in right and letter not in out]
        own = [[letter for letter in one if letter not in other] for one, other in ((left, right), (right, left))]
        one_each = [len(group) for group in (summed, *own)] == [1, 1, 1] and {*own[0], *own[1]} <= set(out)
        if not one_each or len({*left}) + len({*right}) != len(left + right):
            continue
        with graph.inserting_before(node):
            first = _call(graph, _aten.permute.default, operands[0], [left.index(letter) for letter in (*batch, *own[0], *summed)])
            second = _call(graph, _aten.permute.default, operands[1], [right.index(letter) for letter in (*batch, *summed, *own[1])])
            product = _call(graph, _aten.matmul.default, first, second)
            made = [*batch, *own[0], *own[1]]
            result = _call(graph, _aten.permute.default, product, [made.index(letter) for letter in out])
        for new in (first, second, product, result):
            new.meta = {**node.meta, "val": new.meta["val"]}
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _read_sdpa(node: torch.fx.Node, inputs: _Inputs, content: set[torch.fx.Node], known_facts: _KnownFacts) -> _Attention:
    """Rule 1."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if given.get("dropout_p", 0.0):
        raise _refuse(node, "with dropout")
    if mask in content:
        raise _refuse(node, "with a mask that depends on the tokens")
    if mask is None and not given.get("is_causal", False):
        raise _refuse(node, "without a causal mask")
    scale = given.get("scale")
    scale = fake_value(query).shape[-1] ** -0.5 if scale is None else float(scale)
    lead = _lead(node, query, inputs)

    def weigh(scores_HST: Tensor, arguments: Arguments | None = None, known: Mapping[torch.fx.Node, Tensor] | None = None) -> Tensor:
        logits = scores_HST * scale
        tokens = scores_HST.shape[-1]
        if given.get("is_causal", False):
            return logits.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        assert mask is not None
        (mask_value,) = evaluate_nodes([mask], {**inputs.at(tokens), **(known or {})}, compute=torch.float64, arguments=arguments)
        mask_value = mask_value.expand(*lead, tokens, tokens).reshape(-1, tokens, tokens)
        logits = logits.masked_fill(~mask_value, -math.inf) if mask_value.dtype == torch.bool else logits + mask_value
        return logits.softmax(-1)

    cone = set() if mask is None else ancestors([mask], inputs.at(0))
    if not cone and mask is None:
        facts = ScoreFacts(scale, None, None, None, ())  # `is_causal` says it all
    else:
        sameness = f"sdpa {lead} {scale} {_sameness(cone)}"
        facts = known_facts.get(sameness) or known_facts.setdefault(sameness, _facts(node, weigh, lead, cone))
    choice = None if mask is None else _choice(node, mask, inputs, content, facts, weigh, lead)
    return _Attention(node, query, key, value, False, bool(given.get("enable_gqa", False)), lead, facts, choice)


def _read_products(softmax: torch.fx.Node, inputs: _Inputs, content: set[torch.fx.Node], known_facts: _KnownFacts) -> _Attention:
    """Rules 2 and 3."""
    scores = _scores_above(softmax, inputs, content)
    out, weights = _product_below(softmax, content)
    lead = _lead(scores, scores.args[0], inputs)  # type: ignore[arg-type]

    def weigh(scores_HST: Tensor, arguments: Arguments | None = None, known: Mapping[torch.fx.Node, Tensor] | None = None) -> Tensor:
        tokens = scores_HST.shape[-1]
        given = {**inputs.at(tokens), **(known or {}), scores: scores_HST.reshape(*lead, tokens, tokens)}
        (found,) = evaluate_nodes([weights], given, compute=torch.float64, arguments=arguments)
        return found.reshape(-1, tokens, tokens)  # type: ignore[no-any-return]

    query, key = scores.args
    value = out.args[1]
    assert isinstance(query, torch.fx.Node) and isinstance(key, torch.fx.Node) and isinstance(value, torch.fx.Node)
    cone = ancestors([weights], {scores, *inputs.at(0)})
    sinks = _learnt_sinks(cone, weigh, math.prod(lead))
    cone = {each for each in cone if each is not sinks}
    without: dict[torch.fx.Node, Tensor] = {} if sinks is None else {sinks: torch.full((math.prod(lead),), _NO_SINK, dtype=torch.float64)}

    def weigh_alone(scores_HST: Tensor, arguments: Arguments | None = None, known: Mapping[torch.fx.Node, Any] | None = None) -> Tensor:
        return weigh(scores_HST, arguments, {**without, **(known or {})})

    sameness = f"products {lead} {_sameness(cone)}"
    facts = known_facts.get(sameness) or known_facts.setdefault(sameness, _facts(softmax, weigh_alone, lead, cone))
    if sinks is not None:
        _check_sinks(softmax, sinks, facts, weigh, math.prod(lead))
    choice = _choice(softmax, weights, inputs, content, facts, weigh_alone, lead, scores)
    out_lead = _lead(out, weights, inputs)
    if math.prod(out_lead) != math.prod(lead):
        raise _refuse(out, "whose weights and scores have different heads")
    return _Attention(out, query, key, value, True, False, out_lead, facts, choice, sinks)


def _choice(
    node: torch.fx.Node,
    end: torch.fx.Node,
    inputs: _Inputs,
    content: set[torch.fx.Node],
    facts: ScoreFacts,
    weigh: Callable[..., Tensor],
    lead: tuple[int, ...],
    scores: torch.fx.Node | None = None,
) -> Choice | None:
    """What chooses the keys of an attention whose mask or weights are `end`."""
    found = [topk for topk in inputs.chosen if topk in ancestors([end], {*([scores] if scores else []), *inputs.of(0)})]
    if not found:
        return None
    try:
        if len(found) > 1:
            raise UnknownScores("keys are chosen several times")
        return read_choice(found[0], content, facts, weigh, math.prod(lead), inputs.of)
    except UnknownScores as error:
        raise _refuse(node, f"because {error}") from error


def _learnt_sinks(cone: set[torch.fx.Node], weigh: _Weigh, heads: int) -> torch.fx.Node | None:
    """The one weight with a number a head, where the weights of a query sum to less than one."""
    weights = [node for node in cone if node.op == "get_attr" and fake_value(node).dtype.is_floating_point]
    found = [node for node in weights if list(fake_value(node).shape) == [heads]]
    if len(found) != 1:
        return None
    sums = weigh(torch.zeros(heads, PROBE_TOKENS, PROBE_TOKENS, dtype=torch.float64)).sum(-1)
    return found[0] if bool((sums < 1 - TOLERANCE).all()) else None


def _check_sinks(node: torch.fx.Node, sinks: torch.fx.Node, facts: ScoreFacts, weigh: _Weigh, heads: int) -> None:
    """A learnt sink is one more logit of a head in the softmax's denominator."""
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(heads, PROBE_TOKENS, PROBE_TOKENS, generator=generator, dtype=torch.float64) * (2.0 / facts.scale)
    logits = torch.randn(heads, generator=generator, dtype=torch.float64)
    difference = float((weigh(scores.clone(), None, {sinks: logits}) - facts.weigh(scores, sinks_H=logits)).abs().max())
    if not difference <= TOLERANCE:
        raise _refuse(node, f"because {sinks.name} is no learnt sink")


def _facts(node: torch.fx.Node, weigh: _Weigh, lead: tuple[int, ...], cone: set[torch.fx.Node]) -> ScoreFacts:
    """Probed at two numbers of tokens: a size that was written into the graph would show.  cone: what the scores go through."""
    heads = math.prod(lead)
    try:
        facts = probe_scores(weigh, heads, PROBE_TOKENS + _LONGER)
        if not probe_scores(weigh, heads, PROBE_TOKENS).agrees(facts, PROBE_TOKENS):
            raise UnknownScores("it changes with the number of tokens")
        if facts.sliding_window is None and facts.chunk_tokens is None:
            facts = _with_far_bound(facts, weigh, heads, cone)
        _check_tables(facts, cone, _check_far(facts, weigh, heads, _far_tokens(heads, cone)))
    except UnknownScores as error:
        raise _refuse(node, str(error)) from error
    except (RuntimeError, IndexError) as error:  # a size that was written into the graph
        raise _refuse(node, f"which cannot be evaluated for another number of tokens ({error})") from error
    return facts


def _sameness(cone: set[torch.fx.Node]) -> str:
    """Equal for equal functions: layers share theirs.  The nodes in order, each with its constants and the places of its inputs."""
    ordered = [node for node in next(iter(cone)).graph.nodes if node in cone]
    place = {node: str(number) for number, node in enumerate(ordered)}
    lines = []
    for node in ordered:
        if node.op == "get_attr":
            (value,) = evaluate_nodes([node], {})
            lines.append(hashlib.sha256(repr((value.dtype, value.shape)).encode() + value.cpu().contiguous().numpy().tobytes()).hexdigest())
            continue
        inputs = [place.get(source, source.name if source.op == "placeholder" else "scores") for source in node.all_input_nodes]
        lines.append(f"{node.op} {node.target} {constants(node)} {inputs}")
    return "\n".join(lines)


def _with_far_bound(facts: ScoreFacts, weigh: _Weigh, heads: int, cone: set[torch.fx.Node]) -> ScoreFacts:
    """Rule 7.  Nothing but the bound may change with the constant, or it does something else far away."""
    bounds: set[tuple[int | None, int | None]] = set()
    for far in _far_constants(cone):
        constant, name = far.value, far.node.name
        found: list[tuple[int | None, int | None]] = []
        for near in _NEARER:
            known, arguments = far.nearer(near)
            try:
                seen = probe_scores(partial(weigh, arguments=arguments, known=known), heads)
            except LooksAhead:  # it is how deep the mask hides (-1e4), and hides too little now
                seen = facts
            if not replace(seen, sliding_window=None, chunk_tokens=None).agrees(facts, PROBE_TOKENS):
                raise UnknownScores(f"the constant {constant:g} of {name} changes more than what it sees")
            if seen is facts:
                found.append((None, None))
                continue
            window, chunk = seen.sliding_window, seen.chunk_tokens
            found.append((None if window is None else window - near, None if chunk is None else chunk - near))
        if found[0] != found[1]:
            raise UnknownScores(f"the constant {constant:g} of {name} bounds what it sees in a way that is not known")
        more_window, more_chunk = found[0]
        if found[0] != (None, None):
            size = math.ceil(abs(constant))
            bounds.add((None if more_window is None else size + more_window, None if more_chunk is None else size + more_chunk))
    if len(bounds) > 1:
        raise UnknownScores("several constants bound what it sees")
    for window, chunk in bounds:
        facts = replace(facts, sliding_window=window, chunk_tokens=chunk)
    return facts


@dataclass(frozen=True)
class _FarConstant:
    """A number that may bound what is seen beyond the probe.  place: of a node's argument, its keyword, or None: it is a weight."""

    node: torch.fx.Node
    place: int | str | None
    value: float

    def nearer(self, near: int) -> tuple[dict[torch.fx.Node, Tensor], Arguments]:
        """What puts a smaller number of the same sign and kind in its place: (known values, arguments)."""
        number = type(self.value)(math.copysign(near, self.value))
        positional, keywords = list(self.node.args), dict(self.node.kwargs)
        if self.place is None:
            (weight,) = evaluate_nodes([self.node], {})
            return {self.node: torch.full_like(weight, number)}, {}
        if isinstance(self.place, str):
            keywords[self.place] = number
        else:
            positional[self.place] = number
        return {}, {self.node: (tuple(positional), keywords)}


def _far_constants(cone: set[torch.fx.Node]) -> Iterator[_FarConstant]:
    for node in cone:
        if node.op == "get_attr" and fake_value(node).numel() == 1:
            (weight,) = evaluate_nodes([node], {})
            given: list[tuple[int | str | None, Any]] = [(None, weight.item())]
        elif node.op == "call_function" and _compares(node):
            given = [*enumerate(node.args), *node.kwargs.items()]
        else:
            continue
        for place, value in given:
            if type(value) in (int, float) and PROBE_TOKENS <= abs(value) < _NO_WINDOW:
                yield _FarConstant(node, place, value)


def _far_tokens(heads: int, cone: set[torch.fx.Node]) -> int:
    """So many tokens that the function can be looked at as a whole; no more than a table has rows."""
    rows = [int(fake_value(node).shape[-1]) for node in cone if _is_table(node)]
    return max(PROBE_TOKENS, min(_FAR_TOKENS, math.isqrt(_FAR_NUMBERS // heads), *rows))


def _is_table(node: torch.fx.Node) -> bool:
    """Whether a node is a constant with a row and a column for each position."""
    return node.op == "get_attr" and fake_value(node).dim() >= 2 and fake_value(node).shape[-1] == fake_value(node).shape[-2]


def _check_far(facts: ScoreFacts, weigh: _Weigh, heads: int, tokens: int) -> int:
    """The facts, on random scores, for `tokens` tokens, or fewer where a table that the cone reads has no more rows; how many."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(heads, tokens, tokens, generator=generator, dtype=torch.float64) * (2.0 / facts.scale)
    try:
        difference = float((weigh(scores.clone()) - facts.weigh(scores)).abs().max())
    except (IndexError, RuntimeError):
        if tokens <= 2 * PROBE_TOKENS:
            raise
        return _check_far(facts, weigh, heads, tokens // 2)
    if not difference <= TOLERANCE:
        raise UnknownScores(f"what it does near by ({facts}) is not what it does at {tokens} tokens")
    return tokens


def _compares(node: torch.fx.Node) -> bool:
    overload: Any = node.target
    return opname(node) in ("tril", "triu", "full", "full_like", "scalar_tensor") or torch.Tag.pointwise in getattr(overload, "tags", ())


def _check_tables(facts: ScoreFacts, cone: set[torch.fx.Node], seen_tokens: int) -> None:
    """A mask that is a table: beyond what was looked at, its last row must say what the facts say."""
    for node in cone:
        if not _is_table(node):
            continue
        rows = int(fake_value(node).shape[-1])
        if rows <= seen_tokens:
            continue
        (table,) = evaluate_nodes([node], {})
        last = table.reshape(-1, rows, rows)[:, -1]
        window = facts.own_window or rows
        beginning, end = last[:, : max(0, rows - window)], last[:, max(0, rows - window) :]
        if facts.chunk_tokens is not None or any(bool((part != part[:, :1]).any()) for part in (beginning, end) if part.shape[1]):
            raise UnknownScores(f"its table of {rows} rows says more than can be read from its first {seen_tokens}")


def _scores_above(softmax: torch.fx.Node, inputs: _Inputs, content: set[torch.fx.Node]) -> torch.fx.Node:
    """The product of queries and keys: the way up from the softmax, along the one input that knows the tokens' content."""
    node = softmax
    while True:
        sources = [source for source in _values_of(node) if source in content]
        if _multiplies_pairs(node, content):
            return node
        if len(sources) != 1:
            break
        node = sources[0]
    for product in reversed([each for each in ancestors([node], ()) if each in content and _multiplies_pairs(each, content)]):
        if node not in content_nodes(node.graph, inputs.input_ids, {*inputs.chosen, product}):
            return product  # the scores less their maximum
    raise _refuse(softmax, f"because {node.name} mixes its scores with something else that depends on the tokens")


def _multiplies_pairs(node: torch.fx.Node, content: set[torch.fx.Node]) -> bool:
    """Whether a node multiplies what depends on tokens with what depends on tokens, for pairs of them."""
    sources = [source for source in node.all_input_nodes if source in content]
    return node.target in _PRODUCTS and len(sources) == 2 and len(token_dimensions(fake_value(node))) > 1


def _values_of(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The inputs whose numbers a node reads: `x.type_as(y)` reads those of x."""
    sources = node.all_input_nodes
    return sources[:1] if opname(node) in ("type_as", "expand_as", "view_as", "reshape_as") else sources


def _product_below(softmax: torch.fx.Node, content: set[torch.fx.Node]) -> tuple[torch.fx.Node, torch.fx.Node]:
    """The product with the values, and its left operand, the weights: the way down from the softmax."""
    node = softmax
    while True:
        users = [user for user in node.users if user in content]
        if len(users) != 1:
            raise _refuse(softmax, f"because {node.name} has {len(users)} uses")
        (user,) = users
        if user.target in _PRODUCTS and user.args[0] is node:
            return user, node
        if sum(source in content for source in _values_of(user)) != 1:
            raise _refuse(softmax, f"because {user.name} mixes its weights with something else that depends on the tokens")
        node = user


def _lead(node: torch.fx.Node, operand: torch.fx.Node, inputs: _Inputs) -> tuple[int, ...]:
    """The sizes before [tokens, ...] of an operand: heads, in one dimension or several."""
    value = fake_value(operand)
    tokens = str(fake_value(inputs.input_ids).shape[1])
    if value.dim() < 3 or str(value.shape[-2]) != tokens or any(isinstance(size, torch.SymInt) for size in value.shape[:-2]):
        raise _refuse(node, f"because {operand.name} is not [heads, tokens, ...]")
    return tuple(int(size) for size in value.shape[:-2])


def _rewrite(graph: torch.fx.Graph, attention: _Attention) -> None:
    node, facts = attention.node, attention.facts
    _check_tokens(attention)
    query, key, value = (_without_widening(each, attention.value) for each in (attention.query, attention.key, attention.value))
    kv_heads = math.lcm(_distinct_heads(key, attention, attention.key_transposed), _distinct_heads(value, attention, False))
    with graph.inserting_before(node):
        heads_first = [
            _as_heads(graph, query, attention, attention.heads, False),
            _as_heads(graph, key, attention, kv_heads, attention.key_transposed),
            _as_heads(graph, value, attention, kv_heads, False),
        ]
        dtype = fake_value(value).dtype
        tail: tuple[Any, ...] = ()
        if attention.choice is not None:
            choosing, offered = _choosing(graph, attention.choice)
            compared = int(fake_value(offered).shape[3])
            none = _call(graph, _aten.expand.default, offered, [1, attention.heads, -1, compared])
            none = _call(graph, _aten.zeros_like.default, _call(graph, _aten.to.dtype, none, dtype))
            heads_first[0] = _call(graph, _aten.cat.default, [_call(graph, _aten.to.dtype, heads_first[0], dtype), none], -1)
            offered = _call(graph, _aten.to.dtype, _call(graph, _aten.expand.default, offered, [1, kv_heads, -1, compared]), dtype)
            heads_first[1] = _call(graph, _aten.cat.default, [heads_first[1], offered], -1)
            tail = (None, choosing, attention.choice.tokens)
        heads_first = [each if fake_value(each).dtype == dtype else _call(graph, _aten.to.dtype, each, dtype) for each in heads_first]
        site = graph.call_function(
            ATTEND,
            (
                *(*heads_first, attention.learnt_sinks, -1, facts.scale, facts.sliding_window or 0, facts.soft_cap or 0.0),
                *(facts.chunk_tokens or 0, list(facts.slopes)),
                *tail,
            ),
        )
        site.meta = dict(node.meta, val=fake_value(heads_first[0]).new_empty(_site_shape(heads_first)))
        out = _call(graph, _aten.transpose.int, site, 1, 2)
        sizes = fake_value(node).shape
        if [str(size) for size in fake_value(out).shape] != [str(size) for size in sizes]:
            out = _call(graph, _aten.reshape.default, out, [int(s) if not isinstance(s, torch.SymInt) else -1 for s in sizes])
        if fake_value(node).dtype != dtype:
            out = _call(graph, _aten.to.dtype, out, fake_value(node).dtype)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    for user in _views_after(out):
        user.target = _aten.reshape.default  # the trace relied on the original's strides


def _site_shape(heads_first: list[torch.fx.Node]) -> tuple[Any, ...]:
    """[1, tokens, query heads, value_dim]."""
    query, value = fake_value(heads_first[0]).shape, fake_value(heads_first[2]).shape
    return (query[0], query[2], query[1], value[3])


def _choosing(graph: torch.fx.Graph, choice: Choice) -> tuple[torch.fx.Node, torch.fx.Node]:
    """`kvc.attend`'s `choosing` [1, C, tokens, I + 1], and what keys offer [1, 1, tokens, I]."""
    asked = _call(graph, _aten.transpose.int, choice.asked, 1, 2)
    weight = _call(graph, _aten.permute.default, choice.weight, [0, 3, 1, 2])
    choosing = _call(graph, _aten.cat.default, [asked, weight], -1)
    return choosing, _call(graph, _aten.transpose.int, choice.offered, 2, 3)


def _check_tokens(attention: _Attention) -> None:
    """Keys and values are those of the call's own tokens, one a token."""
    tokens = str(fake_value(attention.query).shape[-2])
    for operand, dim in ((attention.key, -1 if attention.key_transposed else -2), (attention.value, -2)):
        if str(fake_value(operand).shape[dim]) != tokens or token_dimensions(fake_value(operand)) != (fake_value(operand).dim() + dim,):
            raise _refuse(attention.node, f"because {operand.name} holds other keys or values than the call's own tokens'")


def _call(graph: torch.fx.Graph, target: Any, source: torch.fx.Node | list[torch.fx.Node], *arguments: Any) -> torch.fx.Node:
    """A node that computes target(source, *arguments), with what the trace would have recorded for it."""
    node = graph.call_function(target, (source, *arguments))
    first = source[0] if isinstance(source, list) else source
    node.meta = {key: entry for key, entry in first.meta.items() if key in ("nn_module_stack", "stack_trace")}
    given = torch.fx.node.map_arg((source, *arguments), fake_value)
    node.meta["val"] = target(*given)
    return node


def _without_widening(operand: torch.fx.Node, value: torch.fx.Node) -> torch.fx.Node:
    """Rule 6."""
    dtype = fake_value(value).dtype
    while opname(operand) in _CASTS and fake_value(operand).dtype != dtype:
        source = operand.args[0]
        if not isinstance(source, torch.fx.Node) or fake_value(source).dtype != dtype:
            break
        operand = source
    return operand


def _distinct_heads(operand: torch.fx.Node, attention: _Attention, transposed: bool) -> int:
    """Rule 5: how many heads of an operand differ, where equal ones stand side by side in groups of one size."""
    own = math.prod(int(size) for size in fake_value(operand).shape[:-2])
    if attention.grouped:
        return own
    chain = [operand]
    while opname(chain[-1]) in _LAYOUT and len(sources := _tensors(chain[-1])) == 1:
        chain.append(sources[0])
    tokens = 3
    best = attention.heads
    for base in chain:
        shape = shape_at(base, tokens)
        numbers = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
        (found,) = evaluate_nodes([operand], {base: numbers, **_sizes(operand, tokens)})
        found = found.transpose(-1, -2) if transposed else found
        heads = found.expand(*attention.lead, *found.shape[-2:]).reshape(attention.heads, -1)[:, 0].tolist()
        count = len(set(heads))
        group = attention.heads // count
        if attention.heads % count == 0 and heads == [heads[place // group * group] for place in range(len(heads))]:
            best = min(best, count)
    return best


def _tensors(node: torch.fx.Node) -> list[torch.fx.Node]:
    return [source for source in node.all_input_nodes if isinstance(fake_value(source), Tensor)]


def _sizes(node: torch.fx.Node, tokens: int) -> dict[torch.fx.Node, Any]:
    """Every size of the graph, for `tokens` tokens."""
    input_ids, position_ids = node.graph.find_nodes(op="placeholder")
    return _Inputs(input_ids, position_ids).at(tokens)


def _as_heads(graph: torch.fx.Graph, operand: torch.fx.Node, attention: _Attention, heads: int, transposed: bool) -> torch.fx.Node:
    """[1, heads, tokens, dim] of an operand: one of each group of equal heads."""
    if transposed:
        operand = _call(graph, _aten.transpose.int, operand, -1, -2)
    sizes = fake_value(operand).shape
    lead = tuple(int(size) for size in sizes[:-2])
    own = math.prod(lead)
    if own != attention.heads and not attention.grouped:  # broadcast over queries
        operand = _call(graph, _aten.expand.default, operand, [*attention.lead, -1, -1])
        lead, own = attention.lead, attention.heads
    if lead != (1, own):
        operand = _call(graph, _aten.reshape.default, operand, [1, own, -1, int(sizes[-1])])
    if heads != own:
        operand = _call(graph, _aten.slice.Tensor, operand, 1, 0, own, own // heads)
    return operand


def _views_after(node: torch.fx.Node) -> list[torch.fx.Node]:
    found, queue = [], list(node.users)
    while queue:
        user = queue.pop()
        if user.target is _aten.view.default:
            found.append(user)
            queue += list(user.users)
        elif opname(user) in _LAYOUT:
            queue += list(user.users)
    return found
