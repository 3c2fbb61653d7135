"""The oracle itself, against the sentences that define it."""

import torch

from kvcompile.ir.policy import All, SinkRecent
from kvcompile.runtime import reference


def test_visibility_is_what_the_policy_says():
    queries, keys = torch.arange(3, 40), torch.arange(40)
    everything = reference.visible(All(), queries, keys)
    for sink, recent in ((0, 1), (0, 5), (4, 1), (4, 8), (50, 3)):
        banded = reference.visible(SinkRecent(sink, recent), queries, keys)
        for row, p in enumerate(range(3, 40)):
            for j in range(40):
                assert everything[row, j] == (j <= p)
                assert banded[row, j] == (j <= p and (j < sink or j > p - recent))


def test_a_chunk_hides_what_lies_before_it():
    queries, keys = torch.arange(3, 40), torch.arange(40)
    for zone in (All(), SinkRecent(0, 8), SinkRecent(2, 5)):
        whole, chunked = (reference.visible(zone, queries, keys, chunk) for chunk in (None, 8))
        for row, p in enumerate(range(3, 40)):
            for j in range(40):
                assert chunked[row, j] == (whole[row, j] and j // 8 == p // 8)


def test_slopes_join_the_capped_logit_of_each_query_head():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 6)
    slopes, queries, keys = torch.rand(2, 3), torch.arange(4, 9), torch.arange(9)
    see = reference.visible(All(), queries, keys)
    state = reference.attend(query, key, value, see, 0.3, 2.0, reference.alibi(slopes, queries, keys))
    for head in range(2):
        for one in range(3):
            for row, p in enumerate(range(4, 9)):
                raw = torch.stack([query[head, one, row].double() @ key[head, j].double() * 0.3 for j in range(p + 1)])
                logits = 2 * torch.tanh(raw / 2) + slopes[head, one].double() * torch.tensor([j - p for j in range(p + 1)])
                right = torch.softmax(logits, 0) @ value[head, : p + 1].double()
                torch.testing.assert_close(state.out[head, one, row], right, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(state.lse[head, one, row], logits.logsumexp(0), rtol=1e-12, atol=1e-12)


def test_sinks_meet_the_query_that_is_theirs():
    torch.manual_seed(0)
    query, sink_query = torch.randn(2, 2, 3, 4, 8).double().unbind()
    key, value = torch.randn(2, 9, 8).double(), torch.randn(2, 9, 6).double()
    see, sinks = reference.visible(SinkRecent(2, 4), torch.arange(5, 9), torch.arange(9)), torch.arange(9) < 2
    state = reference.attend(query, key, value, see, 0.3, sink_query_HGSD=sink_query, sinks_T=sinks)
    parts = [reference.attend(sink_query, key, value, see & sinks, 0.3), reference.attend(query, key, value, see & ~sinks, 0.3)]
    right = reference.merge(parts)
    torch.testing.assert_close(state.out, right.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.lse, right.lse, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(state.out, reference.attend(query, key, value, see, 0.3).out)


def test_attention_is_torchs_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 16).double(), torch.randn(2, 9, 16).double(), torch.randn(2, 9, 16).double()
    mask = reference.visible(All(), torch.arange(4, 9), torch.arange(9))
    right = torch.nn.functional.scaled_dot_product_attention(query, key[:, None], value[:, None], attn_mask=mask, scale=0.3)
    torch.testing.assert_close(reference.attend(query, key, value, mask, 0.3).out, right, rtol=1e-12, atol=1e-12)


def test_one_key_has_its_logit_as_lse_and_the_cap_bends_it():
    query, key, value = torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 2), 4.0), torch.ones(1, 1, 5)
    see = torch.ones(1, 1, dtype=torch.bool)
    assert reference.attend(query, key, value, see, 0.5).lse.item() == 12.0
    capped = reference.attend(query, key, value, see, 0.5, soft_cap=10.0)
    assert capped.lse.item() == (10 * torch.tanh(torch.tensor(1.2, dtype=torch.float64))).item()
    assert capped.out.tolist() == [[[[1.0] * 5]]]


def test_no_visible_key_is_zero_and_minus_infinity():
    query = torch.randn(1, 2, 3, 4)
    for tokens in (0, 6):
        state = reference.attend(query, torch.randn(1, tokens, 4), torch.randn(1, tokens, 5), torch.zeros(3, tokens, dtype=torch.bool), 1.0)
        assert torch.equal(state.out, torch.zeros(1, 2, 3, 5).double())
        assert torch.equal(state.lse, torch.full((1, 2, 3), -torch.inf).double())
