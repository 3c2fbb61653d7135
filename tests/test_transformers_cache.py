"""`kvcompile.Cache` under transformers' own generate()."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from test_torch_backend import FULL, MIXED, NEAR, PROMPT, compiled, generate, loud_llama, oracle, prompt
from torch import Tensor
from torch._dynamo.utils import counters

import kvcompile
from kvcompile.ir.errors import KvcompileError, SessionError, SpecError, UnsupportedGraphError
from kvcompile.sweep.tiny import build_tiny
from kvcompile.transformers_cache import NAME, attention_sites

SHORT_RING = {**MIXED, "policies": {"near": {**MIXED["policies"]["near"], "rollback": 6}}}  # type: ignore[index]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="kvcompile.Cache set the model")
        yield
    torch._dynamo.reset()


def logits(model: Any, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **options).logits


@pytest.mark.parametrize("make", [loud_llama, toys.gpt_oss, toys.gemma2, toys.gemma3])
def test_full_is_the_model(make: Any) -> None:
    """Learnt sinks, soft caps, windows of some layers, another scale."""
    model = make()
    want, _ = generate(model, prompt())
    cache = kvcompile.Cache(model, spec=FULL)
    got, _ = generate(model, prompt(), past_key_values=cache)
    assert torch.equal(got, want)
    assert cache.nbytes() == cache.plan.stored_bytes(cache.get_seq_length())


def test_streaming_heads_see_and_keep_sinks_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud_llama()
    cache = kvcompile.Cache(model, spec=MIXED)
    new, found = generate(model, prompt(), past_key_values=cache)
    model.set_attn_implementation("sdpa")
    want = oracle(model, torch.cat([prompt(), new], 1), (0,), monkeypatch)[:, PROMPT - 1 : -1]
    assert (found - want).abs().max() < 1e-5
    tokens = cache.get_seq_length()
    assert tokens == PROMPT + new.shape[1] - 1
    layers, both, itemsize = 2, 2 * 16, 4  # keys and values of one head
    assert cache.nbytes() == layers * both * itemsize * (tokens + NEAR.window_tokens)


def test_each_padded_row_is_what_it_is_alone() -> None:
    """TRAPS 14; padding takes no memory."""
    model = loud_llama()
    rows = prompt(rows=3)
    mask = torch.ones_like(rows)
    mask[1, :7] = 0
    cache = kvcompile.Cache(model, spec=MIXED)
    _, together = generate(model, rows, attention_mask=mask, past_key_values=cache)
    alone = []
    for row, ids in enumerate((rows[:1], rows[1:2, 7:], rows[2:])):
        own = kvcompile.Cache(model, spec=MIXED)
        assert (generate(model, ids, past_key_values=own)[1][0] - together[row]).abs().max() < 1e-4
        alone.append(own.nbytes())
    assert cache.batch_size == 3
    assert cache.nbytes() == sum(alone)


def test_dynamo_compiles_the_model_whole_and_no_more_after_the_first_step() -> None:
    """TRAPS 15: one graph for the prompt and one for every step, 100 of them."""
    model = loud_llama()
    cache = kvcompile.Cache(model, spec=MIXED)
    want, _ = generate(model, prompt(), past_key_values=cache)
    model.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        got = model.generate(prompt(), past_key_values=kvcompile.Cache(model, spec=MIXED), max_new_tokens=100, do_sample=False)
    assert torch.equal(got[:, PROMPT : PROMPT + want.shape[1]], want)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_compiled_graph_may_copy_the_count() -> None:
    """AOTAutograd makes what is written in place functional: the operator gets a copy, which is copied back after the graph."""
    model = loud_llama()
    ids = prompt(20)
    want = logits(model, ids, kvcompile.Cache(model, spec=MIXED))
    cache = kvcompile.Cache(model, spec=MIXED)
    model.compile(backend="aot_eager", fullgraph=True)
    found = [logits(model, ids[:, :12], cache)]
    assert cache.get_seq_length() == 12
    found += [logits(model, ids[:, [place]], cache) for place in range(12, 20)]
    assert cache.state.tolist()[1] == cache.get_seq_length() == 20
    assert (torch.cat(found, 1) - want).abs().max() < 1e-5
    assert counters["stats"]["unique_graphs"] == 2


def test_a_count_that_was_lost_is_refused() -> None:
    model = loud_llama()
    cache = kvcompile.Cache(model, spec=FULL)
    ids = prompt(20)
    want = logits(model, ids, cache)
    cache.state[1] = 0
    assert error(SessionError, lambda: logits(model, ids, cache)) == (
        "kvcompile.Cache: the compiled model counts 0 tokens, the cache holds 20: what a call wrote to the count was lost.\n"
        "  Call reset() or crop(), which set the count anew; if it happens again, use another backend of torch.compile."
    )
    cache.crop(-5)
    assert (logits(model, ids[:, 15:], cache) - want[:, 15:]).abs().max() < 1e-4


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_mask_that_is_not_causal_is_refused(how: str) -> None:
    """Tokens of an image see each other (token_type_ids); text alone runs as before."""
    model: Any = build_tiny("gemma3").model
    ids = torch.randint(10, 200, (1, 20), generator=torch.Generator().manual_seed(1))
    image = torch.zeros_like(ids)
    image[0, 2:7] = 1
    model.set_attn_implementation("sdpa")
    want = logits(model, ids, None)
    assert (logits(model, ids, None, token_type_ids=image) - want).abs().max() > 0.1
    cache = kvcompile.Cache(model, spec={**FULL, "target": {"kernels": "torch"}})
    if how == "compiled":
        model.compile(backend="eager")
    assert (logits(model, ids, cache) - want).abs().max() < 1e-4
    cache.reset()
    said = error(SessionError, lambda: logits(model, ids, cache, token_type_ids=image))
    assert said.startswith("kvcompile.Cache: the model's attention mask uses blockwise_overlay: a token would see more or less than")
    assert cache.get_seq_length() == 0


def test_masks_with_chunks_break_the_graph_and_are_let_through() -> None:
    """Their chunks start behind the padding, a tensor that Dynamo cannot give to a check of names."""
    model: Any = build_tiny("llama4_text").model
    ids = torch.randint(10, 200, (1, 20), generator=torch.Generator().manual_seed(1))
    want = logits(model, ids, None)
    cache = kvcompile.Cache(model, spec={**FULL, "target": {"kernels": "torch"}})
    model.compile(backend="eager")
    assert (logits(model, ids, cache) - want).abs().max() < 1e-4


@pytest.mark.slow
def test_under_our_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud_llama()
    cache = kvcompile.Cache(model, spec=MIXED)
    new, found = generate(compiled(model, MIXED), prompt(), past_key_values=cache)
    model.set_attn_implementation("sdpa")
    want = oracle(model, torch.cat([prompt(), new], 1), (0,), monkeypatch)[:, PROMPT - 1 : -1]
    assert (found - want).abs().max() < 1e-5


def test_beams() -> None:
    """reorder_cache: rows are forked."""
    model = loud_llama()
    asked = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want = model.generate(prompt(), **asked)
        got = model.generate(prompt(), past_key_values=kvcompile.Cache(model, spec=FULL), **asked)
    assert torch.equal(got, want)


def test_rows_are_repeated_and_chosen() -> None:
    model = loud_llama()
    rows = prompt(rows=2)
    cache = kvcompile.Cache(model, spec=MIXED)
    logits(model, rows, cache)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    token = torch.tensor([[5], [6], [5], [6]])
    found = logits(model, token, cache)
    assert not torch.allclose(found[0], found[1])
    cache.batch_select_indices(torch.tensor([3, 0]))
    again = logits(model, torch.tensor([[7], [8]]), cache)
    whole = torch.cat([rows[[1, 0]], torch.tensor([[6], [5]]), torch.tensor([[7], [8]])], 1)
    want = logits(model, whole, kvcompile.Cache(model, spec=MIXED))[:, -1]
    assert (again[:, 0] - want).abs().max() < 1e-4


def test_cropped_is_as_if_never_read() -> None:
    model = loud_llama()
    ids = prompt(40)
    for spec, back in ((FULL, 25), (SHORT_RING, 6)):
        cache = kvcompile.Cache(model, spec=spec)
        assert cache.is_croppable
        want = logits(model, ids, cache)
        cache.crop(-back)
        assert cache.get_seq_length() == 40 - back
        assert (logits(model, ids[:, -back:], cache) - want[:, -back:]).abs().max() < 1e-4


@pytest.mark.parametrize(("zone", "croppable"), [({"top_k": {"k": 9}}, True), ({"static": {"keys": 4}}, False)])
def test_what_finds_keys_can_be_cropped_if_it_keeps_them_all(zone: dict[str, Any], croppable: bool) -> None:
    zones = [{"sink_recent": {"sink_tokens": 3, "recent_tokens": 8}}, zone]
    spec = {"kvcompile": 1, "policies": {"mine": {"zones": zones, "rollback": 5}}, "heads": [{"policy": "mine"}]}
    assert kvcompile.Cache(loud_llama(), spec=spec).is_croppable == croppable


def test_a_crop_beyond_the_ring_changes_no_row() -> None:
    model = loud_llama()
    ids = prompt(40, rows=2)
    cache = kvcompile.Cache(model, spec=MIXED)
    assert not cache.is_croppable
    logits(model, ids[:, :39], cache)
    with pytest.raises(SessionError, match="is overwritten"):
        cache.crop(-9)
    want = logits(model, ids, kvcompile.Cache(model, spec=MIXED))[:, -1]
    assert (logits(model, ids[:, 39:], cache)[:, 0] - want).abs().max() < 1e-4


def test_a_model_that_stopped_half_way_has_read_nothing() -> None:
    model = loud_llama()
    ids = prompt(40)
    cache = kvcompile.Cache(model, spec=FULL)
    logits(model, ids[:, :20], cache)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        logits(model, ids[:, 20:], cache)
    hook.remove()
    assert cache.get_seq_length() == 20
    found = logits(model, ids[:, 20:], cache)
    assert (found - logits(model, ids, kvcompile.Cache(model, spec=FULL))[:, 20:]).abs().max() < 1e-4


def test_reset_takes_another_batch() -> None:
    model = loud_llama()
    cache = kvcompile.Cache(model, spec=MIXED)
    logits(model, prompt(), cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes(), cache.is_initialized) == (0, -1, 0, False)
    want = logits(model, prompt(rows=2), kvcompile.Cache(model, spec=MIXED))
    assert torch.equal(logits(model, prompt(rows=2), cache), want)


def test_a_configuration_is_enough() -> None:
    model = loud_llama()
    assert attention_sites(model.config) == attention_sites(model)
    cache = kvcompile.Cache(model.config, spec=MIXED)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation(NAME)
    want = logits(model, prompt(), kvcompile.Cache(model, spec=MIXED))
    assert torch.equal(logits(model, prompt(), cache), want)


def test_it_says_that_it_set_the_attention() -> None:
    model = loud_llama()
    with pytest.warns(UserWarning, match="attention implementation") as said:
        kvcompile.Cache(model, spec=FULL)
    assert str(said[0].message) == (
        'kvcompile.Cache set the model\'s attention implementation to "kvcompile_cache"; '
        "model.set_attn_implementation('sdpa') takes it back."
    )


def error(kind: type[KvcompileError], call: Any) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_a_call_without_the_cache_is_refused() -> None:
    model = loud_llama()
    cache = kvcompile.Cache(model, spec=FULL)
    assert error(SessionError, lambda: logits(model, prompt(), None)) == (
        'kvcompile.Cache: LlamaAttention runs with attention implementation "kvcompile_cache" on keys that no kvcompile.Cache gave it: '
        "it was called without one, or it changes the keys between the cache and the attention.\n"
        "  Pass past_key_values=kvcompile.Cache(model, spec=...).  If you did, the model cannot run with it: use kvcompile.compile, "
        "or call model.set_attn_implementation('sdpa')."
    )
    mask = torch.ones(1, 1, PROMPT, PROMPT, dtype=torch.bool)
    assert "was given an attention mask of its own" in error(SessionError, lambda: logits(model, prompt(), cache, attention_mask=mask))


def test_misuse_is_refused() -> None:
    model = loud_llama()
    cache = kvcompile.Cache(model, spec=FULL)
    logits(model, prompt(), cache)
    assert "3 rows for a cache of 1." in error(SessionError, lambda: logits(model, prompt(rows=3), cache))
    assert error(SessionError, lambda: cache.crop(3)).startswith("crop: 3 is not negative.")
    assert error(SessionError, lambda: cache.crop(-99)).startswith(f"crop: cannot take back 99 of {PROMPT} tokens.")
    tensor = torch.zeros(1, 2, 1, 16)
    assert "Call update of the cache." in error(SessionError, lambda: cache.layers[0].update(tensor, tensor))
    attend = model.model.layers[1].self_attn
    rotation = model.model.rotary_emb(tensor, torch.zeros(1, 1, dtype=torch.int64))
    said = error(SessionError, lambda: attend(torch.zeros(1, 1, 64), rotation, None, past_key_values=cache))
    assert "layer 0 did not attend over this cache" in said


def test_what_a_spec_cannot_mean_here_is_refused() -> None:
    model = loud_llama()

    def said(**given: Any) -> str:
        return error(SpecError, lambda: kvcompile.Cache(model, spec={**MIXED, **given}))

    assert "verify: means nothing to kvcompile.Cache, which is given a model." in said(verify={"tokens": 64})
    assert "target: kvcompile.Cache reads device, isa and kernels of it" in said(target={"threads": 2})
    assert "target.device: kvcompile.Cache runs on the CPU." in said(target={"device": "cuda"})
    near = {"zones": [{"sink_recent": {"sink_tokens": 3, "recent_tokens": 8}}], "positions": "cache_index"}
    assert "policies.near.positions: kvcompile.Cache cannot rotate queries anew" in said(policies={"near": near})


def test_models_that_do_not_show_their_attentions_are_refused() -> None:
    from transformers import CodeGenConfig, CodeGenForCausalLM

    said = error(UnsupportedGraphError, lambda: kvcompile.Cache(toys.nanogpt(), spec=FULL))
    assert "NanoGPT is not a transformers model." in said
    config = CodeGenConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, vocab_size=64, n_positions=64)
    said = error(UnsupportedGraphError, lambda: kvcompile.Cache(CodeGenForCausalLM(config).eval(), spec=FULL))
    assert "0 of the 2 layers of CodeGenForCausalLM attend through transformers' attention interface." in said


def test_import_kvcompile_needs_no_transformers(tmp_path: Path) -> None:
    source = "import sys, kvcompile; print('transformers' in sys.modules, 'Cache' in dir(kvcompile))"
    ran = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True"]


def test_a_cache_that_nobody_attends_over_is_an_error():
    """The keys that it hands on are the new ones alone: another attention would silently forget everything."""
    model = toys.llama(layers=2)
    cache = kvcompile.Cache(model, spec={"kvcompile": 1})
    model.set_attn_implementation("sdpa")
    with pytest.raises(SessionError) as caught:
        model(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)
    assert str(caught.value) == (
        'kvcompile.Cache: layer 0 did not attend over this cache: the model\'s attention implementation is not "kvcompile_cache".\n'
        "  Make a Cache of the model that runs with it, or call model.set_attn_implementation('kvcompile_cache')."
    )


def test_a_cache_of_another_model_is_an_error():
    cache = kvcompile.Cache(toys.llama(layers=1), spec={"kvcompile": 1})
    model = toys.llama(layers=2)
    model.set_attn_implementation("kvcompile_cache")
    with pytest.raises(SessionError) as caught:
        model(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)
    assert str(caught.value).startswith("kvcompile.Cache: layer 1 was given to a cache of 1 layers.")
