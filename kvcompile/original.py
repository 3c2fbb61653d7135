"""What a compiled model remembers of the module that it was made from, beside the weights that its program holds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvcompile.passes.huggingface import is_huggingface


@dataclass(frozen=True)
class OriginalFacts:
    """config, generation_config: copies of transformers' own; None for another module.  parameters: how many numbers they are."""

    config: Any
    generation_config: Any
    dtype: torch.dtype
    parameters: int

    @classmethod
    def of(cls, module: nn.Module) -> OriginalFacts:
        weights = list(module.parameters())
        floating = [tensor.dtype for tensor in (*weights, *module.buffers()) if tensor.is_floating_point()]
        known = is_huggingface(module)
        return cls(
            config=copy.deepcopy(module.config) if known else None,
            generation_config=copy.deepcopy(getattr(module, "generation_config", None)) if known else None,
            dtype=floating[0] if floating else torch.float32,
            parameters=sum(weight.numel() for weight in weights),
        )
