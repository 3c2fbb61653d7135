"""The C++ kernels and their operators against the float64 oracle, and their promises about bits and messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from native import SITES, Attention, Reader, Strides, Text, assert_right, read_together, with_text
from torch import Tensor

from kvcompile.codegen.toolchain import Isa, Toolchain, cpu_flags, find_toolchain, machine_isa, why_none
from kvcompile.ir.policy import All, SinkRecent
from kvcompile.ir.request import LinearRequest
from kvcompile.link import GEMV_TOKENS, build_kernels
from kvcompile.runtime.native import Column, NativeKernels

ISAS: tuple[Isa, ...] = ("avx512", "avx2", "portable")
FEATURES = ("alibi", "alibi_capped", "chunked", "chunked_300", "cache_index", "cache_index_300", "many_sinks")
ROWS = tuple(name for name, site in SITES.items() if site.key_layout == "rows")
EVERYWHERE = ("bf16_store", "tails", "window_300", "all_options", "mqa_window", *FEATURES, *ROWS)  # on every instruction set
MORE_ISAS = [(isa, name) for isa in ISAS for name in SITES if isa == machine_isa() or name in EVERYWHERE]
LINEARS = {dtype: LinearRequest("linears", "cpu", dtype, GEMV_TOKENS) for dtype in ("float32", "bfloat16")}
Kernels = Callable[[Isa], NativeKernels]


def _compiler() -> Toolchain:
    compiler = find_toolchain()
    if compiler is None:
        pytest.skip(f"no C++ compiler: {why_none()}")
    return compiler


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """One library an instruction set, kept in the cache folder from run to run."""
    compiler = _compiler()
    built: dict[Isa, NativeKernels] = {}

    def loaded(isa: Isa) -> NativeKernels:
        if ISAS.index(isa) < ISAS.index(machine_isa()):
            pytest.skip(f"this processor does not run {isa}")
        if isa not in built:
            names = [name for each, name in MORE_ISAS if each == isa]
            linears = list(LINEARS.values()) if isa == machine_isa() else []
            requests = {request.key: request for name in names for request in SITES[name].requests(isa)}
            built[isa] = build_kernels([*requests.values(), *linears], isa, compiler)
        return built[isa]

    return loaded


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def new_reader(kernels: Kernels, name: str, tokens: int, isa: Isa | None = None, **changes: Any) -> Reader:
    isa = isa or machine_isa()
    return Reader(Text(replace(SITES[name], **changes), isa, tokens), kernels(isa))


def edges(site: Attention) -> list[int]:
    """The lengths at which something begins or ends: sinks, windows, chunks of 256 keys."""
    found = {0, 1, 255, 256, 257}
    for _, zone in site.groups:
        if isinstance(zone, SinkRecent):
            found |= {max(0, zone.sink_tokens - 1), zone.sink_tokens, zone.window_tokens, zone.window_tokens + 1}
    if site.chunk_tokens is not None:
        found |= {site.chunk_tokens - 1, 2 * site.chunk_tokens, 3 * site.chunk_tokens - 2}
    return sorted(found | ({1000} if site.queries_per_kv < 16 else set()))


@pytest.mark.parametrize(("isa", "name"), MORE_ISAS)
def test_prefill_and_steps_equal_the_oracle_at_every_edge(kernels: Kernels, isa: Isa, name: str) -> None:
    text = Text(SITES[name], isa, 1003)
    for length in edges(SITES[name]):
        reader = Reader(text, kernels(isa))
        if length:
            assert_right(reader.take(length)[-64:], text, max(0, length - 64))
        for position in range(length, length + 3):
            assert_right(reader.take(1), text, position)


@pytest.mark.parametrize(("isa", "name"), [each for each in MORE_ISAS if each[1] in ("mqa_window", "capped")])
def test_exp_and_tanh_are_right_to_their_last_digits(kernels: Kernels, isa: Isa, name: str) -> None:
    """Two keys with logits 0 and x, values 0 and 1: the result is exp(x) / (1 + exp(x)), and keeps its relative error.

    A logit rounds by 2**-24 of itself, twice; tanh is right to 2e-7 of the cap; the rest is exp and a division.
    """
    site = SITES[name]
    for first in range(-60, 0, 4):
        text = Text(site, isa, 2)
        x_Q = torch.linspace(first, first + 4, site.query_heads)
        text.query_QSD.zero_()
        text.query_QSD[:, 1, 0] = x_Q / site.scale(isa)
        text.key_HSD.zero_()
        text.key_HSD[:, 1, 0] = 1
        text.value_HSE[:, 0], text.value_HSE[:, 1] = 0, 1
        reader = Reader(text, kernels(isa))
        reader.take(1)
        right_QE = text.right(1, 2)[0]
        error_Q = ((reader.take(1)[0].double() - right_QE).abs() / right_QE).amax(1)
        assert (error_Q <= 5e-7 + x_Q.abs() * 2.0**-23 + (site.soft_cap or 0) * 2e-7).all(), first


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("name", SITES)
def test_no_result_depends_on_the_chunk(kernels: Kernels, name: str, chunk: int) -> None:
    """Trap 5: every position of the text, read in chunks, and then steps."""
    tokens = 340 if chunk > 1 else 80
    reader = new_reader(kernels, name, tokens + 4)
    while reader.read < tokens:
        first = reader.read
        assert_right(reader.take(min(chunk, tokens - first)), reader.text, first)
    for position in range(tokens, tokens + 4):
        assert_right(reader.take(1), reader.text, position)


@pytest.mark.parametrize("name", ["chunked", "chunked_300"])
def test_no_bit_of_an_attention_chunk_depends_on_where_a_prompt_was_cut(kernels: Kernels, name: str) -> None:
    found = []
    for chunk in (700, 1, 7, 64, 299, 301):
        reader = new_reader(kernels, name, 700)
        found.append(torch.cat([reader.take(min(chunk, 700 - first)) for first in range(0, 700, chunk)]))
    for other in found[1:]:
        assert torch.equal(found[0], other)


def test_a_query_that_is_shown_to_the_sinks_too_changes_no_result(kernels: Kernels) -> None:
    """And another one changes those of the heads that have sinks, but where a position sees one key or a large logit."""
    reader, same = new_reader(kernels, "cache_index", 60), new_reader(kernels, "cache_index", 60)
    same.text.sink_query_QSD = same.text.query_QSD
    plain = replace(SITES["cache_index"], cache_index=False)
    right = Text(plain, machine_isa(), 60)
    for part in ("query_QSD", "key_HSD", "value_HSE"):
        setattr(right, part, getattr(same.text, part))
    out = same.take(60)
    assert_right(out, right, 0)
    changed_SHGE = (reader.take(60) - out).abs().unflatten(1, (3, 3))
    assert (changed_SHGE[2::2, [0, 2]].amax(3) > 0).all()
    assert not changed_SHGE[:, 1].any()


@pytest.mark.parametrize("name", SITES)
def test_sessions_of_different_lengths_share_a_call(kernels: Kernels, name: str) -> None:
    """Trap 14: some decode, some read a prompt, and one asks for nothing but its last token."""
    site = SITES[name]
    plan = [(0, 1), (5, 9), (30, 1), (257, 70), (311, 1)]  # tokens read before, and in the call
    for last_only in (False, True):
        readers = [Reader(Text(site, machine_isa(), 420, seed), kernels(machine_isa())) for seed in range(len(plan))]
        for reader in readers:
            reader.text.sinks_Q = readers[0].text.sinks_Q  # which belong to the model
        for reader, (before, _) in zip(readers, plan, strict=True):
            if before:
                reader.take(before)
        batch = [(reader, new) for reader, (_, new) in zip(readers, plan, strict=True)]
        for reader, out in zip(readers, read_together(batch, last_only=last_only), strict=True):
            assert_right(out, reader.text, reader.read - len(out))
        for reader, out in zip(readers, read_together([(reader, 1) for reader in readers]), strict=True):
            assert_right(out, reader.text, reader.read - 1)


@pytest.mark.parametrize("name", ["bf16_store", "tails", "all_options"])
def test_strides_of_the_new_tokens_do_not_change_a_bit(kernels: Kernels, name: str) -> None:
    found = []
    layouts: tuple[Strides, ...] = ("tokens", "heads", "gaps")
    for strides in layouts:
        reader = new_reader(kernels, name, 90)
        found.append(torch.cat([reader.take(tokens, strides=strides) for tokens in (1, 50, 1, 30)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", SITES)
def test_threads_do_not_change_a_bit(kernels: Kernels, name: str) -> None:
    found = []
    for count in (1, 2, 4):
        with threads(count):
            reader = new_reader(kernels, name, 800)
            found.append(torch.cat([reader.take(tokens) for tokens in (1, 350, 1, 1, 400, 1)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("length", [1, 37, 300, 555])
@pytest.mark.parametrize("name", SITES)
def test_a_fork_gives_the_bits_of_a_session_that_was_never_forked(kernels: Kernels, name: str, length: int) -> None:
    tokens = length + 24
    alone = new_reader(kernels, name, tokens)
    alone.take(length)
    right = torch.cat([alone.take(n) for n in (1, 20, 1)])
    parent = Reader(alone.text, alone.kernels)
    parent.take(length)
    child = parent.fork()
    grandchild = child.fork()
    for reader in (parent, child):  # interleaved with each other below
        assert reader.read == length
    found = [torch.cat(outs) for outs in zip(*[read_together([(parent, n), (child, n)]) for n in (1, 20, 1)], strict=True)]
    assert torch.equal(found[0], right)
    assert torch.equal(found[1], right)
    assert torch.equal(torch.cat([grandchild.take(n) for n in (1, 20, 1)]), right)


@pytest.mark.parametrize("name", ["plain", "bf16_store", "window_300"])
def test_a_parent_that_takes_another_way_leaves_its_fork_alone(kernels: Kernels, name: str) -> None:
    """The parent goes back below its fork's length, which is no multiple of a block, and reads something else."""
    tokens, length, back = 140, 77, 8 if SITES[name].rollback_tokens or name == "window_300" else 0
    text = Text(SITES[name], machine_isa(), tokens)
    other = with_text(text, Text(SITES[name], machine_isa(), tokens, seed=5), length - back)
    alone, elsewhere = Reader(text, kernels(machine_isa())), Reader(other, kernels(machine_isa()))
    for reader, split in ((alone, length), (elsewhere, length - back)):
        reader.take(split)
    parent = Reader(text, alone.kernels)
    parent.take(length)
    child = parent.fork()
    parent.rollback(back)
    parent.text = other
    right, right_elsewhere = torch.cat([alone.take(1) for _ in range(40)]), torch.cat([elsewhere.take(1) for _ in range(40)])
    found = [read_together([(parent, 1), (child, 1)]) for _ in range(40)]
    assert torch.equal(torch.cat([one for one, _ in found]), right_elsewhere)
    assert torch.equal(torch.cat([one for _, one in found]), right)


@pytest.mark.parametrize("taken", [1, 5, 8, 9])  # `rollback: 8` and the one token more that a ring can always take back
@pytest.mark.parametrize("tokens", [20, 310, 401, 900])  # 401: the next position is even, where no large logit hides the rest
def test_a_rollback_equals_never_having_read(kernels: Kernels, tokens: int, taken: int) -> None:
    """Trap 28: rings before and after they overflowed, within the promised depth; then steps and a chunk."""
    text = Text(SITES["window_300"], machine_isa(), tokens + 80)
    other = with_text(text, Text(SITES["window_300"], machine_isa(), tokens + 80, seed=9), tokens - taken)
    for chunk in (tokens, 64):
        alone, back = Reader(text, kernels(machine_isa())), Reader(other, kernels(machine_isa()))
        for reader, end in ((alone, tokens - taken), (back, tokens)):
            while reader.read < end:
                reader.take(min(chunk, end - reader.read))
        back.rollback(taken)
        back.text = text
        for new in (1, 3, 60, 1):
            assert torch.equal(alone.take(new), back.take(new))


@pytest.mark.parametrize("name", ["plain", "bf16_store", "window_300", "all_options"])
def test_interleaved_sessions_do_not_meet(kernels: Kernels, name: str) -> None:
    """Trap 13."""
    texts = [Text(SITES[name], machine_isa(), 330, seed) for seed in (1, 2)]
    texts[1].sinks_Q = texts[0].sinks_Q
    apart = []
    for text in texts:
        reader = Reader(text, kernels(machine_isa()))
        apart.append(torch.cat([reader.take(n) for n in (300, *[1] * 20)]))
    readers = [Reader(text, kernels(machine_isa())) for text in texts]
    together = [read_together([(reader, n) for reader in readers]) for n in (300, *[1] * 20)]
    in_turn = [Reader(text, kernels(machine_isa())) for text in texts]
    turns = [[reader.take(n) for reader in in_turn] for n in (300, *[1] * 20)]
    for index, right in enumerate(apart):
        assert torch.equal(torch.cat([outs[index] for outs in together]), right)
        assert torch.equal(torch.cat([outs[index] for outs in turns]), right)


@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_over_rows_has_the_bits_of_one_over_blocks(kernels: Kernels, name: str) -> None:
    in_blocks = replace(SITES[name], key_layout="blocks")
    built = build_kernels(list({each.key: each for each in in_blocks.requests(machine_isa())}.values()), machine_isa(), _compiler())
    rows, blocks = new_reader(kernels, name, 700), Reader(Text(in_blocks, machine_isa(), 700), built)
    for tokens in (300, 1, 7, 392):
        assert torch.equal(rows.take(tokens), blocks.take(tokens))


@pytest.mark.parametrize("capacity", [1, 16, 37, 250])
@pytest.mark.parametrize("name", ["plain", "bf16_store", "tails", "all_options", "rows_bf16", "rows_capped"])
def test_a_further_buffer_does_not_change_a_bit(kernels: Kernels, name: str, capacity: int) -> None:
    one = new_reader(kernels, name, 400)
    several = new_reader(kernels, name, 400, capacity_tokens=capacity)
    for tokens in (1, 30, *[1] * 20, 300, 1, 1):
        assert torch.equal(one.take(tokens), several.take(tokens))


@pytest.mark.parametrize("name", SITES)
def test_what_was_appended_is_what_the_store_holds(kernels: Kernels, name: str) -> None:
    reader = new_reader(kernels, name, 60, rollback_tokens=60)
    for tokens in (1, 40, 1, 13):
        reader.take(tokens)
    site = SITES[name]
    nothing = torch.empty(0)
    for (heads, _), store in zip(site.groups, reader.stores, strict=True):
        nothing = torch.empty(len(heads), 0, site.head_dim), torch.empty(len(heads), 0, site.value_dim)  # type: ignore[assignment]
        (span,) = store.fork().extend(*nothing)
        first = [part[list(heads), : reader.read] for part in (reader.text.key_HSD, reader.text.value_HSE)]
        assert torch.equal(span.key_HTD, first[0].to(span.key_HTD.dtype))
        assert torch.equal(span.value_HTE, first[1].to(span.value_HTE.dtype))


def linear_problem(dtype: str, tokens: int, features: int, outs: tuple[int, ...], bias: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(features + tokens)
    number = getattr(torch, dtype)
    x = torch.randn(1, tokens, features, generator=generator).to(number)
    weights = [torch.randn(out, features, generator=generator).to(number) for out in outs]
    return x, weights, [torch.randn(out, generator=generator).to(number) for out in outs] if bias else []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outs", [(1,), (3,), (8,), (1000,), (5, 1, 40), (16, 8, 8)])
@pytest.mark.parametrize("features", [1, 16, 24, 50, 576, 1536])
@pytest.mark.parametrize("dtype", LINEARS)
def test_linear_layers_equal_float64(kernels: Kernels, dtype: str, features: int, outs: tuple[int, ...], bias: bool) -> None:
    """float32: products and their sums each round by 2**-24 of themselves; bfloat16: the result once more, by 2**-8 of itself."""
    kernel = kernels(machine_isa()).name(LINEARS[dtype].key)
    for tokens in range(7):
        x, weights, biases = linear_problem(dtype, tokens, features, outs, bias)
        y = torch.ops.kvc_native.linears(x, weights, biases, kernel)
        right = x.double() @ torch.cat(weights).double().T + (torch.cat(biases).double() if bias else 0)
        sizes = x.double().abs() @ torch.cat(weights).double().abs().T + 5
        rounding = 2.0**-8 * right.abs() if dtype == "bfloat16" else 0
        if dtype == "bfloat16" and tokens > GEMV_TOKENS:  # torch's own product, which may round the sum before the bias joins it
            rounding = 2.0**-7 * (right.abs() + 5)
        assert y.shape == right.shape and y.dtype == x.dtype
        assert ((y.double() - right).abs() <= 2.0**-22 * sizes + rounding).all()


@pytest.mark.parametrize("dtype", LINEARS)
def test_threads_and_company_do_not_change_a_bit_of_a_linear_layer(kernels: Kernels, dtype: str) -> None:
    kernel = kernels(machine_isa()).name(LINEARS[dtype].key)
    x, weights, biases = linear_problem(dtype, GEMV_TOKENS, 576, (576, 192, 191), True)
    found = []
    for count in (1, 2, 4):
        with threads(count):
            found.append(torch.ops.kvc_native.linears(x, weights, biases, kernel))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    apart = [torch.ops.kvc_native.linears(x, [w], [b], kernel) for w, b in zip(weights, biases, strict=True)]
    assert torch.equal(torch.cat(apart, -1), found[0])
    rows = [torch.ops.kvc_native.linears(x[:, row : row + 1].clone(), weights, biases, kernel) for row in range(GEMV_TOKENS)]
    assert torch.equal(torch.cat(rows, 1), found[0])


def test_loading_a_library_again_changes_nothing(kernels: Kernels) -> None:
    reader = new_reader(kernels, "plain", 40)
    before = reader.take(20)
    compiler = find_toolchain()
    assert compiler is not None
    build_kernels(list(LINEARS.values()), machine_isa(), compiler)
    assert torch.equal(Reader(reader.text, reader.kernels).take(20), before)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"kernel": "0123456789abcdef"}, "no kernel is loaded for these linear layers"),
        ({"kernel": "not hexadecimal"}, "no kernel is loaded for these linear layers"),
        ({"x": torch.randn(1, 2, 17)}, "a weight of another size or type"),
        ({"x": torch.randn(2, 16)}, "x must be"),
        ({"x": torch.randn(1, 2, 16, dtype=torch.float64)}, "x must be"),
        ({"weights": [torch.randn(8, 16).bfloat16()]}, "a weight of another size or type"),
        ({"weights": [], "biases": []}, "each weight or none must have a bias of its own"),
        ({"biases": [torch.randn(8), torch.randn(8)]}, "each weight or none must have a bias of its own"),
        ({"biases": [torch.randn(7)]}, "a bias of another size or type"),
        ({"biases": [torch.randn(8).bfloat16()]}, "a bias of another size or type"),
    ],
)
def test_wrong_linear_layers_are_refused(kernels: Kernels, wrong: dict[str, Any], text: str) -> None:
    kernel = kernels(machine_isa()).name(LINEARS["float32"].key)
    right = {"x": torch.randn(1, 2, 16), "weights": [torch.randn(8, 16)], "biases": [torch.randn(8)], "kernel": kernel}
    torch.ops.kvc_native.linears(**right)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.kvc_native.linears(**{**right, **wrong})


def test_bfloat16_linear_layers_refuse_another_dtype_of_two_bytes(kernels: Kernels) -> None:
    kernel = kernels(machine_isa()).name(LINEARS["bfloat16"].key)
    with pytest.raises(RuntimeError, match="x must be"):
        torch.ops.kvc_native.linears(torch.randn(1, 1, 16).half(), [torch.randn(8, 16).half()], [], kernel)


def wrong_table(column: Column, value: int) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments["table"][0, column] = value

    return change


def wrong_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], None]:
    def make(arguments: dict[str, Any]) -> None:
        arguments[name] = change(arguments[name])

    return make


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (wrong_table(Column.KERNEL, 12345), "no kernel is loaded for this attention"),
        (wrong_table(Column.START, 3), "the table names rows that are not there"),
        (wrong_table(Column.START, -1), "the table names rows that are not there"),
        (wrong_table(Column.NEW, 6), "the table names rows that are not there"),
        (wrong_table(Column.NEW, 0), "the table names rows that are not there"),
        (wrong_table(Column.NEW, -4), "the table names rows that are not there"),
        (wrong_table(Column.SKIP, -1), "the table names rows that are not there"),
        (wrong_table(Column.SKIP, 5), "the table names rows that are not there"),
        (wrong_table(Column.OUT_ROW, 1), "the table names rows that are not there"),
        (wrong_table(Column.OUT_ROW, -1), "the table names rows that are not there"),
        (wrong_table(Column.BEFORE, -1), "the table names rows that are not there"),
        (wrong_table(Column.BEFORE, 2044), "the store has no room for the new tokens"),
        (wrong_table(Column.STORE, 0), "the store has no room for the new tokens"),
        (wrong_table(Column.HEADS, 3), "the table names rows that are not there"),
        (wrong_table(Column.HEADS, -1), "the table names rows that are not there"),
        (wrong_table(Column.HEAD_COUNT, 4), "the table names rows that are not there"),
        (wrong_tensor("kv_heads", lambda heads: heads + 3), "the table names rows that are not there"),
        (wrong_tensor("kv_heads", lambda heads: heads.int()), "must be contiguous int64"),
        (wrong_tensor("table", lambda table: table.int()), "must be contiguous int64"),
        (wrong_tensor("table", lambda table: table[:, :8].contiguous()), "must be contiguous int64"),
        (wrong_tensor("query", lambda query: query[..., :15]), "the kernel is for other sizes"),
        (wrong_tensor("query", lambda query: query[:, :2]), "out must be"),
        (wrong_tensor("query", lambda query: query[0]), r"query must be \[1, heads, tokens, dim\]"),
        (wrong_tensor("query", lambda query: query[:, :, :4]), "as many tokens"),
        (wrong_tensor("query", Tensor.double), "the kernel is for other types"),
        (wrong_tensor("key", lambda key: key[:, :2]), "as many heads"),
        (wrong_tensor("key", Tensor.bfloat16), "the kernel is for other types"),
        (wrong_tensor("key", lambda key: key[..., :15]), "the kernel is for other sizes"),
        (wrong_tensor("value", Tensor.double), "the kernel is for other types"),
        (wrong_tensor("value", lambda value: value[..., :15]), "the kernel is for other sizes"),
        (wrong_tensor("value", lambda value: value[:, :2]), "as many tokens"),
        (wrong_tensor("out", Tensor.bfloat16), "the kernel is for other types"),
        (wrong_tensor("out", lambda out: out[:, :, :2].contiguous()), "out must be"),
        (wrong_tensor("out", lambda out: out[..., :15]), "out must be"),
        (wrong_tensor("slopes", lambda _: torch.randn(2)), "slopes must be one float32 number a query head"),
        (wrong_tensor("slopes", lambda _: torch.randn(3).double()), "slopes must be one float32 number a query head"),
        (wrong_tensor("slopes", lambda _: torch.randn(3)), "slopes go with a kernel for them, and only with it"),
        (wrong_tensor("sink_query", lambda _: torch.randn(1, 3, 4, 16)), "sink_query must be like query"),
        (wrong_tensor("sink_query", lambda _: torch.randn(1, 3, 5, 16).double()), "sink_query must be like query"),
        (wrong_tensor("sink_query", lambda _: torch.randn(3, 5, 16)), r"sink_query must be \[1, heads, tokens, dim\]"),
        (wrong_tensor("sinks", lambda _: torch.randn(2)), "one float32 number a query head"),
        (wrong_tensor("sinks", lambda _: torch.randn(3).double()), "one float32 number a query head"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_written(kernels: Kernels, change: Callable[[dict[str, Any]], None], text: str) -> None:
    reader = new_reader(kernels, "plain", 20)
    reader.take(7)
    reader.table.count_growing(5)
    reader.table.count_rings(5, 0, 7)
    site = reader.text.attention
    arguments: dict[str, Any] = {
        "query": torch.randn(1, 3, 5, 16),
        "key": torch.randn(1, 3, 5, 16),
        "value": torch.randn(1, 3, 5, 16),
        "sinks": None,
        "sink_query": None,
        "slopes": None,
        "table": reader.table.sites[0].clone(),
        "kv_heads": reader.heads.clone(),
        "out": torch.full((1, 5, site.query_heads, site.value_dim), -7.0),
        "relay_sessions": 0,
        "relay_tokens": 0,
    }
    change(arguments)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.kvc_native.attend(*arguments.values())
    assert (arguments["out"] == -7).all()


@pytest.mark.parametrize(
    ("name", "missing", "text"),
    [
        ("alibi", "slopes", "slopes go with a kernel for them, and only with it"),
        ("cache_index", "sink_query", "the kernel asks for the query that the sinks are shown"),
    ],
)
def test_a_kernel_that_lacks_what_it_asks_for_is_refused(kernels: Kernels, name: str, missing: str, text: str) -> None:
    reader = new_reader(kernels, name, 20)
    if missing == "slopes":
        reader.site = reader.site._replace(slopes=None)
    else:
        reader.text.attention = replace(reader.text.attention, cache_index=False)
    with pytest.raises(RuntimeError, match=text):
        reader.take(5)


def test_bfloat16_kernels_refuse_float16(kernels: Kernels) -> None:
    reader = new_reader(kernels, "tails", 4)
    for part in ("query_QSD", "sink_query_QSD", "key_HSD", "value_HSE"):
        setattr(reader.text, part, getattr(reader.text, part).half())
    with pytest.raises(RuntimeError, match="the kernel is for other types"):
        reader.take(2)


def test_a_file_that_holds_no_kernels_is_refused(kernels: Kernels, tmp_path: Any) -> None:
    kernels(machine_isa())
    with pytest.raises(RuntimeError, match="cannot load"):
        torch.ops.kvc_native.load(str(tmp_path / "missing.so"), 0)


def test_the_table_covers_what_the_kernels_promise() -> None:
    sites = SITES.values()
    assert {site.head_dim for site in sites} >= {15, 16, 20, 24, 40, 64, 72, 80, 96, 112, 128, 192, 256}
    assert {site.queries_per_kv for site in sites} >= {1, 3, 4, 7, 8, 16, 71}
    assert any(site.value_dim != site.head_dim for site in sites)
    zones = {zone for site in sites for _, zone in site.groups}
    assert zones >= {All(), *(SinkRecent(sink, recent) for sink in (0, 4) for recent in (1, 16, 300))}
    for feature in ("alibi", "chunk_tokens", "cache_index"):
        assert {site.dtype for site in sites if getattr(site, feature)} == {"float32", "bfloat16"}, feature
    dtypes = {(site.dtype, site.store_dtype) for site in sites}
    assert dtypes == {(model, store) for model in ("float32", "bfloat16") for store in ("float32", "bfloat16")}
    assert cpu_flags() or machine_isa() == "portable"
