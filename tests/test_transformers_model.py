"""`as_transformers()`: a compiled model under transformers' own generate(), pipelines and lm-eval, against the model it was made from."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from test_torch_backend import FULL, MIXED, loud_llama, prompt
from torch import Tensor

import kvcompile
from kvcompile.ir.errors import KvcompileError, SessionError
from kvcompile.ir.indexes import MIN_INDEXED_TOKENS
from kvcompile.ir.policy import All, HeadPolicy, Kivi, Store
from kvcompile.runtime.rows import ReadRows, _common_tokens
from kvcompile.transformers_model import SessionCache

QUICK = {"verify": {"tokens": 16}, "target": {"segments": "eager"}}
SHORT_RING = {**MIXED, "policies": {"near": {**MIXED["policies"]["near"], "rollback": 6}}}  # type: ignore[index]
NEW = 16


def compiled(model: Any, spec: dict[str, Any] = FULL, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kvcompile.compile(model, spec={**spec, **QUICK, **more}).as_transformers()


@pytest.fixture(scope="module")
def original() -> Any:
    return loud_llama()


@pytest.fixture(scope="module")
def hf(original: Any) -> Any:
    return compiled(original)


@pytest.fixture(scope="module")
def ringed(original: Any) -> Any:
    """One KV head of two streams, and its rings can take 6 tokens back."""
    return compiled(original, SHORT_RING)


@pytest.fixture(scope="module")
def draft() -> Any:
    """Another model: it guesses wrongly now and then."""
    return loud_llama(seed=1)


@pytest.fixture
def calls(hf: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each packed call, how many tokens each session read."""
    seen: list[list[int]] = []
    forward = kvcompile.CompiledModel.forward

    def counted(self: Any, batch: Any, **options: Any) -> Tensor:
        seen.append([len(ids) for _, ids in batch])
        return forward(self, batch, **options)

    monkeypatch.setattr(kvcompile.CompiledModel, "forward", counted)
    return seen


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def ragged(*lengths: int) -> tuple[Tensor, Tensor]:
    """Rows of these lengths padded on the left with 0, and their mask."""
    longest = max(lengths)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return prompt(longest, rows=len(lengths)) * mask, mask


def error(call: Callable[[], Any]) -> str:
    with pytest.raises(KvcompileError) as caught:
        call()
    assert isinstance(caught.value, SessionError)
    return str(caught.value)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"use_cache": False, "max_new_tokens": 4},
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"prompt_lookup_num_tokens": 4},
        {"prefill_chunk_size": 7},
        {"guidance_scale": 1.5},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
    ids=lambda asked: "-".join(asked) or "greedy",
)
def test_generate_gives_the_originals_tokens(original: Any, hf: Any, asked: dict[str, Any]) -> None:
    ids = torch.cat([prompt(20), prompt(10)], 1)  # ends as it began, so that a lookup finds something
    want = generate(original, ids, **asked)
    assert torch.equal(generate(hf, ids, **asked), want)
    assert want.shape[1] > ids.shape[1]


@pytest.mark.parametrize("asked", [{}, {"top_k": 5, "temperature": 0.7}, {"top_p": 0.8}, {"num_beams": 3}, {"num_return_sequences": 4}])
def test_sampling_with_a_seed_gives_the_originals_tokens(original: Any, hf: Any, asked: dict[str, Any]) -> None:
    found = []
    for model in (original, hf):
        torch.manual_seed(5)
        found.append(generate(model, prompt(), do_sample=True, **asked))
    assert torch.equal(found[1], found[0])
    torch.manual_seed(6)
    assert not torch.equal(generate(hf, prompt(), do_sample=True, **asked), found[0])


def test_logits_are_the_originals_and_float32(original: Any, hf: Any) -> None:
    found = hf(prompt(rows=2))
    assert found.logits.dtype == torch.float32 and found.loss is None
    assert (found.logits - logits(original, prompt(rows=2))).abs().max() < 1e-4
    assert found.past_key_values.get_seq_length() == 30
    assert hf(prompt(), use_cache=False).past_key_values is None
    as_tuple = hf(prompt(), return_dict=False)
    assert torch.equal(as_tuple[0], hf(prompt()).logits) and isinstance(as_tuple[1], SessionCache)
    places = torch.tensor([3, 29])
    for kept in (1, 4, 99, places):
        want = logits(original, prompt(rows=2), logits_to_keep=kept)
        assert (logits(hf, prompt(rows=2), logits_to_keep=kept) - want).abs().max() < 1e-4


def test_the_loss_is_the_originals(original: Any, hf: Any) -> None:
    ids = prompt(rows=2)
    labels = ids.clone()
    labels[0, :9] = -100
    want, found = original(ids, labels=labels), hf(ids, labels=labels, logits_to_keep=2)
    assert abs(found.loss - want.loss) < 1e-5
    assert found.logits.shape == (2, 2, 256)
    padded, mask = ragged(30, 12)
    alone = torch.stack([original(padded[1:, 18:], labels=padded[1:, 18:]).loss * 11, original(padded[:1], labels=padded[:1]).loss * 29])
    assert abs(hf(padded, attention_mask=mask, labels=padded).loss - alone.sum() / 40) < 1e-5


def test_a_left_padded_batch_of_eight(original: Any, hf: Any, calls: list[list[int]]) -> None:
    """TRAPS 14.  Each row is what it is alone, and padding takes no memory."""
    lengths = (30, 1, 17, 8, 29, 3, 22, 11)
    ids, mask = ragged(*lengths)
    want = generate(original, ids, attention_mask=mask)
    made = generate(hf, ids, attention_mask=mask, return_dict_in_generate=True)
    assert torch.equal(made.sequences, want)
    assert calls[0] == list(lengths) and calls[1:] == [[1] * 8] * (NEW - 1)
    for row, length in enumerate(lengths):
        assert torch.equal(generate(hf, ids[row : row + 1, 30 - length :])[0, length:], want[row, 30:])
    plan = hf.compiled.plan
    assert made.past_key_values.nbytes() == sum(plan.stored_bytes(length + NEW - 1) for length in lengths)


def test_padded_beams_and_rows_that_end_early(original: Any, hf: Any) -> None:
    ids, mask = ragged(30, 12, 25)
    first = generate(original, ids, attention_mask=mask)
    stop = int(first[1, 33])
    for asked in ({"eos_token_id": stop}, {"num_beams": 4}, {"num_beams": 4, "eos_token_id": stop}):
        want = generate(original, ids, attention_mask=mask, **asked)
        assert torch.equal(generate(hf, ids, attention_mask=mask, **asked), want)


@pytest.mark.parametrize("sampled", [False, True])
def test_assisted_decoding_in_both_roles(original: Any, hf: Any, draft: Any, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy: the tokens of the original alone.  Sampled: those of the same pair uncompiled."""
    compiled_draft = compiled(draft)
    want = None if sampled else generate(original, prompt())
    for main, assistant in ((hf, draft), (original, compiled_draft), (hf, compiled_draft), (hf, original), (original, hf)):
        torch.manual_seed(3)
        found = generate(main, prompt(), assistant_model=assistant, do_sample=sampled)
        if sampled:
            uncompiled = draft if assistant in (draft, compiled_draft) else original
            torch.manual_seed(3)
            want = generate(original, prompt(), assistant_model=uncompiled, do_sample=True)
        assert want is not None and torch.equal(found, want)


def test_guesses_are_read_in_one_call_and_taken_back(hf: Any, draft: Any, calls: list[list[int]]) -> None:
    made = generate(hf, prompt(), assistant_model=draft, return_dict_in_generate=True)
    assert max(call[0] for call in calls[1:]) > 1
    assert sum(call[0] for call in calls) > made.past_key_values.get_seq_length() == 30 + NEW - 1


def test_heads_that_stream_generate_as_sessions_do(ringed: Any) -> None:
    want = ringed.compiled.complete(prompt()[0], max_new_tokens=NEW).tokens
    assert generate(ringed, prompt())[0, 30:].tolist() == list(want)
    asked = generate(ringed, prompt(), prompt_lookup_num_tokens=4)
    assert asked[0, 30:].tolist() == list(want)


def test_heads_that_find_keys_generate_as_sessions_do(original: Any) -> None:
    """A prompt is read with all its past, single tokens with what the index finds."""
    zones = [{"sink_recent": {"sink_tokens": 3, "recent_tokens": 4}}, {"top_k": {"k": 2, "index": "flat"}}]
    made = compiled(original, {"kvcompile": 1, "policies": {"few": {"zones": zones}}, "heads": [{"policy": "few"}]})
    ids, mask = ragged(MIN_INDEXED_TOKENS + 100, MIN_INDEXED_TOKENS + 40)
    step, cache = torch.tensor([[5], [6]]), made.new_cache()
    read = logits(made, ids, attention_mask=mask, past_key_values=cache)[:, -1:]
    found = torch.cat([read, logits(made, step, past_key_values=cache)], 1)
    for row, begun in enumerate((ids[0], ids[1, 60:])):
        session = made.compiled.session()
        alone = torch.stack([session.prefill(begun), session.step(step[row])])
        assert (found[row] - alone).abs().max() < 1e-4
        dense = logits(original, torch.cat([begun, step[row]])[None])[0, -2:]
        assert (found[row, 0] - dense[0]).abs().max() < 1e-4 < 1e-2 < (found[row, 1] - dense[1]).abs().max()


@pytest.mark.parametrize("make", [toys.gpt_oss, toys.gemma2, toys.gemma3, toys.lfm2])
def test_other_kinds_of_models_generate_the_originals_tokens(make: Any) -> None:
    """Learnt sinks, soft caps, windows of some layers, convolutions."""
    original = make()
    made = compiled(original)
    ids, mask = ragged(30, 12)
    for asked in ({}, {"num_beams": 3}):
        want = generate(original, ids, attention_mask=mask, **asked)
        assert torch.equal(generate(made, ids, attention_mask=mask, **asked), want)


@pytest.mark.parametrize("name", ["hf", "ringed"])
def test_cropped_and_reordered_is_as_recomputed(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    ids, mask = ragged(30, 18)
    cache = model.new_cache()
    logits(model, ids, attention_mask=mask, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    steps = torch.tensor([[5, 6], [7, 8], [9, 10], [11, 12]])
    logits(model, steps, past_key_values=cache)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
    cache.batch_select_indices(torch.tensor([0, 2, 1]))
    assert (cache.get_seq_length(), cache.batch_size) == (31, 3)
    last = torch.tensor([[20], [21], [22]])
    found = logits(model, last, past_key_values=cache)[:, 0]
    for row, (begun, step) in enumerate([(ids[1, 12:], 11), (ids[0], 5), (ids[1, 12:], 11)]):
        whole = torch.cat([begun, torch.tensor([step]), last[row]])
        assert (found[row] - logits(model, whole[None])[0, -1]).abs().max() < 1e-4
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes()) == (0, -1, 0)


def test_rows_that_begin_alike_are_read_once_and_share_their_past(hf: Any, calls: list[list[int]]) -> None:
    made = generate(hf, prompt(), num_beams=4, return_dict_in_generate=True)
    assert calls[0] == [30] and calls[1] == [1, 1, 1, 1]
    assert made.past_key_values.batch_size == 4
    assert made.past_key_values.nbytes() < 2 * hf.compiled.plan.stored_bytes(30 + NEW)


def test_a_long_beginning_of_unequal_rows_is_read_once(original: Any, hf: Any, calls: list[list[int]]) -> None:
    """Whole chunks of 256 tokens, of rows with padding too; each row is what it is alone."""
    begun = prompt(600)[0]
    rows = [torch.cat([begun[: 600 - 30 * number], prompt(20 + number, rows=3)[number]]) for number in range(3)]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    found = hf(ids, attention_mask=mask, logits_to_keep=1)
    assert sum(map(sum, calls)) == 512 + sum(len(row) - 512 for row in rows)
    for row, last in zip(rows, found.logits[:, -1], strict=True):
        assert (last - logits(original, row[None])[0, -1]).abs().max() < 1e-4
    assert found.past_key_values.nbytes() == hf.compiled.plan.stored_bytes(sum(map(len, rows)) - 2 * 512)
    hf(ids, attention_mask=mask)  # all logits are wanted
    assert sum(map(sum, calls)) - 512 - sum(len(row) - 512 for row in rows) == sum(map(len, rows))


@pytest.mark.parametrize("quantised", [False, True])
def test_a_beginning_is_read_with_its_row_where_it_would_change_what_the_row_is(hf: Any, quantised: bool) -> None:
    model = hf.compiled
    if quantised:
        kivi = HeadPolicy("kivi", (All(),), store=Store(quantised=Kivi(4, 16, 16)))
        sites = tuple(replace(site, groups=tuple(replace(group, policy=kivi) for group in site.groups)) for site in model.plan.sites)
        model = model.with_plan(replace(model.plan, sites=sites))
    else:
        model = replace(model, spec=replace(model.spec, target=replace(model.spec.target, deterministic=True)))
    rows = [torch.cat([prompt(300)[0], prompt(5, rows=2)[number]]) for number in range(2)]
    assert _common_tokens(hf.compiled, rows, [1, 1]) == 256 and _common_tokens(model, rows, [1, 1]) == 0


def test_a_beam_that_is_itself_again_costs_nothing(hf: Any) -> None:
    rows = ReadRows(hf.compiled)
    rows.read(prompt(rows=3), None, 1)
    before = list(rows._sessions)
    rows.select([0, 1, 2])
    assert all(one is two for one, two in zip(rows._sessions, before, strict=True))
    rows.select([2, 2, 0])
    assert rows._sessions[0] is before[2] and rows._sessions[2] is before[0]
    assert rows._sessions[1].nbytes() == 0 and len(rows._sessions[1]) == 30


def test_a_copied_cache_is_a_fork(original: Any, hf: Any) -> None:
    """What transformers' documentation does with a prefix that many prompts share."""
    begun = hf(prompt(), logits_to_keep=1).past_key_values
    for row in range(2):
        ids = torch.cat([prompt(), prompt(5, rows=2)[row : row + 1]], 1)
        assert torch.equal(generate(hf, ids, past_key_values=copy.deepcopy(begun)), generate(original, ids))
    assert begun.get_seq_length() == 30


def test_sessions_go_on_under_generate(original: Any, hf: Any) -> None:
    """Of unequal length: the shorter one counts as padded on the left."""
    ids, mask = ragged(30, 18)
    base = [hf.compiled.session() for _ in range(2)]
    base[0].prefill(ids[0])
    base[1].prefill(ids[1, 12:])
    more, ones = prompt(6, rows=2), torch.ones(2, 6, dtype=torch.long)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, ones], 1)
    cache = hf.new_cache([session.fork() for session in base])
    found = generate(hf, ids, attention_mask=mask, past_key_values=cache)
    assert torch.equal(found, generate(original, ids, attention_mask=mask))
    assert [len(session) for session in base] == [30, 18]


def test_padding_on_the_right_is_never_read_in_scoring(original: Any, hf: Any) -> None:
    """lm-eval's HFLM pads on the right and gives no mask; with one, nothing of it is read."""
    ids, mask = (tensor.flip(1) for tensor in ragged(30, 12, 25))
    want = [logits(original, ids[row : row + 1, : int(mask[row].sum())])[0] for row in range(3)]
    unmasked, masked = logits(hf, ids), hf(ids, attention_mask=mask)
    for row, alone in enumerate(want):
        assert (unmasked[row, : len(alone)] - alone).abs().max() < 1e-4
        assert (masked.logits[row, : len(alone)] - alone).abs().max() < 1e-4
        assert not masked.logits[row, len(alone) :].any()
    assert masked.past_key_values.nbytes() == sum(hf.compiled.plan.stored_bytes(length) for length in (30, 12, 25))


def test_padding_may_stand_between(original: Any, hf: Any) -> None:
    ids, mask = prompt(), torch.ones(1, 30, dtype=torch.long)
    mask[0, [4, 5, 17]] = 0
    found = logits(hf, ids, attention_mask=mask)[mask.bool()]
    assert (found - logits(original, ids[mask.bool()][None])[0]).abs().max() < 1e-4


def test_long_prompts_are_read_in_chunks(original: Any) -> None:
    model = compiled(original, prefill={"chunk_tokens": 16})
    ids, mask = ragged(30, 18, 5)
    for kept in (0, 1, 7):
        want = logits(original, ids, attention_mask=mask, logits_to_keep=kept)
        found = logits(model, ids, attention_mask=mask, logits_to_keep=kept)
        real = mask.bool()[:, -kept:]
        assert (found[real] - want[real]).abs().max() < 1e-4


def test_a_call_that_fails_leaves_every_row_as_it_was(original: Any, calls: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(original, prefill={"chunk_tokens": 8})
    cache = model.new_cache()
    logits(model, prompt(20, rows=2), past_key_values=cache)
    counted = kvcompile.CompiledModel.forward
    begun = len(calls)

    def interrupted(self: Any, batch: Any, **options: Any) -> Tensor:
        if len(calls) - begun == 2:
            raise KeyboardInterrupt
        return counted(self, batch, **options)

    monkeypatch.setattr(kvcompile.CompiledModel, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        logits(model, prompt(30, rows=2)[:, 20:], past_key_values=cache)
    monkeypatch.setattr(kvcompile.CompiledModel, "forward", counted)
    assert cache.get_seq_length() == 20
    found = logits(model, prompt(30, rows=2)[:, 20:], past_key_values=cache)
    assert (found - logits(original, torch.cat([prompt(20, rows=2), prompt(30, rows=2)[:, 20:]], 1))[:, 20:]).abs().max() < 1e-4


class Words:
    """What a streamer is given."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers_get_every_token(hf: Any) -> None:
    for asked in ({}, {"prompt_lookup_num_tokens": 3}):
        words = Words()
        made = generate(hf, prompt(), streamer=words, **asked)
        assert words.seen == made[0].tolist() and words.ended


def test_stop_strings_end_a_text(original: Any, hf: Any) -> None:
    tokenizer = toys.byte_tokenizer()
    words = [tokenizer.decode([token]) for token in generate(original, prompt())[0, prompt().shape[1] :].tolist()]
    whole = next(word for word in words[2:-1] if word.isascii())  # half a character cannot be looked for
    asked = {"stop_strings": [whole], "tokenizer": tokenizer}
    made = generate(hf, prompt(), **asked)
    assert made.tolist() == generate(original, prompt(), **asked).tolist()
    assert made.shape[1] < generate(original, prompt()).shape[1]


def test_the_text_generation_pipeline(original: Any, hf: Any, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import pipeline
    from transformers.utils import logging

    def told(model: Any) -> Any:
        texts = pipeline("text-generation", model=model, tokenizer=toys.byte_tokenizer(), device="cpu")
        return texts(["In the beginning", "And", "Joseph dwelt in"], batch_size=3, max_new_tokens=NEW, do_sample=False)

    logging.enable_propagation()
    try:
        assert told(hf) == told(original)
    finally:
        logging.disable_propagation()
    assert "is not supported" not in caplog.text


def test_what_libraries_ask_of_a_model(original: Any, hf: Any) -> None:
    from transformers import GenerationMixin, PreTrainedModel

    assert isinstance(hf, PreTrainedModel) and isinstance(hf, GenerationMixin) and hf.can_generate()
    assert (hf.device.type, hf.dtype, hf.main_input_name, hf.training) == ("cpu", torch.float32, "input_ids", False)
    assert hf.num_parameters() == original.num_parameters() and hf.num_parameters(only_trainable=True) == 0
    assert hf.config.to_dict() == original.config.to_dict() and hf.config is not original.config
    assert hf.generation_config.to_dict() == original.generation_config.to_dict()
    assert hf.get_memory_footprint() == hf.compiled.plan.weight_bytes
    hf.tie_weights()
    assert hf.eval() is hf and hf.to("cpu") is hf and hf.to(dtype=torch.float32) is hf and hf.float() is hf


def test_the_compiled_model_keeps_no_weights_of_the_original_alive() -> None:
    import gc
    import weakref

    model = loud_llama()
    gone = weakref.ref(model)
    made = compiled(model)
    del model
    gc.collect()
    assert gone() is None
    assert made.config.num_hidden_layers == 2


def test_other_plans_of_the_same_model(ringed: Any, original: Any) -> None:
    from kvcompile.verify import full_plan

    full = ringed.compiled.with_plan(full_plan(ringed.compiled.plan)).as_transformers()
    assert torch.equal(generate(full, prompt(), num_beams=2), generate(original, prompt(), num_beams=2))
    said = error(lambda: full(prompt(), past_key_values=ringed.new_cache()))
    assert said == "past_key_values: the cache belongs to another compiled model.\n  Give it this model's new_cache()."


def test_any_module_that_compiles_generates() -> None:
    made = compiled(toys.nanogpt())
    ids = prompt(12) % made.config.vocab_size
    want = made.compiled.complete(ids[0], max_new_tokens=6).tokens
    assert generate(made, ids, max_new_tokens=6)[0, 12:].tolist() == list(want)
    assert (made.config.model_type, made.config.num_hidden_layers) == ("kvcompile", len(made.compiled.plan.sites))


def test_bfloat16_gives_float32_logits() -> None:
    model = loud_llama().bfloat16()
    made = compiled(model)
    assert made.dtype == torch.bfloat16 and made(prompt()).logits.dtype == torch.float32
    assert "computes in torch.bfloat16 and cannot change to torch.float32" in error(made.float)


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states", "token_type_ids", "inputs_embeds", "cache_position"])
def test_what_cannot_be_honoured_is_refused_by_name(hf: Any, name: str) -> None:
    said = error(lambda: hf(prompt(), **{name: True}))
    assert said == f"{name}: a compiled model cannot honour it.\n  Leave it out, or ask the original model."
    hf(prompt(), **{name: None})
    if name.startswith("output"):
        assert error(lambda: generate(hf, prompt(), **{name: True}, return_dict_in_generate=True)).startswith(f"{name}: ")


@pytest.mark.parametrize("asked", [{"cache_implementation": "static"}, {"assistant_early_exit": 1}])
def test_ways_to_generate_that_reach_into_a_model_are_refused(hf: Any, asked: dict[str, Any]) -> None:
    (name,) = asked
    assert error(lambda: generate(hf, prompt(), **asked)).startswith(f"{name}: a compiled model cannot honour it.")


def test_a_misspelt_option_is_transformers_error(hf: Any) -> None:
    with pytest.raises(ValueError, match="max_new_token'"):
        generate(hf, prompt(), max_new_token=3)


def test_wrong_ids_are_refused(hf: Any) -> None:
    assert error(lambda: hf()) == "input_ids: there are none.\n  Give token ids [rows, tokens]."
    for wrong in (prompt()[0], prompt()[:, :0], prompt().float()):
        assert "is no batch of token ids." in error(lambda wrong=wrong: hf(wrong))
    assert "token id 256 is not in the vocabulary (0 to 255)" in error(lambda: hf(torch.tensor([[1, 256]])))
    assert "they are on meta, the model on the CPU." in error(lambda: hf(prompt().to("meta")))
    padded = torch.tensor([[-1, 5, 6]])
    assert hf(padded, attention_mask=torch.tensor([[0, 1, 1]])).logits.shape == (1, 3, 256)


def test_wrong_masks_and_positions_are_refused(hf: Any) -> None:
    ids, mask = ragged(30, 12)
    assert error(lambda: hf(ids, attention_mask=mask[:, 1:])) == (
        "attention_mask: it is of shape [2, 29], and 2 rows of 0 tokens read before and 30 new ones want [2, 30].\n"
        "  Give 1 for each token and 0 for padding, or leave it out.  Masks of four dimensions are in the compiled model."
    )
    assert "it is a dict, and" in error(lambda: hf(ids, attention_mask={"full_attention": mask}))
    assert "it holds other numbers than 0 and 1." in error(lambda: hf(ids, attention_mask=mask * 2))
    assert error(lambda: hf(ids.flip(1), attention_mask=mask.flip(1), logits_to_keep=1)) == (
        "attention_mask: row 1 ends with padding, and the logits of its last token are asked for.\n"
        "  Pad on the left: tokenizer.padding_side = 'left'.  For scoring leave logits_to_keep out: then padding may stand anywhere."
    )
    cache = hf(ids, attention_mask=mask).past_key_values
    longer = torch.ones(2, 31, dtype=torch.long)
    said = error(lambda: hf(ids[:, :1] + 1, attention_mask=longer, past_key_values=cache))
    assert said.startswith("attention_mask: it hides or shows other tokens of the past than when they were read.")
    assert error(lambda: hf(ids, attention_mask=mask, position_ids=torch.arange(30)[None])) == (
        "position_ids: a session's tokens stand at 0, 1, 2 and so on, padding not counted.\n"
        "  Leave them out, or give (attention_mask.cumsum(-1) - 1) of the new tokens."
    )
    assert error(lambda: hf(ids, attention_mask=torch.zeros_like(mask))) == (
        "attention_mask: it hides every new token of every row.\n  Give 1 for each token and 0 for padding."
    )
    assert error(lambda: hf(ids, labels=ids[:, 1:])).startswith("labels: they are of shape [2, 29], the ids of [2, 30].")


def test_wrong_caches_are_refused(original: Any, hf: Any) -> None:
    from transformers import DynamicCache

    for call in (lambda: hf(prompt(), past_key_values=DynamicCache()), lambda: generate(hf, prompt(), past_key_values=DynamicCache())):
        assert error(call) == (
            "past_key_values: a DynamicCache cannot hold the sessions of a compiled model.\n"
            "  Leave it out, or give what new_cache() or an earlier call returned."
        )
    cache = hf(prompt(rows=2)).past_key_values
    assert error(lambda: hf(prompt(1, rows=3), past_key_values=cache)) == (
        "past_key_values: 3 rows for a cache of 2.\n"
        "  Give it the batch that it began with, call batch_repeat_interleave or batch_select_indices, or reset it."
    )
    assert error(lambda: cache.crop(3)).startswith("crop: 3 is not negative.")
    assert error(lambda: cache.crop(-31)).startswith("crop: cannot take back 31 of 30 tokens.")
    assert error(lambda: cache.reorder_cache(torch.tensor([0, 2]))).startswith("past_key_values: there is no row 2 among 2.")
    assert error(lambda: original(prompt(1, rows=2), past_key_values=cache)).startswith(
        "past_key_values: another model was given the cache of a compiled one."
    )
    session = hf.compiled.session()
    assert error(lambda: hf.new_cache([session, session])).startswith("sessions: a session stands there twice.")


def test_assisted_decoding_needs_rollback(original: Any) -> None:
    made = compiled(original, MIXED)
    for call in (
        lambda: generate(made, prompt(), prompt_lookup_num_tokens=3),
        lambda: generate(original, prompt(), assistant_model=made),
    ):
        assert error(call).startswith(
            "generate: assisted decoding takes tokens back, and a policy of the spec does not keep what that needs.\n"
            "  Write `rollback: 32`, more than are guessed at once, in each policy that has a window, or use no assistant."
        )


def test_what_needs_weights_is_refused(hf: Any, tmp_path: Path) -> None:
    assert error(lambda: hf.save_pretrained(tmp_path)) == (
        "as_transformers: a compiled model has no weights to save.\n  Save the original model, and the spec."
    )
    assert error(hf.half).startswith("as_transformers: a compiled model computes in torch.float32 and cannot change to torch.float16.")
    assert error(lambda: hf.to("cuda")).startswith("as_transformers: a compiled model cannot move to cuda.")
    for call in (hf.bfloat16, hf.double, hf.cuda, hf.train, hf.state_dict, hf.get_input_embeddings, hf.get_output_embeddings):
        assert error(call).startswith("as_transformers: ")
    for name in ("load_state_dict", "resize_token_embeddings", "set_attn_implementation", "add_adapter", "generate_batch", "push_to_hub"):
        assert error(lambda name=name: getattr(hf, name)(1)).startswith("as_transformers: ")
    assert error(lambda: hf.num_parameters(exclude_embeddings=True)).startswith("num_parameters: ")
    for way in (copy.copy, copy.deepcopy, pickle.dumps, lambda model: torch.save(model, tmp_path / "model.pt")):
        assert error(lambda way=way: way(hf)).startswith("as_transformers: a compiled model can be neither copied nor pickled.")


def test_a_model_of_unknown_origin_has_no_face(hf: Any) -> None:
    unknown = replace(hf.compiled, transformers_face=None)
    assert error(unknown.as_transformers) == (
        "as_transformers: nothing is known of the model that this one was compiled from.\n  Make it with kvcompile.compile."
    )
