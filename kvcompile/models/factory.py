"""`python:module:factory`: a model that the user's own code makes."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.ir.spec import ModelSource
from kvcompile.models.cache import Progress
from kvcompile.models.opened import OpenedModel, first_line, frozen

if TYPE_CHECKING:
    import torch
    from torch import nn


class PythonModel(OpenedModel):
    """`python:module:factory`; the factory gives a module, or (module, tokenizer)."""

    def __init__(self, source: ModelSource, progress: Progress, location: str) -> None:
        super().__init__(source, progress)
        self.location = location

    def _make(self) -> tuple[nn.Module, Any]:
        from torch import nn

        made = self._factory()
        module, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(module, nn.Module):
            raise self.error(f"{self.location} gave {type(made).__name__}.", "Let it return a torch.nn.Module, or (module, tokenizer).")
        return module, tokenizer

    def _factory(self) -> Any:
        module_name, _, factory_name = self.location.partition(":")
        place = str(Path(self.source.folder).resolve())  # a module beside the spec is found
        sys.path.insert(0, place)
        try:
            factory: Callable[[], Any] = getattr(import_module(module_name), factory_name)
        except ImportError as error:
            raise self.error(
                f"module {module_name} cannot be imported: {first_line(error)}", "Install it, or put it beside the spec."
            ) from error
        except AttributeError as error:
            raise self.error(f"module {module_name} has no {factory_name!r}.", "Write python:MODULE:FACTORY.") from error
        finally:
            sys.path.remove(place)
        return factory()

    @cached_property
    def _made(self) -> tuple[nn.Module, Any]:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():  # whoever builds a skeleton may ask for the dtype first
            module, tokenizer = self._make()
            return frozen(module if self._wanted is None else module.to(self._wanted)), tokenizer

    @property
    def _wanted(self) -> torch.dtype | None:
        import torch

        return None if self.source.dtype is None else getattr(torch, self.source.dtype)

    @property
    def config(self) -> Any:
        return getattr(self._made[0], "config", None)

    @property
    def generation_stop(self) -> Any:
        return getattr(getattr(self._made[0], "generation_config", None), "eos_token_id", None)

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return next((value.dtype for value in self._made[0].parameters() if value.is_floating_point()), torch.float32)

    @cached_property
    def hash(self) -> str:
        """Of the module's printed form and its tensors.  Code is not seen: the traced graph is hashed by whoever traces."""
        digest = hashlib.sha256(f"{type(self._made[0]).__qualname__}\0{self._made[0]}".encode())
        for name, value in sorted(self._made[0].state_dict().items()):
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(_bytes_dtype()).numpy())
        return digest.hexdigest()

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        wanted = dtype or self._wanted
        module = frozen(self._make()[0])
        return module if wanted is None else _cast(module, wanted)

    def load(self) -> nn.Module:
        return self._made[0]

    def tokenizer(self) -> Any:
        return self._made[1]


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module.to(dtype)` that keeps tied weights tied and also works on fake tensors, which `Module.to` cannot swap."""
    from torch import nn

    cast: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and value.is_floating_point() and value.dtype != dtype:
                part._parameters[name] = cast.setdefault(id(value), nn.Parameter(value.to(dtype), requires_grad=False))
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)
    return module


def _bytes_dtype() -> torch.dtype:
    import torch

    return torch.uint8
