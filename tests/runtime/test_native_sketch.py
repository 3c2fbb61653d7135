"""The operators that make a sketch against the torch versions, and that threads change no bit.

Letters: H KV heads, T keys, R runs, P dimensions that runs are formed in, C queries or coordinates, D head_dim, E value_dim, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from native_lookup import SITES
from torch import Tensor

from kvcompile.codegen.toolchain import find_toolchain, machine_isa, why_none
from kvcompile.ir.indexes import BLOCK_TOKENS
from kvcompile.link import build_kernels
from kvcompile.runtime import native_sketch
from kvcompile.runtime.indexes.balanced import balanced_order
from kvcompile.runtime.indexes.index import Prompt, RecentQueries
from kvcompile.runtime.indexes.sketch import SketchIndex, build_sketch
from kvcompile.runtime.indexes.sketch_codes import pack, quantise, step_errors, to_slots, unpack
from kvcompile.runtime.indexes.sketch_gaps import gap_sums_of, runs_of
from kvcompile.runtime.indexes.sketch_rows import encode


@pytest.fixture(scope="module", autouse=True)
def launcher() -> None:
    compiler = find_toolchain()
    if compiler is None:
        pytest.skip(f"no C++ compiler: {why_none()}")
    build_kernels([SITES["plain"].request], machine_isa(), compiler)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def points(heads: int, tokens: int, dims: int) -> Tensor:
    """Some directions matter more than others, and half of the points lie in two clusters."""
    points_HTP = random(heads, tokens, dims, seed=tokens) * torch.linspace(2, 0.1, dims)
    points_HTP[:, ::4] += 4 * random(dims, seed=1)
    points_HTP[:, 1::4] -= 4 * random(dims, seed=2)
    return points_HTP


def looseness(points_HTP: Tensor, order_HT: Tensor) -> Tensor:
    """The mean squared distance of points from the middle of their run, [H]."""
    run_HRTP = points_HTP.gather(1, order_HT.long()[..., None].expand_as(points_HTP)).unflatten(1, (-1, BLOCK_TOKENS))
    loose_H: Tensor = (run_HRTP - run_HRTP.mean(2, keepdim=True)).square().sum(3).mean((1, 2))
    return loose_H


def orders(heads: int, tokens: int, seed: int = 0) -> Tensor:
    return random(heads, tokens, seed=seed).argsort(1).int()


@pytest.mark.parametrize("tokens", [32, 64, 96, 224, 992, 2080, 8192])
@pytest.mark.parametrize(("heads", "dims"), [(1, 24), (3, 24), (2, 5)])
def test_every_key_stands_once_in_runs_as_tight_as_those_of_torch(tokens: int, heads: int, dims: int) -> None:
    points_HTP = points(heads, tokens, dims)
    order_HT, right_HT = native_sketch.order(points_HTP), balanced_order(points_HTP)
    assert torch.equal(order_HT.sort(1).values, torch.arange(tokens, dtype=torch.int32).expand(heads, -1))
    assert (looseness(points_HTP, order_HT) <= 1.02 * looseness(points_HTP, right_HT) + 1e-6).all()


@pytest.mark.parametrize("x", [0.0, 1.0, torch.nan, torch.inf])
def test_points_that_are_equal_or_no_numbers_have_an_order(x: float) -> None:
    order_HT = native_sketch.order(torch.full((2, 4128, 24), x))
    assert torch.equal(order_HT.sort(1).values, torch.arange(4128, dtype=torch.int32).expand(2, -1))


def test_equal_points_stay_in_order() -> None:
    assert torch.equal(native_sketch.order(torch.ones(2, 4128, 24)), torch.arange(4128, dtype=torch.int32).expand(2, -1))


@pytest.mark.parametrize(
    ("tokens", "coordinates", "units", "fine"),
    [(32, 16, 1, (1, 0)), (64, 48, 4, (2, 4)), (96, 64, 4, (0, 1)), (8192, 48, 4, (2, 3)), (128, 16, 4, (4, 2))],
)
def test_codes_and_means_are_those_of_torch(tokens: int, coordinates: int, units: int, fine: tuple[int, ...]) -> None:
    heads, fine_H = len(fine), torch.tensor(fine)
    coordinate_HTC, value_HTE, order_HT = random(heads, tokens, coordinates), random(heads, tokens, 50, seed=1), orders(heads, tokens)
    step_HS = 0.2 + random(heads, units * 16, seed=2).abs()
    made = native_sketch.rows(coordinate_HTC, value_HTE, order_HT, step_HS, fine_H)
    ordered_HTC, ordered_HTE = (each.gather(1, order_HT.long()[..., None].expand_as(each)) for each in (coordinate_HTC, value_HTE))
    level_HTS = quantise(to_slots(ordered_HTC, fine_H, units), step_HS, fine_H)
    assert torch.equal(made.codes_HNUB, pack(level_HTS, fine_H))
    assert torch.equal(native_sketch.levels(made.codes_HNUB, fine_H), unpack(made.codes_HNUB, fine_H).float())
    torch.testing.assert_close(made.centre_HRC, ordered_HTC.unflatten(1, (-1, BLOCK_TOKENS)).mean(2))
    mean_HRE = ordered_HTE.unflatten(1, (-1, BLOCK_TOKENS)).mean(2)
    torch.testing.assert_close(made.mean_scale_HR, mean_HRE.abs().amax(2) / 127)
    miss_HRE = made.mean_HRE.float() * made.mean_scale_HR[..., None] - mean_HRE
    assert (miss_HRE.abs() <= 0.50001 * made.mean_scale_HR[..., None]).all()


def test_values_of_zero_are_kept() -> None:
    made = native_sketch.rows(torch.zeros(1, 32, 16), torch.zeros(1, 32, 8), orders(1, 32), torch.ones(1, 16), torch.tensor([0]))
    assert (made.mean_HRE == 0).all() and (made.mean_scale_HR > 0).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_errors_of_steps_are_those_of_torch(bits: int) -> None:
    sample_HTC, weight_HT, steps_FHC = random(3, 500, 48), random(3, 500, seed=1).abs(), 0.1 + random(7, 3, 48, seed=2).abs()
    error_FHC = native_sketch.step_errors(sample_HTC, weight_HT, steps_FHC, bits)
    torch.testing.assert_close(error_FHC, step_errors(sample_HTC, weight_HT, steps_FHC, bits), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 3])
def test_sums_of_runs_are_those_of_torch(stride: int) -> None:
    logit_HCT, place_HT = 20 * random(2, 5, 320), orders(2, 320)
    last_C = torch.tensor([0, 31, 200, 319, 100000])
    made, right = (each(logit_HCT, place_HT, last_C, stride) for each in (native_sketch.runs, runs_of))
    assert torch.equal(made.seen_HCR, right.seen_HCR) and torch.equal(made.kept_HCX, right.kept_HCX)
    torch.testing.assert_close(made.log_sum_HCR, right.log_sum_HCR)


@pytest.mark.parametrize(("near", "low", "k"), [(1, 1, 1), (3, 2, 7), (3, 2, 96), (10, 7, 20), (10, 7, 320)])
def test_sums_for_gaps_are_those_of_torch(near: int, low: int, k: int) -> None:
    place_HX = orders(2, 1000)[:, :320].contiguous()
    true_HCX, run_HCR, last_C = 5 * random(2, 6, 320), random(2, 6, 10, seed=1), torch.tensor([3, 100, 500, 900, 998, 999])
    guess_HCX = true_HCX + random(2, 6, 320, seed=2)
    run_HCR[:, 0, ::2] = -torch.inf
    made, right = (each(true_HCX, guess_HCX, run_HCR, place_HX, last_C, near, low, k) for each in (native_sketch.gap_sums, gap_sums_of))
    for name, made_HC, right_HC in zip(made._fields, made, right, strict=True):
        torch.testing.assert_close(made_HC, right_HC, rtol=1e-5, atol=1e-5, msg=name)


def test_of_equal_guesses_as_many_are_read() -> None:
    flat = torch.zeros(1, 1, 128)
    sums = native_sketch.gap_sums(flat, flat, torch.zeros(1, 1, 4), orders(1, 128), torch.tensor([127]), 2, 1, 20)
    read_left_far = torch.cat([sums.read_true, sums.left_true, sums.far_true]).exp()
    torch.testing.assert_close(read_left_far.flatten(), torch.tensor([20.0, 44.0, 64.0]))


def test_logits_that_are_no_numbers_do_no_harm() -> None:
    true_HCX, run_HCR = random(1, 2, 128), random(1, 2, 4)
    true_HCX[0, 0, ::3], run_HCR[0, 0, 1] = torch.nan, torch.nan
    sums = native_sketch.gap_sums(true_HCX, true_HCX, run_HCR, orders(1, 128), torch.tensor([127, 127]), 2, 1, 20)
    assert all(each[0, 1].isfinite() for each in sums)


def sketch(tokens: int, heads: int = 3, dim: int = 64, seed: int = 0) -> SketchIndex:
    key_HTD = points(heads, tokens, dim)
    query_HXD = 0.3 * random(heads, 512, dim, seed=seed + 1)
    recent = RecentQueries(query_HXD[:, :128], torch.linspace(tokens // 2, tokens, 128).long())
    prompt = Prompt(key_HTD, random(heads, tokens, dim, seed=3), query_HXD.transpose(1, 2) @ query_HXD, 512, recent, 1, tokens // 50)
    return build_sketch(7, prompt, 4, 8, 0.25)


def tensors(make: Callable[[], SketchIndex]) -> dict[str, Tensor]:
    return make().state()[0]


@pytest.mark.parametrize("tokens", [32, 544, 2080])
def test_a_sketch_is_nearly_that_of_torch(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their orders differ where two points lie equally far along a direction but for rounding."""
    made = tensors(lambda: sketch(tokens))
    monkeypatch.setattr(native_sketch, "ready", lambda: False)
    right = tensors(lambda: sketch(tokens))
    assert made.keys() == right.keys()
    assert (made["position_HT.0"] == right["position_HT.0"]).float().mean() > 0.8
    for name in ("gaps_HN", "error_H", "step_HS", "centres.bias_HR"):
        assert (made[name] - right[name]).abs().mean() <= 0.05 * right[name].abs().mean(), name
    for name in right:
        assert made[name].dtype == right[name].dtype and made[name].shape == right[name].shape, name


@pytest.mark.parametrize("tokens", [64, 9216])
def test_threads_change_no_bit(tokens: int) -> None:
    points_HTP, order_HT, fine_H = points(3, tokens, 24), orders(3, tokens), torch.tensor([0, 1, 2])
    weight_HT = random(3, tokens).abs()
    logit_HCT, last_C, run_HCR = random(3, 9, tokens), torch.linspace(0, tokens, 9).long(), random(3, 9, tokens // BLOCK_TOKENS)
    steps_FHC = 0.1 + random(3, 3, 24).abs()

    def everything() -> list[Tensor]:
        made = [native_sketch.order(points_HTP), *native_sketch.rows(points_HTP, points_HTP, order_HT, torch.ones(3, 32), fine_H)]
        made += [native_sketch.levels(made[1], fine_H), native_sketch.step_errors(points_HTP, weight_HT, steps_FHC, 4)]
        made += native_sketch.runs(logit_HCT, order_HT, last_C, 2)
        return [*made, *native_sketch.gap_sums(logit_HCT, 0.9 * logit_HCT, run_HCR, order_HT, last_C, 2, 1, 9)]

    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(everything())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_batch_that_is_added_is_encoded_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    index = sketch(544)
    key_HTD, value_HTE = points(3, 32, 64), random(3, 32, 64)
    made = encode(index.basis, 551, key_HTD, value_HTE)
    monkeypatch.setattr(native_sketch, "ready", lambda: False)
    right = encode(index.basis, 551, key_HTD, value_HTE)
    assert torch.equal(made.codes_HNUB, right.codes_HNUB) and torch.equal(made.position_HT, right.position_HT)
    torch.testing.assert_close(made.mean_scale_HR, right.mean_scale_HR)
    assert (made.mean_HRE.int() - right.mean_HRE.int()).abs().max() <= 1


def test_wrong_tensors_are_refused() -> None:
    with pytest.raises(RuntimeError, match="whole runs"):
        native_sketch.order(torch.zeros(1, 40, 24))
    order_HT = orders(1, 32)
    order_HT[0, 5] = 32
    with pytest.raises(RuntimeError, match="keys that are not there"):
        native_sketch.rows(torch.zeros(1, 32, 16), torch.zeros(1, 32, 8), order_HT, torch.ones(1, 16), torch.tensor([0]))
    flat = torch.zeros(1, 1, 32)
    with pytest.raises(RuntimeError, match="no such choice"):
        native_sketch.gap_sums(flat, flat, flat[..., :1], orders(1, 32), torch.tensor([0]), 1, 1, 33)
