"""What tells one module's weights from another's."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


def weights_hash(module: nn.Module) -> str:
    """Of the class, and of the name, dtype, shape and bytes of every parameter and buffer: 64 hexadecimal digits."""
    named = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(_digest, named.values()))
    whole = hashlib.sha256(type(module).__qualname__.encode())
    for name, digest in sorted(zip(named, digests, strict=True)):
        whole.update(f"\0{name}\0{digest}".encode())
    return whole.hexdigest()


def _digest(weight: Tensor) -> str:
    digest = hashlib.sha256(f"{weight.dtype}{tuple(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
