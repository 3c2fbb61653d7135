"""What the rest of the project sees of a model: its parts, each read when it is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvcompile.ir.errors import ModelError
from kvcompile.ir.spec import ModelSource
from kvcompile.models.cache import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn


class OpenedModel:
    """A model of which nothing is loaded yet.

    source: `model:` of the spec.  name: the path as written.
    progress: called with one line when something takes longer than about a second.
    """

    def __init__(self, source: ModelSource, progress: Progress) -> None:
        self.source = source
        self.name = source.path
        self.progress = progress

    # Every kind answers these.

    @property
    def config(self) -> Any:
        """The transformers config with its dtype set; None for a module of the user's own that has none."""
        raise AssertionError

    @property
    def hash(self) -> str:
        """SHA-256 of what the weights and the config are; equal on every machine."""
        raise AssertionError

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The model without its weights, in eval mode; the caller may be inside a FakeTensorMode or on the meta device."""
        raise AssertionError

    def load(self) -> nn.Module:
        """The model with its weights in `dtype`, on the CPU, in eval mode."""
        raise AssertionError

    def tokenizer(self) -> Any:
        """The tokenizer, None if the model comes without one."""
        raise AssertionError

    @property
    def dtype(self) -> torch.dtype:
        """What the spec asks for, else the config's own dtype, else float32."""
        found: torch.dtype = self.config.dtype
        return found

    @cached_property
    def has_chat_template(self) -> bool:
        return getattr(self.tokenizer(), "chat_template", None) is not None

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens after which generation ends: all that the model's config, generation config or tokenizer names; may be empty."""
        own, tokenizers = (getattr(holder, "eos_token_id", None) for holder in (self.config, self.tokenizer()))
        return token_ids(own, self.generation_stop, tokenizers)

    @property
    def generation_stop(self) -> Any:
        """eos_token_id of the generation config: an int, a list of them, or None."""
        return None

    def error(self, what: str, mend: str) -> ModelError:
        return ModelError.at(self.source.where, what, mend)


def token_ids(*named: Any) -> tuple[int, ...]:
    """Ids from values as configs hold them (None, an int, a list of them): sorted, each once."""
    flat = [token for value in named for token in (value if isinstance(value, list | tuple) else [value])]
    return tuple(sorted({int(token) for token in flat if token is not None}))


def frozen(model: Any) -> nn.Module:
    module: nn.Module = model.eval().requires_grad_(False)
    return module


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' warnings off, and its progress bars too unless a person is looking."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns after every fork
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
