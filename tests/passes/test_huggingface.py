"""The Hugging Face front end: every fact reaches the node, every unknown is refused by name."""

from __future__ import annotations

import pytest
import torch
import toys
from torch import nn

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.show import node_text
from kvcompile.passes import huggingface
from kvcompile.passes.huggingface import MaskRecorder, attention_as_nodes, foreign_mask, is_huggingface
from kvcompile.passes.trace import trace


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "gemma3"])
def test_each_attention_is_one_node_with_its_facts(golden, name):
    model = toys.llama(layers=1) if name == "llama" else getattr(toys, name)()
    nodes = trace(model).graph.find_nodes(op="call_function", target=ATTEND)
    golden(f"huggingface_{name}", "\n".join(node_text(node).split("%", 1)[0] + _facts(node) for node in nodes))


def _facts(node: torch.fx.Node) -> str:
    sinks, _, scale, window, soft_cap = node.args[3:]
    return f"sinks {sinks}, scale {scale:.6g}, window {window}, soft cap {soft_cap}"


def test_the_models_own_attention_comes_back_even_after_a_failure():
    model = toys.llama(layers=1)
    before = model.config._attn_implementation
    with attention_as_nodes(model):
        assert model.config._attn_implementation == huggingface.NAME
    with pytest.raises(ZeroDivisionError), attention_as_nodes(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


def test_only_models_that_dispatch_by_name_are_taken():
    assert is_huggingface(toys.llama(layers=1))
    assert not is_huggingface(toys.planted())


def refusal(**changes: object) -> str:
    module = nn.Module()
    module.is_causal = changes.pop("module_is_causal", True)
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UnsupportedGraphError) as caught:
        huggingface._attention(module, query, query, query, **{"attention_mask": None, **changes})
    return str(caught.value)


def test_an_attention_mask_is_refused():
    assert refusal(attention_mask=torch.zeros(3, 3)) == (
        "trace: Module passes an attention mask of its own.\n  Models whose mask is not causal or sliding are not supported."
    )


@pytest.mark.parametrize("changes", [{"is_causal": False}, {"module_is_causal": False}])
def test_attention_that_is_not_causal_is_refused(changes):
    assert refusal(**changes) == "trace: Module attends without a causal mask.\n  Only causal language models can be compiled."


def test_an_unknown_keyword_tensor_is_refused_by_name():
    assert refusal(alibi_slopes=torch.zeros(2)) == (
        "trace: Module passes the tensor 'alibi_slopes' to its attention, which kvcompile does not know.\n"
        "  Its meaning would be lost; the model cannot be compiled yet."
    )


@pytest.mark.parametrize("name", ["position_ids", "cache_position"])
def test_keyword_tensors_that_repeat_positions_are_let_through(name):
    query = torch.zeros(1, 2, 3, 4)
    out, weights = huggingface._attention(nn.Module(), query, query, query, None, **{name: torch.arange(3)})
    assert (out.shape, weights) == ((1, 3, 2, 4), None)


def test_a_model_with_an_unknown_keyword_tensor_is_refused():
    model = toys.llama(layers=1)
    attention = model.model.layers[0].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **keywords: plain(*args, **keywords, key_bias=torch.zeros(1))
    with pytest.raises(UnsupportedGraphError, match="LlamaAttention passes the tensor 'key_bias' to its attention"):
        trace(model)


def test_a_padded_batch_is_refused():
    model = toys.llama(layers=1)
    ids, mask = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(UnsupportedGraphError) as caught, attention_as_nodes(model):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert str(caught.value) == (
        "trace: the model was called with a padded batch (an attention_mask).\n  Give each sequence its own session instead of padding."
    )


def test_another_kind_of_mask_is_refused_by_its_name():
    from transformers.masking_utils import and_masks, bidirectional_mask_function, causal_mask_function

    with pytest.raises(UnsupportedGraphError) as caught:
        MaskRecorder()(mask_function=and_masks(bidirectional_mask_function, causal_mask_function))
    assert str(caught.value) == (
        "trace: the model's attention mask uses bidirectional_mask_function.\n  Built: causal, sliding-window and chunked masks."
    )


def test_foreign_masks_are_found_however_deep():
    from transformers.masking_utils import and_masks, blockwise_overlay, causal_mask_function, or_masks, sliding_window_overlay

    sliding = and_masks(sliding_window_overlay(4), causal_mask_function)
    assert foreign_mask(causal_mask_function) == foreign_mask(sliding) == ""
    image = or_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 3, dtype=torch.int64)))
    assert foreign_mask(and_masks(sliding_window_overlay(4), image)) == "blockwise_overlay"


def test_chunks_of_masks_are_recorded_and_marked():
    from transformers.masking_utils import and_masks, causal_mask_function, chunked_overlay

    recorder = MaskRecorder()
    marker = recorder(mask_function=and_masks(chunked_overlay(4, torch.zeros(1, dtype=torch.int64)), causal_mask_function))
    assert recorder.windows == {4}
    assert marker.shape == (1, 5, 1, 0)


def test_windows_of_sliding_masks_are_recorded():
    from transformers.masking_utils import sliding_window_causal_mask_function

    recorder = MaskRecorder()
    recorder(mask_function=sliding_window_causal_mask_function(12))
    assert recorder.windows == {12}
