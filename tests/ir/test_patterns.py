import pytest

from kvcompile.ir.patterns import select_lowest, share_count


@pytest.mark.parametrize(
    ("share", "heads", "count"),
    [(0.75, 90, 67), (0.1, 30, 3), (0.29, 100, 29), (0.7, 10, 7), (1.0, 7, 7), (0.0, 7, 0), (0.999999, 10, 9), (1 / 3, 3, 1)],
)
def test_the_share_is_rounded_down_whatever_floats_do(share, heads, count):
    assert share_count(share, heads) == count


def test_the_lowest_scores_are_chosen_among_the_candidates_only():
    scores = ((0.9, 0.1), (0.2, 0.8), (0.0, 0.0))
    selection = select_lowest(scores, [(0, 0), (0, 1), (1, 0), (1, 1)], 0.5)
    assert selection.chosen == ((0, 1), (1, 0))
    assert selection.tie is None


def test_ties_go_to_lower_layers_and_heads_and_are_told():
    scores = ((0.5, 0.5), (0.1, 0.5))
    forwards = [(0, 0), (0, 1), (1, 0), (1, 1)]
    selection = select_lowest(scores, forwards, 0.5)
    assert selection == select_lowest(scores, forwards[::-1], 0.5)
    assert selection.chosen == ((0, 0), (1, 0))
    assert selection.tie == "3 KV heads score 0.5 where the share ends; 1 of them covered, lowest layers and heads first"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_have_no_tie(share):
    selection = select_lowest(((0.5, 0.5),), [(0, 0), (0, 1)], share)
    assert (len(selection.chosen), selection.tie) == (2 * share, None)
