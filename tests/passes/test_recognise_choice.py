from __future__ import annotations

import pytest
import torch
import toys
from torch import nn
from units import after, logits, some_ids

import kvcompile
from kvcompile.ir.errors import SpecError, UnsupportedGraphError
from kvcompile.ir.policy import SinkRecent
from kvcompile.sweep.oracle import Oracle

CHOSEN, CHOOSERS, COMPARED = 6, 12, 4
SPEC = {"kvcompile": 1, "target": {"kernels": "torch", "segments": "eager"}, "verify": {"tokens": 48}}
STREAMING = {
    **SPEC,
    "policies": {"short": {"zones": [{"sink_recent": {"sink_tokens": 2, "recent_tokens": 9}}]}},
    "heads": [{"policy": "short"}],
}


class Choosing(toys.SlicedTable):
    """A query sees the CHOSEN keys that a second, lighter attention likes best."""

    def __init__(self, sinks: bool = False):
        super().__init__()
        torch.manual_seed(3)
        self.asks, self.offers, self.weighs = nn.Linear(16, CHOOSERS * COMPARED), nn.Linear(16, COMPARED), nn.Linear(16, CHOOSERS)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.sinks = nn.Parameter(torch.randn(2)) if sinks else None

    def choice(self, x, hidden):
        asked = self.asks(x).unflatten(2, (CHOOSERS, COMPARED))
        products = (asked @ self.offers(x).transpose(1, 2)[:, None] * 0.5).relu()
        liked = (self.weighs(x)[:, :, None] @ products).squeeze(2)
        return liked.masked_fill(hidden, -torch.inf)

    def chosen(self, liked):
        return liked.topk(min(CHOSEN, liked.shape[-1]), dim=-1).indices

    def mask(self, hidden, places):
        return hidden | torch.ones_like(hidden).expand(1, -1, -1).scatter(-1, places, False)

    def forward(self, ids):
        x = self.words(ids) + self.table[:, : ids.shape[1]]
        at = torch.arange(ids.shape[1])
        hidden = at > at[:, None]
        mask = self.mask(hidden, self.chosen(self.choice(x, hidden)))[:, None]
        query, key, value = (each.unflatten(2, (2, -1)).transpose(1, 2) for each in (self.query(x), self.key(x), x))
        scores = (query @ key.transpose(2, 3) * 0.4).masked_fill(mask, -1e30)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks[None, :, None, None].expand(1, -1, scores.shape[2], 1)], -1)
        scores = scores - scores.max(-1, keepdim=True).values
        weights = scores.softmax(-1)[..., : ids.shape[1]]
        return self.head(x + (weights @ value).transpose(1, 2).flatten(2))


MODELS = {"choosing": lambda: Choosing(), "choosing beside learnt sinks": lambda: Choosing(sinks=True)}


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_sees_the_keys_that_the_model_chooses(name):
    model = MODELS[name]().eval()
    unit = after("check_token_wise", model)
    (site,) = unit.sites
    assert after("build_zones", model).plan.notes == ("1 layers choose their keys themselves: they attend in torch",)
    assert (site.chosen_tokens, site.compared, site.head_dim, site.value_dim) == (CHOSEN, COMPARED, 8 + COMPARED, 8)
    assert site.learnt_sinks == ("sinks" in name)
    for tokens in (1, CHOSEN, CHOSEN + 1, 31):
        ids = some_ids(tokens, 32)
        with torch.no_grad():
            torch.testing.assert_close(logits(unit.graph, ids), model(ids[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_session_decodes_exactly_and_streams_as_the_oracle(name, own_cache):
    model, ids = MODELS[name]().eval(), some_ids(40, 32)
    with torch.no_grad():
        expected = model(ids[None])[0]
    streamed = Oracle(after("check_token_wise", model).graph, SinkRecent(2, 9)).logits(ids)
    for spec, wanted in ((SPEC, expected), (STREAMING, streamed.float())):
        session = kvcompile.compile(model, spec).session()
        found = [session.prefill(ids[:13], logits="all"), *(session.step(token)[None] for token in ids[13:])]
        torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-5, atol=1e-5)
    assert (streamed.float() - expected).abs().max() > 1e-2, "the window hides nothing that was chosen"


class Signed(Choosing):
    def choice(self, x, hidden):
        return (self.asks(x)[..., :COMPARED] @ self.offers(x).transpose(1, 2)).masked_fill(hidden, -torch.inf)


class Absolute(Choosing):
    def choice(self, x, hidden):
        asked = self.asks(x).unflatten(2, (CHOOSERS, COMPARED))
        liked = (self.weighs(x)[:, :, None] @ (asked @ self.offers(x).transpose(1, 2)[:, None]).abs()).squeeze(2)
        return liked.masked_fill(hidden, -torch.inf)


class Always(Choosing):
    def chosen(self, liked):
        return liked.topk(CHOSEN, dim=-1).indices


class Hidden(Choosing):
    """The chosen keys are the ones that are not seen."""

    def mask(self, hidden, places):
        chosen = torch.zeros_like(hidden).expand(1, -1, -1).scatter(-1, places, True)
        return hidden | (chosen & ~torch.eye(hidden.shape[0], dtype=torch.bool))


class Twice(Choosing):
    def mask(self, hidden, places):
        again = self.chosen(self.choice(self.table[:, : hidden.shape[0]] * self.words.weight[0] + 0 * places[..., :1], hidden))
        return super().mask(hidden, places) | super().mask(hidden, again)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Signed, "keys are chosen in a way that is not known"),
        (Absolute, "keys are chosen by something else than a weighed sum of relu(products)"),
        (Always, "how many keys are chosen does not follow the number of tokens"),
        (Hidden, ""),
        (Twice, "keys are chosen several times"),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else "",
)
def test_another_choice_is_refused(kind, why):
    with pytest.raises(UnsupportedGraphError) as caught:
        after("check_token_wise", kind().eval())
    assert "an attention that kvcompile does not recognise" in str(caught.value) and why in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ({"zones": [{"all": {}}], "store": {"dtype": "int8"}}, "store"),
        ({"zones": [{"sink_recent": {"sink_tokens": 2, "recent_tokens": 9}}], "positions": "cache_index"}, "positions"),
        ({"zones": [{"all": {"device": "disk"}}]}, "zones"),
        ({"zones": [{"sink_recent": {"sink_tokens": 2, "recent_tokens": 9}}, {"top_k": {"k": 4, "index": "flat"}}]}, "zones"),
    ],
)
def test_a_policy_that_such_a_site_cannot_follow_is_refused(policy, field):
    with pytest.raises(SpecError) as caught:
        after("build_zones", Choosing().eval(), policies={"other": policy}, heads=[{"policy": "other"}])
    assert f"policies.other.{field}" in str(caught.value)
    assert f"chooses {CHOSEN} keys for each query itself, of exact keys in memory, at their own positions." in str(caught.value)
    assert str(caught.value).endswith("\n  Use full or streaming for this model.")
