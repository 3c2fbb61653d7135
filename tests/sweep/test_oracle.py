"""The float64 meaning of a policy for a whole traced model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvcompile.compiler import run_passes
from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.policy import All, SinkRecent
from kvcompile.sweep.oracle import Oracle

IDS = torch.arange(24) % 7 + 3


class Attending(nn.Module):
    """One attention of two query heads over one KV head; its first half of a key is rotated by the position."""

    def __init__(self, window: int = 0, slopes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, 16)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 8)
        self.window = window

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        tokens = ids.shape[1]
        q = self.query(x).view(1, tokens, 2, 8).transpose(1, 2)
        k = self.key(x).view(1, tokens, 1, 8).transpose(1, 2)
        angle = torch.arange(tokens, device=ids.device)[:, None] * torch.tensor([1.0, 0.1])
        q, k = (_half_rotated(each, angle.cos(), angle.sin()) for each in (q, k))
        place = torch.arange(tokens, device=ids.device)
        hidden = place[None] > place[:, None]
        if self.window:
            hidden = hidden | (place[None] <= place[:, None] - self.window)
        scores = (q @ k.transpose(2, 3) * 0.35).masked_fill(hidden, float("-inf"))
        out = torch.softmax(scores, -1) @ k.expand(1, 2, tokens, 8)
        return x + out.transpose(1, 2).reshape(1, tokens, 16)


def _half_rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x[..., :2], x[..., 2:4]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 4:]], -1)


def _sited(model: nn.Module) -> torch.fx.GraphModule:
    return run_passes({"kvcompile": 1}, module=model.eval(), stop_after="check_token_wise").graph


@pytest.mark.parametrize("window", [0, 5])
def test_with_every_token_it_is_the_model_in_float64(window: int) -> None:
    model = Attending(window)
    graph = _sited(model)
    assert len(graph.graph.find_nodes(op="call_function", target=ATTEND)) == 1
    with torch.no_grad():
        expected = model.double()(IDS[None])[0]
    found = Oracle(graph, All()).logits(IDS)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the angles were float32 in the model


def test_sink_and_recent_tokens_are_all_that_a_head_sees() -> None:
    oracle = Oracle(_sited(Attending()), SinkRecent(2, 4))
    other = IDS.clone()
    other[5] = 20
    changed = (oracle.logits(IDS) - oracle.logits(other)).abs().amax(-1) > 1e-9
    assert changed.tolist() == [place in range(5, 9) for place in range(len(IDS))]
    other = IDS.clone()
    other[1] = 20
    changed = (oracle.logits(IDS) - oracle.logits(other)).abs().amax(-1) > 1e-9
    assert changed.tolist() == [place >= 1 for place in range(len(IDS))], "a sink is seen by all that follow"


def test_a_window_of_the_models_own_stands_for_the_policy() -> None:
    graph = _sited(Attending(window=5))
    torch.testing.assert_close(Oracle(graph, SinkRecent(3, 9)).logits(IDS), Oracle(graph, All()).logits(IDS), rtol=0, atol=0)


def test_the_rotated_share_of_a_key_is_counted() -> None:
    assert Oracle(_sited(Attending()), All()).rotated_share(IDS) == [0.5]
