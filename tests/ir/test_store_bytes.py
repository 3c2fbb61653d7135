"""The formula of stores' bytes against counts by hand, and against itself where it must agree."""

import pytest

from kvcompile.ir.plan import HeadGroup, SitePlan
from kvcompile.ir.policy import All, HeadPolicy, Int8, Kivi, SinkRecent, Static, Store, TopK
from kvcompile.ir.sites import AttentionSite
from kvcompile.ir.store_bytes import code_bytes, quantised_in, read_bytes, ring_residual, row_bytes, store_problem, stored_bytes

SITE = AttentionSite(0, "layers.0", 9, 3, 64, 32, 0.125, "bfloat16")
KIVI = Store(quantised=Kivi(4, 32, 128))
KEY_GROUP = 32 * 64 // 2 + 64 * 2 * 2  # codes of half a byte, a scale and a smallest number of 2 bytes a channel
VALUE = 32 // 2 + 2 * 2


def plan(policy: HeadPolicy) -> SitePlan:
    return SitePlan(SITE, (HeadGroup((0, 1, 2), policy),))


@pytest.mark.parametrize(
    ("tokens", "exact_keys", "groups", "exact_values", "values"),
    [(0, 0, 0, 0, 0), (1, 1, 0, 1, 0), (127, 127, 0, 127, 0), (128, 0, 4, 128, 0), (129, 1, 4, 128, 1), (8191, 127, 252, 128, 8063)],
)
def test_kivi_stores_exact_tokens_groups_and_values(tokens, exact_keys, groups, exact_values, values):
    expected = 3 * (exact_keys * 64 * 2 + groups * KEY_GROUP + exact_values * 32 * 2 + values * VALUE)
    assert stored_bytes(KIVI, "bfloat16", 3, 64, 32, tokens) == expected
    assert plan(HeadPolicy("few", (All(),), store=KIVI)).stored_bytes(tokens) == expected


def test_a_step_reads_what_was_kept_before_it_and_its_own_token():
    for tokens in (1, 128, 129, 130, 5000):
        before = stored_bytes(KIVI, "bfloat16", 3, 64, 32, tokens - 1)
        assert read_bytes(KIVI, "bfloat16", 3, 64, 32, tokens) == before + 3 * (64 + 32) * 2
        assert plan(HeadPolicy("few", (All(),), store=KIVI)).read_bytes(tokens) == before + 3 * (64 + 32) * 2
    assert read_bytes(KIVI, "bfloat16", 3, 64, 32, 0) == 0


def test_int8_costs_a_byte_a_number_and_two_scales():
    store, window = Store(quantised=Int8()), SinkRecent(4, 60)
    assert stored_bytes(store, "bfloat16", 3, 64, 32, 100) == 3 * 100 * (64 + 32 + 2 * 2)
    assert stored_bytes(store, "float32", 3, 64, 32, 100, window, 8) == 3 * 72 * (64 + 32 + 2 * 4)
    assert read_bytes(store, "float32", 3, 64, 32, 100, window, 8) == 3 * 64 * (64 + 32 + 2 * 4)


def test_a_ring_of_groups_is_as_long_as_its_window_from_then_on():
    window = SinkRecent(4, 300)
    groups, values = 10, 300 - 128  # ceil(300 / 32) groups of keys; the window without the residual
    for tokens in (1000, 5000):
        exact = (4 + (tokens - 4) % 128) * 64 * 2 + (4 + 128) * 32 * 2
        assert stored_bytes(KIVI, "bfloat16", 1, 64, 32, tokens, window) == exact + groups * KEY_GROUP + values * VALUE
    read = read_bytes(KIVI, "bfloat16", 1, 64, 32, 1000, window)
    seen, coded = 299, 995 // 128 * 128  # of 995 tokens behind the sinks, the step's own not among them
    assert read == (4 + 995 - coded + 1) * 128 + (4 + 128 + 1) * 64 + (coded // 32 - (995 - seen) // 32) * KEY_GROUP + (seen - 128) * VALUE


def test_the_residual_of_a_ring_is_at_most_its_window():
    assert [ring_residual(Kivi(4, 32, 128), window) for window in (31, 32, 100, 127, 128, 500)] == [0, 32, 96, 96, 128, 128]
    assert quantised_in(KIVI, SinkRecent(4, 20), 8) is None
    assert quantised_in(KIVI, SinkRecent(4, 20), 12) == KIVI.quantised
    assert stored_bytes(KIVI, "bfloat16", 1, 64, 32, 1000, SinkRecent(4, 20)) == 24 * (64 + 32) * 2


def test_plain_stores_cost_what_they_hold():
    for store, itemsize in ((Store(), 2), (Store("float32"), 4)):
        assert stored_bytes(store, "bfloat16", 3, 64, 32, 50) == 3 * 50 * 96 * itemsize == read_bytes(store, "bfloat16", 3, 64, 32, 50)


def test_a_token_that_is_chosen_alone_brings_the_scales_of_its_group():
    assert row_bytes(Store(), "bfloat16", 3, 64, 32) == 3 * 96 * 2
    assert row_bytes(KIVI, "bfloat16", 3, 64, 32) == 3 * (64 // 2 + 64 * 2 * 2 + VALUE)


def test_quantised_lookups_read_less_than_exact_ones_of_a_few_keys():
    zones = (SinkRecent(64, 256), TopK(8, "sketch"))
    few, exact = (plan(HeadPolicy("few", zones, store=store)) for store in (KIVI, Store()))
    assert few.read_bytes(8192) < exact.read_bytes(8192) and few.stored_bytes(8192) < exact.stored_bytes(8192)


def test_chosen_keys_are_kept_as_they_are():
    zones = (SinkRecent(64, 256), Static(64))
    few = plan(HeadPolicy("few", zones, store=KIVI)).stored_bytes(8192)
    exact = plan(HeadPolicy("few", zones)).stored_bytes(8192)
    ring = [stored_bytes(store, "bfloat16", 3, 64, 32, 8192, zones[0]) for store in (KIVI, Store())]
    assert few - ring[0] == exact - ring[1]


@pytest.mark.parametrize(("numbers", "bits", "bytes_"), [(64, 4, 32), (64, 2, 16), (48, 2, 16), (80, 2, 32), (16, 4, 16)])
def test_codes_fill_whole_bytes_of_sixteen(numbers, bits, bytes_):
    assert code_bytes(numbers, bits) == bytes_


def test_what_does_not_fit_is_told_with_what_would():
    assert store_problem(KIVI, 64, 32) is None and store_problem(Store(quantised=Int8()), 15, 15) is None
    assert store_problem(KIVI, 64, 80) == (
        "kivi quantises values in groups of 32 channels, and value_dim 80 is no multiple of it.",
        "Write group: 16.",
    )
    assert store_problem(KIVI, 64, 40) == (
        "kivi quantises values in groups of 32 channels, and value_dim 40 is no multiple of it.",
        "Write store: int8, which needs no groups.",
    )
    assert store_problem(Store(quantised=Kivi(2, 32, 128)), 65, 32) == (
        "kivi packs 4 channels of a key in a byte, and head_dim is 65.",
        "Write store: int8.",
    )
