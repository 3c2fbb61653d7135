"""`torch.compile(model, backend="kvcompile")`, mostly with Dynamo's graph run as it is: Inductor is slow and not ours."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from kvcompile import torch_backend
from kvcompile.ir.errors import SpecError, UnsupportedGraphError
from kvcompile.ir.policy import All, SinkRecent
from kvcompile.runtime.banded import ATTEND_BANDED
from kvcompile.runtime.reference import visible
from kvcompile.torch_backend import kvcompile_backend

NEAR = SinkRecent(3, 8)
FULL = {"kvcompile": 1}
MIXED = {
    "kvcompile": 1,
    "policies": {"near": {"zones": [{"sink_recent": {"sink_tokens": NEAR.sink_tokens, "recent_tokens": NEAR.recent_tokens}}]}},
    "heads": [{"policy": "full"}, {"policy": "near", "kv_heads": [0]}],
}
PROMPT, NEW = 30, 12


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    torch_backend._said.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The rewritten graphs, which run as they are instead of by Inductor."""
    seen: list[torch.fx.GraphModule] = []

    def run_as_it_is(gm: torch.fx.GraphModule, example_inputs: object, **options: object) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", run_as_it_is)
    return seen


def loud_llama(**config: object) -> Any:
    """Attention that is far from uniform, so that a lost token is seen."""
    model = toys.llama(layers=2, **config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.mul_(5)
    return model


def prompt(tokens: int = PROMPT, rows: int = 1) -> Tensor:
    return torch.randint(1, 256, (rows, tokens), generator=torch.Generator().manual_seed(1))


def generate(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy: new ids [rows, new], their logits [rows, new, words]."""
    with torch.no_grad():
        made = model.generate(
            ids, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0, **options
        )
    return made.sequences[:, ids.shape[1] :], torch.stack(made.logits, 1)


def oracle(model: Any, ids: Tensor, streaming: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits [1, tokens, words] in float64 of the model whose KV heads `streaming` see what NEAR shows."""
    exact = F.scaled_dot_product_attention

    def banded(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, **options: object) -> Tensor:
        positions = torch.arange(query.shape[2])
        shown = torch.stack([visible(NEAR if head in streaming else All(), positions, positions) for head in range(key.shape[1])])
        group = query.shape[1] // key.shape[1]
        key, value, shown = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), shown.repeat_interleave(group, 0)
        return exact(query, key, value, attn_mask=shown[None], scale=scale)

    copy = loud_llama().double()
    copy.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(F, "scaled_dot_product_attention", banded)
        return copy(ids, use_cache=False).logits


CACHES: dict[str, dict[str, Any]] = {"none": {"use_cache": False}, "dynamic": {}, "static": {"cache_implementation": "static"}}


def compiled(model: Any, spec: dict[str, Any]) -> Any:
    model.compile(backend="kvcompile", options={"spec": spec})
    return model


@pytest.mark.parametrize("cache", CACHES)
def test_full_is_the_model(cache: str, graphs: list[torch.fx.GraphModule]) -> None:
    model = loud_llama()
    want, _ = generate(model, prompt(), **CACHES[cache])
    got, _ = generate(compiled(model, FULL), prompt(), **CACHES[cache])
    assert torch.equal(got, want)
    assert graphs


@pytest.mark.parametrize("cache", CACHES)
def test_streaming_heads_see_sinks_and_window(cache: str, graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the prompt and in every step, far beyond the window."""
    model = compiled(loud_llama(), MIXED)
    with pytest.warns(UserWarning, match="saves reading, not memory"):
        new, logits = generate(model, prompt(), **CACHES[cache])
    whole = torch.cat([prompt(), new], 1)
    want = oracle(model, whole, (0,), monkeypatch)[:, PROMPT - 1 : -1]
    assert (logits - want).abs().max() < 1e-5
    assert (oracle(model, whole, (), monkeypatch)[:, PROMPT - 1 : -1] - want).abs().max() > 0.1
    for graph in graphs:
        assert len(graph.graph.find_nodes(op="call_function", target=ATTEND_BANDED)) == 2


@pytest.mark.slow
def test_inductor_compiles_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(loud_llama(), MIXED)
    mask = torch.ones(1, PROMPT, dtype=torch.int64)
    mask[0, :4] = 0  # so that there are masks, and heads that are repeated before the call
    new, logits = generate(model, prompt(), attention_mask=mask)
    want = oracle(model, torch.cat([prompt()[:, 4:], new], 1), (0,), monkeypatch)[:, PROMPT - 5 : -1]
    assert (logits - want).abs().max() < 1e-5


def test_each_padded_row_is_what_it_is_alone(graphs: list[torch.fx.GraphModule]) -> None:
    """TRAPS 14."""
    model = compiled(loud_llama(), MIXED)
    rows = prompt(rows=2)
    mask = torch.ones_like(rows)
    mask[1, :7] = 0
    _, together = generate(model, rows, attention_mask=mask)
    for row, alone in enumerate((rows[:1], rows[1:, 7:])):
        assert (generate(model, alone)[1][0] - together[row]).abs().max() < 1e-4


def test_compiles_no_more_after_the_first_steps(graphs: list[torch.fx.GraphModule]) -> None:
    """TRAPS 15: over 100 steps."""
    model = compiled(loud_llama(), MIXED)
    with torch.no_grad():
        model.generate(prompt(), max_new_tokens=4, do_sample=False)
        first = counters["stats"]["unique_graphs"]
        model.generate(prompt(), max_new_tokens=104, do_sample=False)
    assert counters["stats"]["unique_graphs"] == first == len(graphs) <= 3


def test_layers_with_their_own_window_keep_it(graphs: list[torch.fx.GraphModule]) -> None:
    """Gemma 3's two sliding layers of three."""
    model: Any = toys.gemma3()
    model.set_attn_implementation("sdpa")
    want, _ = generate(model, prompt())
    full, _ = generate(compiled(model, {**MIXED, "heads": [{"policy": "near", "layers": [0, 1]}]}), prompt())
    assert torch.equal(full, want)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="the kvcompile backend: 2 layers keep the model's own window or chunk whatever the policy."):
        generate(compiled(model, {**MIXED, "heads": [{"policy": "near"}]}), prompt())
    assert [len(graph.graph.find_nodes(op="call_function", target=ATTEND_BANDED)) for graph in graphs[-1:]] == [1]


class Windowed(nn.Module):
    """An attention with a window of its own in its mask and no configuration to tell of it."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        own_S1 = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
        key_T = torch.arange(key.shape[2])
        mask = (key_T <= own_S1) & (key_T > own_S1 - 12)
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask[None, None])


@pytest.mark.parametrize("queries", [1, PROMPT])
def test_a_mask_that_nothing_is_known_of_stays_dense(queries: int, graphs: list[torch.fx.GraphModule]) -> None:
    """The mask of one query shows a window's start as it shows the end of padding: the wrong tokens would be sinks."""
    key = torch.randn(1, 2, PROMPT, 16, generator=torch.Generator().manual_seed(1))
    query = key[:, :, -queries:]
    spec = {**MIXED, "heads": [{"policy": "near"}]}
    with torch.no_grad(), pytest.warns(UserWarning, match="leaves the attention") as said:
        found = torch.compile(Windowed(), backend="kvcompile", options={"spec": spec})(query, key)
    assert str(said[0].message).endswith(
        "reading every token: no configuration of the model tells whether its mask holds a window of its own."
    )
    assert torch.equal(found, Windowed()(query, key))


def test_the_configuration_is_found_in_a_part(graphs: list[torch.fx.GraphModule]) -> None:
    """A model within a module of the caller's: its masks are only of padding, its attentions are rewritten."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = loud_llama()

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.inner(ids, attention_mask=mask, use_cache=False).logits

    mask = torch.ones(1, PROMPT, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad():
        torch.compile(Wrapped().eval(), backend="kvcompile", options={"spec": MIXED})(prompt(), mask)
    assert [len(graph.graph.find_nodes(op="call_function", target=ATTEND_BANDED)) for graph in graphs] == [2]


class Layers(nn.Module):
    """Three attentions, of which the first is spelt out."""

    def forward(self, query: Tensor) -> Tensor:
        hidden = query.shape[2]
        logits = query @ query.transpose(-1, -2) / 4
        query = logits.masked_fill(torch.ones(hidden, hidden, dtype=torch.bool).triu(1), -1e9).softmax(-1) @ query
        query = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        return F.scaled_dot_product_attention(query, query, query, is_causal=True)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_layers_count_attentions_that_are_left_alone_too(layer: int, graphs: list[torch.fx.GraphModule]) -> None:
    query = torch.randn(1, 2, PROMPT, 16, generator=torch.Generator().manual_seed(1))
    spec = {**MIXED, "heads": [{"policy": "near", "layers": [layer]}]}
    with torch.no_grad(), pytest.warns(UserWarning, match="it is spelt out as products and a softmax"):
        torch.compile(Layers(), backend="kvcompile", options={"spec": spec})(query)
    called = [node.target for node in graphs[0].graph.nodes if node.target in (F.scaled_dot_product_attention, ATTEND_BANDED)]
    assert [target is ATTEND_BANDED for target in called] == [layer == 1, layer == 2]


def test_any_module_with_sdpa(graphs: list[torch.fx.GraphModule]) -> None:
    """The planted model: its retrieval head forgets the fact when it streams, its sink head needs its sink only."""
    ids = toys.Planted.question(2, 5, before=10, after=40)[None]
    with torch.no_grad():
        for streaming, right in ((1, True), (0, False)):
            torch._dynamo.reset()
            spec = {**MIXED, "heads": [{"policy": "near", "kv_heads": [streaming]}]}
            answer = torch.compile(toys.planted(), backend="kvcompile", options={"spec": spec})(ids)[0, -1].argmax()
            assert (int(answer) == toys.Planted.code(5)) is right


def test_says_once_that_memory_is_not_saved(graphs: list[torch.fx.GraphModule]) -> None:
    model = compiled(loud_llama(), MIXED)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        generate(model, prompt())
    assert len(graphs) > 1
    assert [str(each.message) for each in said if "kvcompile" in str(each.message)] == [
        "the kvcompile backend saves reading, not memory: the model's own cache keeps every token. "
        "model.generate(..., past_key_values=kvcompile.Cache(model, spec=...)) saves both."
    ]


def test_an_attention_that_is_spelt_out_is_reported(graphs: list[torch.fx.GraphModule]) -> None:
    spec = {**MIXED, "heads": [{"policy": "near"}]}
    with torch.no_grad(), pytest.warns(UserWarning, match="leaves the attention") as said:
        torch.compile(toys.spelt_out(), backend="kvcompile", options={"spec": spec})(torch.zeros(1, 20, dtype=torch.int64))
    (line,) = [str(each.message) for each in said if "leaves" in str(each.message)]
    assert line.startswith("the kvcompile backend leaves the attention of toys.py:")
    assert line.endswith(" as it is, reading every token: it is spelt out as products and a softmax.")


class Attends(nn.Module):
    """One attention, called as a test wants it."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, key, **self.options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "shape", "why"),
    [
        ({"dropout_p": 0.5, "is_causal": True}, (1, 2, 5, 4), "it drops weights at random, as in training"),
        ({}, (1, 2, 5, 4), "it is not causal, as far as its call tells"),
        ({"is_causal": True}, (2, 5, 4), "its query, key or value is not of shape [batch, heads, tokens, dimension]"),
        ({"attn_mask": torch.ones(5, 5).tril() > 0}, (1, 2, 5, 4), "its mask is not of shape [batch, heads, queries, keys]"),
    ],
)
def test_a_call_that_is_not_understood_is_reported(
    options: dict[str, Any], shape: tuple[int, ...], why: str, graphs: list[torch.fx.GraphModule]
) -> None:
    spec = {**MIXED, "heads": [{"policy": "near"}]}
    tensor = torch.randn(shape)
    with torch.no_grad(), pytest.warns(UserWarning, match="leaves the attention") as said:
        torch.compile(Attends(**options), backend="kvcompile", options={"spec": spec})(tensor, tensor)
    assert str(said[0].message).endswith(f"reading every token: {why}.")


def test_gradients_are_refused(graphs: list[torch.fx.GraphModule]) -> None:
    model = torch.compile(toys.planted(), backend="kvcompile", options={"spec": MIXED})
    with pytest.raises(BackendCompilerFailed, match="Call it under torch") as caught:
        model(torch.zeros(1, 20, dtype=torch.int64))
    assert isinstance(caught.value.inner_exception, UnsupportedGraphError)


def test_a_broken_graph_is_refused(graphs: list[torch.fx.GraphModule]) -> None:
    """Its layers cannot be counted."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toys.planted()

        def forward(self, ids: Tensor) -> Tensor:
            first = self.inner(ids)
            torch._dynamo.graph_break()
            return first + self.inner(ids)

    model = torch.compile(Broken().eval(), backend="kvcompile", options={"spec": MIXED})
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="Dynamo breaks the model into several graphs"):
        model(torch.zeros(1, 20, dtype=torch.int64))


def refusal(**given: Any) -> str:
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    with pytest.raises(SpecError) as caught:
        kvcompile_backend(torch.fx.GraphModule({}, graph), [torch.zeros(1)], **given)
    return str(caught.value)


def test_options_are_known_or_refused() -> None:
    where = 'torch.compile(backend="kvcompile")'
    assert refusal(options={"specs": "x", "spec": FULL}) == f"{where}: the option 'specs' is not known.\n  Write 'spec'."
    assert refusal(options={"spec": FULL}, dynamic=True) == (
        f"{where}: the option 'dynamic' is not known.\n  Write options={{\"spec\": ...}} and nothing else."
    )
    assert refusal(mode="reduce-overhead") == (
        f'{where}: there is no spec.\n  Write options={{"spec": "duo.yaml"}}, or a dict; {{"kvcompile": 1}} is policy full.'
    )


def test_what_a_spec_cannot_mean_here_is_refused() -> None:
    where = 'torch.compile(backend="kvcompile")'
    said = refusal(options={"spec": {**FULL, "prefill": {"chunk_tokens": 64}, "target": {"threads": 2}}})
    assert f"<spec>: prefill: means nothing to {where}, which is given a model.\n  Leave it out." in said
    assert f"<spec>: target: means nothing to {where}" in said
    near = {"zones": [{"sink_recent": {"sink_tokens": 3, "recent_tokens": 8}}], "store": {"dtype": "bfloat16"}, "rollback": 4}
    said = refusal(options={"spec": {**MIXED, "policies": {"near": near}}})
    for name in ("store", "rollback"):
        assert f"<spec>: policies.near.{name}: means nothing to {where}: the cache and the rotation are the model's." in said


@pytest.mark.parametrize("zone", [{"top_k": {"k": "100%"}}, {"static": {"keys": 4}}])
def test_policies_that_find_keys_are_refused(zone: dict[str, Any]) -> None:
    zones = [{"sink_recent": {"sink_tokens": 3, "recent_tokens": 8}}, zone]
    said = refusal(options={"spec": {"kvcompile": 1, "policies": {"mine": {"zones": zones}}, "heads": [{"policy": "mine"}]}})
    assert said.startswith("<spec>: heads[0].policy: policy mine finds keys while tokens are generated"), said
    assert "kvcompile.Cache" in said
    assert "policy lookup finds keys" in refusal(options={"spec": {"kvcompile": 1, "heads": [{"policy": "lookup"}]}})


def test_heads_that_the_model_lacks_are_refused(graphs: list[torch.fx.GraphModule]) -> None:
    spec = {**MIXED, "heads": [{"policy": "near", "kv_heads": [2]}]}
    with pytest.raises(BackendCompilerFailed, match="KV head 2 does not exist in model") as caught:
        generate(compiled(loud_llama(), spec), prompt())
    assert isinstance(caught.value.inner_exception, SpecError)


def test_torch_finds_it_without_an_import(tmp_path: Path) -> None:
    """By entry point: the package must be installed (`pip install -e .`)."""
    source = "import sys, torch; print('kvcompile' in torch._dynamo.list_backends(), 'kvcompile' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "False"]
