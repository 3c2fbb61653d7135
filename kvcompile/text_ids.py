"""Token ids of the text that the package carries, for any model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompile.data import text


def text_ids(tokens: int, vocabulary: int, tokenizer: Any = None) -> Tensor:
    """The first `tokens` ids [tokens] int64 of the carried text, its beginning-of-text token included.

    Without a tokenizer the text's bytes are the ids, folded into the vocabulary: real statistics, no meaning.
    """
    content = text()[: tokens * 12]
    ids = list(content.encode()) if tokenizer is None else tokenizer(content)["input_ids"]
    if len(ids) < tokens:
        ids = (ids * (tokens // len(ids) + 1))[:tokens]
    return torch.tensor(ids[:tokens], dtype=torch.int64) % vocabulary
