"""GGUF files: their weights are dequantised once, and read from the cache as safetensors from then on.

Left packed, transformers unpacks a weight in every call, which makes a CPU step twenty times slower; dequantising at every load
costs 15 to 20 s for 135M parameters and reading config and tokenizer from the file 4 s each.  The copy loads in 1 to 2 s.

The copy is float32 while that stays below LARGEST_FLOAT32: a dequantised value (4-bit integer times 16-bit scale plus 16-bit
minimum) is exact there, so a float32 load has the file's own values and a bfloat16 load rounds each of them once.  Above, the copy
is bfloat16: half the disk, memory and load time for models that are run in bfloat16 anyway.  Either way one copy serves both
dtypes, and rounding a float32 load to bfloat16 gives exactly the bfloat16 load.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvcompile.ir.errors import ModelError
from kvcompile.models import cache
from kvcompile.models.cache import Progress

LARGEST_FLOAT32 = 1_000_000_000  # bytes
_FORMAT = 1  # of the copy; raise it when `_convert` writes something else


def key(file: Path) -> str:
    """The copy's name in the cache: the file's content, who converted it, and how."""
    import transformers

    return f"gguf-{cache.checksum(file)[:24]}-transformers{transformers.__version__.split('.')[0]}-{_FORMAT}"


@contextlib.contextmanager
def converted(file: Path, *, where: str, progress: Progress) -> Iterator[Path]:
    """The folder with the dequantised copy, made if it is not there, in place while the context lasts."""

    def build(folder: Path) -> None:
        progress(f"dequantising {file.name} into the cache (once; about 20 s for 100 MB)")
        _convert(file, folder, where)

    with cache.use(key(file), build, what=f"the dequantised copy of {file.name}", progress=progress) as folder:
        yield folder


def is_converted(file: Path) -> bool:
    return cache.has(key(file))


def read_config(file: Path, *, where: str) -> Any:
    """The config from the GGUF header, without converting anything (4 s)."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:
        raise unreadable(file, where, error) from error


def copy_dtype(config: Any) -> str:
    """The dtype of the copy; parameters are counted on the meta device, tied ones once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return "float32" if 4 * sum(value.numel() for value in skeleton.parameters()) < LARGEST_FLOAT32 else "bfloat16"


def _convert(file: Path, folder: Path, where: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    dtype = getattr(torch, copy_dtype(read_config(file, where=where)))
    # transformers' GGUF reader draws a bar that no setting of its own turns off
    bar = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bar:
            model: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype, local_files_only=True
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:
        raise unreadable(file, where, error) from error
    # what is left of the quantisation makes save_pretrained write a model that loads as a quantised one
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if name in vars(holder):
            delattr(holder, name)
    _name_special_tokens(tokenizer, model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _name_special_tokens(tokenizer: Any, config: Any) -> None:
    """First, last and padding token are those of the file's header, which `config` has from it.

    transformers 5.17 makes the first token the last one too, and then every answer would end at the wrong word.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        token = getattr(config, f"{name}_id", None)
        if isinstance(token, int) and getattr(tokenizer, f"{name}_id") != token:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))


def unreadable(file: Path, where: str, error: Exception) -> ModelError:
    if isinstance(error, ImportError):
        return ModelError.at(
            where, f"{file.name} needs a package that is missing: {error.name or error}.", "pip install 'kvcompile[compile]'"
        )
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError.at(
        where,
        f"{file} cannot be read as GGUF: {line}",
        "Copy the file again, or name a folder that `save_pretrained` wrote (transformers reads some architectures only so).",
    )
