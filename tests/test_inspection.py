from __future__ import annotations

import json

import plain_models
import pytest
import torch
import toys
from typer.testing import CliRunner

from kvcompile.cli.app import app
from kvcompile.inspection import inspect_model


def test_what_is_seen_of_a_model():
    found = inspect_model(toys.gemma2())
    assert found.table().text() == (
        "sites  first module              query heads  KV heads  head_dim  scale     sees                 extras\n"
        "-----  ------------------------  -----------  --------  --------  --------  -------------------  ----------\n"
        "0      model.layers.0.self_attn  4            2         16        0.707107  the last 8           soft cap 5\n"
        "1      model.layers.1.self_attn  4            2         16        0.707107  every earlier token  soft cap 5"
    )
    assert found.lines()[:2] == [
        "attention found in: transformers' attention interface",
        "segments: 3, of which 3 are distinct (1x, 1x, 1x)",
    ]
    assert found.refused == ()


def test_what_was_recognised_of_a_plain_module():
    torch.manual_seed(0)
    found = inspect_model(plain_models.AlibiMQA().eval())
    assert found.front_end == "products"
    assert "ALiBi slopes 0.5 to 0.0156" in found.table().text()


def test_learnt_positions_and_short_convolutions_are_told():
    assert "learnt positions for 64 tokens: no session can be longer" in inspect_model(toys.nanogpt(rows=64)).lines()
    assert "short convolutions: 1 of 16 channels, 3 taps" in inspect_model(toys.convolution()).lines()


def test_a_refusal_is_a_result():
    found = inspect_model(toys.running_sum())
    assert found.sites == ()
    assert found.lines()[0] == "refused:"
    assert "check_token_wise: cumsum (toys.py:" in found.lines()[1]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "inspected_models.py").write_text("import toys\ngood = toys.nanogpt\nbad = toys.running_sum\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "inspected_models"


def test_the_command(module):
    result = CliRunner().invoke(app, ["inspect", f"python:{module}:good", "--json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert [site["head_dim"] for site in told["sites"]] == [16, 16]
    assert told["refused"] == []
    result = CliRunner().invoke(app, ["inspect", f"python:{module}:bad"])
    assert result.exit_code == 1
    assert "cumsum works along the token dimension" in result.stdout
