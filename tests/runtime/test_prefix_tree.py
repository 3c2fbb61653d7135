"""Sessions by the tokens that they have read: what is reused, what is kept, what is given back, and that nobody can tell."""

from __future__ import annotations

import functools
import gc
import random

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile.ir.errors import SessionError
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.prefix_tree import PrefixTree

VOCABULARY = 256
WINDOW = [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}]
POLICIES = {
    "full": {"zones": ["all"]},
    "streaming": {"zones": WINDOW},
    "back": {"zones": WINDOW, "rollback": 40},
    "kivi": {"zones": ["all"], "store": {"kivi": {"bits": 4, "group": 16, "residual_tokens": 16}}},
    "int8": {"zones": ["all"], "store": "int8"},
    "disk": {"zones": [{"all": {"device": "disk"}}]},
    "static": {"zones": [*WINDOW, {"static": {"keys": 8}}]},
    "lookup": {"zones": [*WINDOW, {"top_k": {"k": 8, "index": "flat"}}]},
}


@functools.cache
def compiled(policy: str = "full") -> CompiledModel:
    """KV head 0 has the policy, head 1 is full."""
    heads = [{"policy": "mine", "kv_heads": 0}]
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "policies": {"mine": POLICIES[policy]}, "heads": heads}
    return kvcompile.compile(toys.llama(layers=2), spec={**spec, "target": {"segments": "eager", "kernels": "torch"}})


@functools.cache
def convolving() -> CompiledModel:
    return kvcompile.compile(
        toys.lfm2(), spec={"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager", "kernels": "torch"}}
    )


def ids(tokens: int, seed: int) -> list[int]:
    found: list[int] = some_ids(tokens, VOCABULARY, seed).tolist()
    return found


SYSTEM, ONE, TWO, THREE = ids(60, 1), ids(20, 2), ids(25, 3), ids(30, 4)


def token_bytes(model: CompiledModel) -> int:
    """Of one token, where every head keeps it."""
    return model.plan.stored_bytes(101) - model.plan.stored_bytes(100)


def assert_goes_on_as_alone(model: CompiledModel, session, tolerance: float = 1e-5) -> None:
    alone = model.session()
    alone.prefill(session.tokens)
    fork = session.fork()
    for token in (3, 200, 77):
        torch.testing.assert_close(fork.step(token), alone.step(token), rtol=0, atol=tolerance)


# --- what is reused ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["full", "streaming", "back", "int8", "lookup", "static"])
def test_a_session_has_read_its_prompt_whatever_was_reused(policy):
    model = compiled(policy)
    tree = PrefixTree(model, "1GiB")
    for prompt in (SYSTEM + ONE, SYSTEM + TWO, SYSTEM, SYSTEM + ONE, SYSTEM + ONE + THREE, SYSTEM + TWO[:10] + THREE, [9]):
        session = tree.session_for(prompt)
        assert session.tokens == prompt
        assert_goes_on_as_alone(model, session)


def test_the_longest_known_prefix_is_not_read_again(monkeypatch):
    model, read = compiled(), []
    real = CompiledModel.forward
    monkeypatch.setattr(CompiledModel, "forward", lambda self, batch, **how: read.append(len(batch[0][1])) or real(self, batch, **how))
    tree = PrefixTree(model, "1GiB")
    tree.session_for(SYSTEM + ONE)
    tree.session_for(SYSTEM + TWO)
    tree.session_for(SYSTEM + TWO)
    tree.session_for(SYSTEM + ONE[:7])
    tree.session_for(SYSTEM + ONE + THREE)
    assert read == [80, 25, 30]
    told = tree.statistics()
    assert (told.prompts, told.asked_tokens, told.reused_tokens) == (5, 80 + 85 + 85 + 67 + 110, 60 + 85 + 67 + 80)
    assert told.reused_share == pytest.approx(told.reused_tokens / told.asked_tokens)
    assert told.nodes == 4  # the three ends, and where the first two part


def test_a_node_where_prompts_part_owns_no_bytes():
    model = compiled()
    tree = PrefixTree(model, "1GiB")
    for tail in (ONE, TWO, THREE):
        tree.session_for(SYSTEM + tail)
    assert tree.nbytes() == tree.statistics().stored_bytes == token_bytes(model) * len(SYSTEM + ONE + TWO + THREE)


def test_a_session_of_the_tree_owns_only_what_it_reads_later():
    model = compiled()
    session = PrefixTree(model, "1GiB").session_for(SYSTEM)
    assert (session.nbytes(), session.shared_nbytes()) == (0, 60 * token_bytes(model))
    session.step(1)
    assert session.nbytes() == token_bytes(model)


NO_WAY_BACK = {name: functools.partial(compiled, name) for name in ("streaming", "lookup", "static")} | {"convolution": convolving}


@pytest.mark.parametrize("make", NO_WAY_BACK.values(), ids=NO_WAY_BACK)
def test_where_nothing_can_be_rolled_back_the_place_where_prompts_part_is_read_once(make):
    model = make()
    tree = PrefixTree(model, "1GiB")
    told = []
    for tail in (ONE, TWO, THREE):
        assert_goes_on_as_alone(model, tree.session_for(SYSTEM + tail))
        told.append(tree.statistics().reused_tokens)
    assert told == [0, 0, 60]  # the second prompt stops there on its way


def test_a_ring_that_promises_a_rollback_is_rolled_back():
    tree = PrefixTree(compiled("back"), "1GiB")
    tree.session_for(SYSTEM + ONE)
    assert_goes_on_as_alone(tree.model, tree.session_for(SYSTEM + TWO))
    assert tree.statistics().reused_tokens == 60


def test_quantised_tokens_are_reused_as_they_are():
    """KIVI: what a chunk sees of an earlier one is quantised, so that only a session read in the same chunks is equal."""
    tree = PrefixTree(compiled("kivi"), "1GiB")
    tree.session_for(SYSTEM)
    session, alone = tree.session_for(SYSTEM + ONE), tree.model.session()
    alone.prefill(SYSTEM)
    alone.prefill(ONE)
    for token in (3, 200, 77):
        torch.testing.assert_close(session.step(token), alone.step(token), rtol=0, atol=1e-5)


def test_tokens_on_disk_are_shared_block_by_block(tmp_path):
    policies, heads = {"mine": POLICIES["disk"]}, [{"policy": "mine", "kv_heads": 0}]
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "policies": policies, "heads": heads}
    target = {"segments": "eager", "kernels": "torch", "disk": str(tmp_path)}
    model = kvcompile.compile(toys.llama(layers=1), spec={**spec, "target": target})
    tree = PrefixTree(model, "1GiB")
    long = ids(600, 1)
    for prompt in (long, long[:300] + ONE, long[:520] + TWO):
        assert_goes_on_as_alone(model, tree.session_for(prompt))
    assert tree.statistics().reused_tokens == 300 + 520
    tree.budget_bytes = 1
    tree._shrink()
    assert tree.nbytes() == 0


def test_short_pieces_get_no_session_but_are_found():
    tree = PrefixTree(compiled(), "1GiB", least_tokens=30)
    tree.session_for(SYSTEM)
    tree.session_for(SYSTEM + TWO)
    assert tree.statistics().nodes == 1
    tree.session_for(SYSTEM + THREE)
    assert tree.statistics().nodes == 2
    tree.session_for(SYSTEM[:20] + ONE)  # parts in an edge, too near the start
    assert (tree.statistics().nodes, tree.statistics().reused_tokens) == (3, 60 + 60 + 20)
    assert_goes_on_as_alone(tree.model, tree.session_for(SYSTEM[:20] + TWO))


# --- in pieces -----------------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_read_in_pieces_between_steps_of_others():
    model = compiled()
    tree = PrefixTree(model, "1GiB")
    other = tree.session_for(SYSTEM)
    opened = tree.open(SYSTEM + THREE)
    assert (opened.reused_tokens, opened.unread.tolist(), opened.parts_at) == (60, THREE, None)
    for piece in opened.pieces(7):
        logits = opened.session.prefill(piece)
        other.step(5)
    tree.keep(opened.session)
    torch.testing.assert_close(logits, model.session().prefill(SYSTEM + THREE), rtol=0, atol=1e-5)
    opened.session.step(8)
    again = tree.open([*SYSTEM, *THREE, 9])
    assert again.unread.tolist() == [9]
    assert_goes_on_as_alone(model, opened.session)


def test_the_last_token_is_left_to_be_read_for_its_logits():
    tree = PrefixTree(compiled(), "1GiB")
    tree.session_for(SYSTEM)
    opened = tree.open(SYSTEM)
    assert (opened.unread.tolist(), opened.reused_tokens) == (SYSTEM[-1:], 59)
    torch.testing.assert_close(opened.session.prefill(opened.unread), tree.model.session().prefill(SYSTEM), rtol=0, atol=1e-5)
    assert tree.statistics().nodes == 1


def test_a_piece_ends_where_prompts_part():
    tree = PrefixTree(compiled("streaming"), "1GiB")
    tree.session_for(SYSTEM + ONE)
    opened = tree.open(SYSTEM + TWO)
    assert (opened.reused_tokens, opened.parts_at) == (0, 60)
    assert [len(piece) for piece in opened.pieces(32)] == [32, 28, 25]
    for piece in opened.pieces(32):
        opened.session.prefill(piece)
        if len(opened.session) == opened.parts_at:
            tree.keep(opened.session)
    assert tree.open(SYSTEM + THREE).reused_tokens == 60


def test_an_answer_can_be_kept_for_the_next_turn():
    model = compiled()
    tree = PrefixTree(model, "1GiB")
    session = tree.session_for(SYSTEM)
    answer = model.complete(ONE, max_new_tokens=20, session=session).tokens
    tree.keep(session)
    follow = tree.open([*SYSTEM, *ONE, *answer, *TWO])
    assert follow.reused_tokens == 60 + 20 + 20
    assert session.nbytes() == 0, "the tree owns what was kept"


def test_what_was_read_twice_is_not_kept_twice():
    model = compiled()
    tree = PrefixTree(model, "1GiB")
    early, late = tree.open(SYSTEM + ONE), tree.open(SYSTEM + TWO)
    for opened in (early, late):
        opened.session.prefill(opened.unread)
        tree.keep(opened.session)
    assert tree.nbytes() == 80 * token_bytes(model)
    assert tree.statistics().nodes == 2  # the first one's end, and where the second one parts from it
    assert late.session.nbytes() == 85 * token_bytes(model)
    assert_goes_on_as_alone(model, late.session)


# --- eviction ------------------------------------------------------------------------------------------------------------------------


def test_the_leaf_that_was_not_asked_for_longest_goes_first():
    model = compiled()
    tree = PrefixTree(model, 130 * token_bytes(model))
    for tail in (ONE, TWO):
        tree.session_for(SYSTEM + tail)
    tree.session_for(SYSTEM + ONE)
    tree.session_for(SYSTEM + THREE)  # 60 + 20 + 25 + 30 tokens
    assert (tree.nbytes(), tree.statistics().evictions) == (110 * token_bytes(model), 1)
    known = [tree.open([*SYSTEM, *tail, 0]).reused_tokens for tail in (ONE, TWO, THREE)]
    assert known == [80, 60, 90]


def test_a_lender_that_is_evicted_leaves_its_memory_to_the_prefix():
    model = compiled()
    tree = PrefixTree(model, 100 * token_bytes(model))
    tree.session_for(SYSTEM + ONE)  # owns the system prompt's bytes
    kept = tree.session_for(SYSTEM + TWO)
    assert tree.nbytes() == 85 * token_bytes(model)  # ONE is gone, and what it held of SYSTEM is not
    assert_goes_on_as_alone(model, kept)
    assert tree.open(SYSTEM + ONE).reused_tokens == 60
    del kept
    gc.collect()
    tree.session_for(THREE)
    tree.session_for(ids(40, 9))
    assert tree.nbytes() == 70 * token_bytes(model)
    assert tree.open(SYSTEM).reused_tokens == 0


def test_nested_prefixes_inherit_from_the_longest_to_the_shortest():
    model = compiled()
    tree = PrefixTree(model, "1GiB")
    for prompt in (SYSTEM + ONE + TWO, SYSTEM + ONE + THREE, SYSTEM + THREE):
        tree.session_for(prompt)
    whole = 60 + 20 + 25 + 30 + 30
    assert tree.nbytes() == whole * token_bytes(model)
    for spared, left in ((1, 60 + 20 + 30 + 30), (31, 60 + 20 + 30), (61, 60 + 30)):
        tree.budget_bytes = (whole - spared) * token_bytes(model)
        tree._shrink()
        assert tree.nbytes() == left * token_bytes(model), spared
    tree.budget_bytes = 79 * token_bytes(model)
    tree._shrink()
    assert tree.nbytes() == 60 * token_bytes(model)
    assert_goes_on_as_alone(model, tree.session_for(SYSTEM))
    tree.budget_bytes = 1
    tree._shrink()
    assert (tree.nbytes(), tree.statistics().nodes) == (0, 0)


def test_what_a_living_session_reads_is_not_evicted():
    model = compiled()
    tree = PrefixTree(model, 40 * token_bytes(model))
    session = tree.session_for(SYSTEM)
    other = tree.session_for(THREE)
    assert (tree.nbytes(), tree.statistics().evictions) == (90 * token_bytes(model), 0)
    assert_goes_on_as_alone(model, session)
    del session, other
    gc.collect()
    tree.session_for(ONE)
    assert tree.nbytes() == 20 * token_bytes(model)


def test_evicted_memory_goes_back_to_the_system():
    """Trap 12: no byte stays behind a prefix whose tail is evicted."""
    model = compiled()
    tree = PrefixTree(model, "1GiB")
    tree.session_for(ids(2000, 5))
    tree.session_for(ids(2000, 5)[:100] + ONE)
    tree.budget_bytes = 150 * token_bytes(model)
    tree._shrink()
    (store, *_) = tree.open(ids(2000, 5)[:100]).session.stores(0)
    assert store._parts[0].buffer.written <= 112  # whole blocks of 16 tokens


def test_clearing_forgets_and_living_sessions_go_on():
    model = compiled()
    tree = PrefixTree(model, "1GiB")
    session = tree.session_for(SYSTEM)
    tree.clear()
    assert (tree.nbytes(), tree.statistics().nodes) == (0, 0)
    assert_goes_on_as_alone(model, session)
    with pytest.raises(SessionError, match="was cleared since"):
        tree.keep(session)


@pytest.mark.parametrize("policy", ["full", "back", "streaming"])
def test_any_order_of_prompts_reads_what_they_say(policy):
    """200 prompts of 8 nested families under a budget of a few of them, some sessions living on: bytes are those of the nodes."""
    model = compiled(policy)
    draw = random.Random(3)
    families = [ids(90, 20 + number) for number in range(4)]
    families += [family[:40] + ids(50, 30 + number) for number, family in enumerate(families)]
    tree = PrefixTree(model, 260 * token_bytes(model), least_tokens=4)
    living = []
    for number in range(200):
        prompt = draw.choice(families)[: draw.randint(1, 90)] + ids(draw.randint(1, 12), draw.randint(0, 5))
        opened = tree.open(prompt)
        for piece in opened.pieces(draw.randint(10, 60)):
            opened.session.prefill(piece)
            if draw.random() < 0.5:
                tree.keep(opened.session)
        assert opened.session.tokens == prompt
        if number % 10 == 0:
            assert_goes_on_as_alone(model, opened.session)
            living.append(opened.session)
        living = living[-3:]
        del opened
        check_tree(tree)
    told = tree.statistics()
    assert told.evictions > 20 and told.reused_share > 0.2
    for session in living:
        assert_goes_on_as_alone(model, session)


def check_tree(tree: PrefixTree) -> None:
    """Every session has read its node's tokens, nodes are children of one another, and lenders stand below."""
    for node in tree._root.downwards():
        if node.parent is None:
            continue
        path = [token for each in reversed(list(node.upwards())) for token in each.edge]
        assert len(path) == node.tokens and node.parent.children[node.edge[0]] is node
        assert node.session is None or (node.session.tokens == path and node.nbytes == node.session.nbytes())
        assert node.session is not None or len(node.children) >= 2
        assert node.lender is None or any(each is node.lender for each in node.downwards())


# --- what is refused -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["4G", "", -1, 0, 1.5, None, True])
def test_what_is_no_size_is_refused(budget):
    with pytest.raises(SessionError) as caught:
        PrefixTree(compiled(), budget)
    assert str(caught.value) == f'budget: {budget!r} is no size.\n  Write a size such as "4GiB" or "256MiB", or a number of bytes.'


def test_sizes_are_those_of_the_spec():
    assert PrefixTree(compiled(), "4GiB").budget_bytes == 4 << 30
    assert PrefixTree(compiled(), 1000).budget_bytes == 1000


def test_what_is_no_model_is_refused():
    with pytest.raises(SessionError, match="model: str is no compiled model"):
        PrefixTree("model.yaml", "4GiB")


@pytest.mark.parametrize("least", [0, True, 2.0])
def test_what_is_no_number_of_tokens_is_refused(least):
    with pytest.raises(SessionError, match=f"least_tokens: {least!r} is no number of tokens"):
        PrefixTree(compiled(), "1GiB", least_tokens=least)


def test_wrong_prompts_are_refused_and_change_nothing():
    tree = PrefixTree(compiled(), "1GiB")
    for wrong, told in (([], "there is no token"), ([256], "token id 256 is not in the vocabulary"), ([1.5], "is not a list of token ids")):
        for ask in (tree.session_for, tree.open):
            with pytest.raises(SessionError, match=told):
                ask(wrong)
    assert tree.statistics().prompts == 0
    with pytest.raises(SessionError, match="most_tokens: 0 is less than 1"):
        tree.open(ONE).pieces(0)


def test_a_session_of_somebody_else_is_not_kept():
    tree = PrefixTree(compiled(), "1GiB")
    session = tree.session_for(SYSTEM)
    for other in (compiled().session(), session.fork()):
        with pytest.raises(SessionError) as caught:
            tree.keep(other)
        assert str(caught.value) == (
            "keep: this tree did not give the session, or was cleared since.\n"
            "  Keep the session that open or session_for returned, not a fork of it."
        )


def test_a_prompt_that_fails_leaves_no_node(monkeypatch):
    tree = PrefixTree(compiled(), "1GiB")
    tree.session_for(SYSTEM)

    def fail(*call, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(CompiledModel, "_forward", fail)
    with pytest.raises(KeyboardInterrupt):
        tree.session_for(SYSTEM + ONE)
    monkeypatch.undo()
    assert tree.statistics().nodes == 1
    assert_goes_on_as_alone(tree.model, tree.session_for(SYSTEM + ONE))
