import pytest

from kvcompile.spec.units import parse_bytes, parse_numbers, parse_percent, parse_tokens


@pytest.mark.parametrize(("text", "tokens"), [(256, 256), ("8k", 8192), ("128k", 131072)])
def test_k_is_1024_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(("text", "count"), [("256MiB", 256 << 20), ("4GiB", 4 << 30), ("4GB", 4 * 10**9), ("1.5KiB", 1536), (7, 7)])
def test_sizes_are_binary_with_an_i_and_decimal_without(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(("text", "share"), [("75%", 0.75), ("1.8%", 0.018), ("0%", 0.0), ("29%", 0.29)])
def test_percentages_become_shares(text, share):
    assert parse_percent(text) == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize(("value", "numbers"), [(3, (3,)), ("0-2", (0, 1, 2)), ([5, "0-1", 0], (0, 1, 5)), ("all", None)])
def test_layers_are_numbers_ranges_and_lists(value, numbers):
    assert parse_numbers(value) == numbers


@pytest.mark.parametrize(
    ("parse", "value"),
    [
        *((parse_tokens, value) for value in ("8", "8m", "-1k", 1.0, True, None)),
        *((parse_bytes, value) for value in ("4G", "GiB", "4 gib", "1..5GiB", 1.5, True)),
        *((parse_percent, value) for value in ("75", "1.2.3%", ".%", "-5%", "%", 0.75)),
        *((parse_numbers, value) for value in ("3", "2-1", "-1", -1, [], [True], 1.0, "0-999999", ["all"])),
    ],
)
def test_other_writings_are_refused(parse, value):
    with pytest.raises(ValueError):
        parse(value)
