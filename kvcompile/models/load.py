"""Opens the model that a spec names: its config, its skeleton, its weights, its tokenizer.

`open_model` only resolves the path; each part is read when it is asked for, and torch and transformers are imported then.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.ir.spec import ModelSource
from kvcompile.models import cache, gguf, hub
from kvcompile.models.cache import Progress
from kvcompile.models.exported import ExportedModel
from kvcompile.models.factory import PythonModel
from kvcompile.models.header import ResolvedModel, resolve_path
from kvcompile.models.opened import OpenedModel, first_line, frozen, quiet, token_ids

if TYPE_CHECKING:
    import torch
    from torch import nn

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt"}


class _FolderModel(OpenedModel):
    """A folder as `save_pretrained` writes it."""

    def __init__(self, source: ModelSource, progress: Progress, folder: Path) -> None:
        super().__init__(source, progress)
        self._folder = folder

    @contextmanager
    def folder(self, *, weights: bool) -> Iterator[Path]:
        """The folder, there for as long as the context lasts.  weights False: only config and tokenizer are needed."""
        yield self._folder

    @cached_property
    def config(self) -> Any:
        import torch

        config = self._own_config()
        named = self.source.dtype or getattr(config, "dtype", None) or torch.float32
        config.dtype = getattr(torch, named) if isinstance(named, str) else named
        return config

    def _own_config(self) -> Any:
        from transformers import AutoConfig

        with self.folder(weights=False) as folder:
            if not (folder / "config.json").is_file():
                raise self.error(f"{folder} holds no config.json.", "Name a folder that `save_pretrained` wrote, or a .gguf file.")
            try:
                with quiet():
                    return AutoConfig.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise self.error(
                    f"{folder / 'config.json'} cannot be read: {first_line(error)}",
                    "Mend the file, or install the transformers release that knows this model.",
                ) from error

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256()
        with self.folder(weights=True) as folder:
            for path in sorted(folder.iterdir()):
                if path.name == "config.json" or path.suffix in _WEIGHT_SUFFIXES:
                    digest.update(f"{path.name}\0{cache.checksum(path)}\n".encode())
        return digest.hexdigest()

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        return _skeleton(self.config, dtype or self.dtype)

    def load(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.config)  # refuses a broken config with its own message
        with self.folder(weights=True) as folder:
            if not any(path.suffix in _WEIGHT_SUFFIXES for path in folder.iterdir()):
                raise self.error(f"{folder} holds no weights.", "Put model.safetensors (or its shards) beside config.json.")
            try:
                with quiet():
                    model, info = AutoModelForCausalLM.from_pretrained(
                        folder, config=config, dtype=self.dtype, local_files_only=True, output_loading_info=True
                    )
            except Exception as error:  # safetensors, pickle, zip, transformers: each has its own kinds of error
                raise self.error(
                    f"the weights in {folder} cannot be read: {first_line(error)}", "Copy or download the files again."
                ) from error
        # transformers gives random values to whatever it does not find, with no more than a warning
        lost = sorted(str(key) for key in info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise self.error(
                f"the weights in {folder} do not fit config.json: {', '.join(lost[:3])}{more} missing or of another shape.",
                "Put the weights and the config of one and the same model into the folder.",
            )
        return frozen(model)

    @property
    def generation_stop(self) -> Any:
        """From generation_config.json, where chat models name the tokens that end a turn."""
        with self.folder(weights=False) as folder:
            path = folder / "generation_config.json"
            if not path.is_file():
                return None
            try:
                named = json.loads(path.read_text(encoding="utf-8"))["eos_token_id"]
                token_ids(named)
            except KeyError:
                return None
            except (OSError, ValueError, TypeError) as error:
                raise self.error(f"{path} cannot be read: {first_line(error)}", "Mend the file, or take it away.") from error
        return named

    def tokenizer(self) -> Any:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with self.folder(weights=False) as folder:
            if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
                return None
            try:
                with quiet():
                    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except Exception as error:  # the Rust tokenizer raises plain Exception
                raise self.error(
                    f"the tokenizer in {folder} cannot be read: {first_line(error)}", "Copy the tokenizer's files again."
                ) from error


class _HubModel(_FolderModel):
    """A repository of the Hugging Face hub: small files first, weights only when they are wanted."""

    @contextmanager
    def folder(self, *, weights: bool) -> Iterator[Path]:
        with quiet():
            yield hub.snapshot(self.name, weights=weights, where=self.source.where, progress=self.progress)


class _GgufModel(_FolderModel):
    """A GGUF file; its weights are converted once and then read from the cache."""

    def __init__(self, source: ModelSource, progress: Progress, file: Path) -> None:
        super().__init__(source, progress, file.parent)
        self.file = file

    @contextmanager
    def folder(self, *, weights: bool) -> Iterator[Path]:
        with quiet(), gguf.converted(self.file, where=self.source.where, progress=self.progress) as folder:
            yield folder

    def _own_config(self) -> Any:
        if gguf.is_converted(self.file):
            return super()._own_config()
        with quiet():  # a plan needs no weights: do not convert for it
            config = gguf.read_config(self.file, where=self.source.where)
            config.dtype = gguf.copy_dtype(config)
        return config

    @cached_property
    def hash(self) -> str:
        return cache.checksum(self.file)


def open_model(source: ModelSource, progress: Progress = cache.silent) -> OpenedModel:
    """The model that `model:` names.  Raises ModelError where the path cannot be resolved."""
    found: ResolvedModel = resolve_path(source.path, source.folder)
    match found.kind:
        case "folder":
            return _FolderModel(source, progress, Path(found.location))
        case "gguf":
            return _GgufModel(source, progress, Path(found.location))
        case "hub":
            return _HubModel(source, progress, Path(found.location))
        case "exported":
            return ExportedModel(source, progress, Path(found.location))
        case "python":
            return PythonModel(source, progress, found.location)


def _skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with quiet(), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        model.tie_weights()  # no_init_weights leaves that out too
    return frozen(model)
