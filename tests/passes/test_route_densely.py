from __future__ import annotations

import re

import pytest
import torch
import toys
from torch import nn
from units import after, logits, some_ids

import kvcompile
from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.show import graph_text
from kvcompile.ir.tokens import fake_value, token_dimensions
from kvcompile.passes.trace import trace

WIDTH, EXPERTS, CHOSEN = 16, 3, 2


class Routed(toys.SlicedTable):
    """Attention, then experts that each token's own numbers choose."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) * 0.4)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) * 0.4)

    def forward(self, ids):
        x = self.words(ids)
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        x = x + nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x + self.mix(x.flatten(0, 1)).reshape(x.shape))

    def chosen(self, x_TD):
        weights, numbers = self.gate(x_TD).softmax(-1).topk(CHOSEN)
        return weights, numbers

    def expert(self, number, x):
        return torch.tanh(x @ self.up[number]) @ self.down[number]


class Gathered(Routed):
    """For each expert that was chosen at all: gather its tokens, add up what it says of them."""

    def mix(self, x_TD):
        weights, numbers = self.chosen(x_TD)
        chosen_EKT = nn.functional.one_hot(numbers, EXPERTS + 1).permute(2, 1, 0)
        out = torch.zeros_like(x_TD)
        for expert in chosen_EKT.sum((1, 2)).greater(0).nonzero():
            number = expert[0]
            place, token = torch.where(chosen_EKT[number])
            if token.numel() == 0:
                continue
            out.index_add_(0, token, self.expert(number, x_TD[token]) * weights[token, place, None])
        return out


class TokenFirst(Routed):
    """The mask has its tokens first."""

    def mix(self, x_TD):
        weights, numbers = self.chosen(x_TD)
        out = torch.zeros_like(x_TD)
        for number in range(EXPERTS):
            token, place = (numbers == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, self.expert(number, x_TD[token]) * weights[token, place].unsqueeze(1))
        return out


class SortedByExpert(Routed):
    """All rows sorted by expert, cut by counts that only the numbers tell, put together and added up in the tokens' order."""

    def mix(self, x_TD):
        weights, numbers = self.chosen(x_TD)
        counts = torch.zeros_like(self.gate(x_TD)).scatter(1, numbers, 1).long().sum(0).tolist()
        _, order = numbers.flatten().sort(0)
        token = order.div(CHOSEN, rounding_mode="trunc")
        parts = x_TD[token].split(counts, dim=0)
        rows = torch.cat([self.expert(number, part) for number, part in enumerate(parts)], dim=0)
        return torch.zeros_like(x_TD).index_add(0, token, rows * weights.flatten()[order][:, None])


class UnderMask(Routed):
    """Rows under a mask of tokens are taken out and written back; so is a sequence under a mask that is a constant."""

    def mix(self, x_TD):
        mask = self.gate(x_TD)[:, 0] > 0
        out = torch.zeros_like(x_TD)
        out[mask] = self.expert(0, x_TD[mask])
        whole = torch.zeros_like(out)[None]
        for number in range(EXPERTS):
            language = torch.ones(1) == number
            whole[language] = self.expert(number, out[None][language])
        return whole[0]


ROUTES = [Gathered, TokenFirst, SortedByExpert, UnderMask]


@pytest.mark.parametrize("kind", ROUTES, ids=lambda kind: kind.__name__)
def test_a_graph_computes_what_the_model_does(kind):
    model = kind().eval()
    graph = after("check_token_wise", model).graph
    for tokens in (1, 2, 31):
        ids = some_ids(tokens, 32)
        with torch.no_grad():
            torch.testing.assert_close(logits(graph, ids), model(ids[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ROUTES, ids=lambda kind: kind.__name__)
def test_a_model_decodes_exactly(kind, own_cache):
    model = kind().eval()
    compiled = kvcompile.compile(model, {"kvcompile": 1, "target": {"kernels": "torch", "segments": "eager"}, "verify": {"tokens": 32}})
    ids, session = some_ids(24, 32), compiled.session()
    found = [session.prefill(ids[:10], logits="all"), *(session.step(token)[None] for token in ids[10:])]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(found), model(ids[None])[0], rtol=1e-5, atol=1e-5)


def test_the_graph_masks_what_was_not_chosen(golden):
    lines = graph_text(trace(UnderMask().eval())).splitlines()
    golden("route_densely", "\n".join(line.split(" #")[0] for line in lines if re.search(r"where|gt_|gt |index|nonzero|reshape", line)))


def test_a_mask_that_is_a_constant_leaves_no_choice():
    (held,) = trace(UnderMask().eval()).graph.find_nodes(op="call_function", target=torch.ops.aten.where.self)
    assert token_dimensions(fake_value(held.args[0])) == (0,), "the mask of tokens is left"


def refusal(mix) -> str:
    class Model(Routed):
        def mix(self, x_TD):
            return mix(self, x_TD)

    with pytest.raises(UnsupportedGraphError) as caught:
        after("check_token_wise", Model().eval())
    return str(caught.value)


def test_a_mean_over_chosen_rows_is_refused_as_a_mixing_of_tokens():
    text = refusal(lambda self, x: x + x[self.gate(x)[:, 0] > 0].mean(0))
    assert "mean works along the token dimension" in text


UNKNOWN = {
    "they pick in a way that is not known": lambda self, x: x[torch.where(self.gate(x).flatten() > 0)[0]],
    "rows of another number are written under a mask": lambda self, x: _written(self, x),
    "they are added up in a way that is not known": lambda self, x: x.T.index_add(1, torch.where(self.gate(x)[:, 0] > 0)[0], x.T).T,
    "their sum has another size": lambda self, x: x[:, :4].index_add(0, torch.where(self.gate(x)[:, 0] > 0)[0], x),
    "counts of them cut something that does not stand in their order": lambda self, x: x.split(
        (self.gate(x) > 0).long().sum(0).tolist(), dim=0
    )[0],
    "parts of an order are put together in a way that is not known": lambda self, x: _reversed(self, x),
}


def _written(self, x):
    out = torch.zeros_like(x)
    out[self.gate(x)[:, 0] > 0] = x[None].expand(2, -1, -1).reshape(-1, WIDTH)
    return out


def _reversed(self, x):
    _, numbers = self.chosen(x)
    _, order = numbers[:, 0].sort(0)
    counts = nn.functional.one_hot(numbers[:, 0], EXPERTS).sum(0).tolist()
    return torch.cat(x[order].split(counts, dim=0)[::-1], dim=0)


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_way_that_is_not_known_is_refused(what):
    text = refusal(UNKNOWN[what])
    assert text.startswith(f"trace: the model's own numbers choose rows, and {what}.")
    assert text.endswith("\n  Choose with a mask and `where`.")
