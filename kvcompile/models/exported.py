"""`model.pt2`: a program that torch.export saved; and exported programs as modules."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.ir.spec import ModelSource
from kvcompile.models import cache
from kvcompile.models.cache import Progress
from kvcompile.models.opened import OpenedModel, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram


@contextmanager
def without_logs() -> Iterator[None]:
    """torch.export logs a traceback of every way in which it tried to read a file."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def as_module(program: ExportedProgram) -> nn.Module:
    """The module that an exported program is, in eval mode, its weights not trained.

    Guards on the inputs are left out: they hold the numbers of tokens that the program was exported with.
    """
    module: nn.Module = program.module(check_guards=False)
    for part in module.modules():
        part.training = False  # an exported module has no eval(): what it does was decided when it was exported
    return module.requires_grad_(False)


class ExportedModel(OpenedModel):
    """A .pt2 file.  It holds a graph with its weights, so nothing is built without them."""

    def __init__(self, source: ModelSource, progress: Progress, file: Path) -> None:
        super().__init__(source, progress)
        self.file = file

    @property
    def config(self) -> Any:
        return None

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return next((value.dtype for value in self._module.parameters() if value.is_floating_point()), torch.float32)

    @cached_property
    def hash(self) -> str:
        return cache.checksum(self.file)

    @cached_property
    def _module(self) -> nn.Module:
        import torch
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        if self.source.dtype is not None:
            raise self.error("a .pt2 file has a dtype already.", "Leave `dtype` out, and export the model in the dtype that you want.")
        try:
            with unset_fake_temporarily(), without_logs():
                return as_module(torch.export.load(self.file))
        except Exception as error:  # zip, JSON, torch: each has its own kinds of error
            what = f"{self.file} cannot be read as a program of torch.export: {first_line(error)}"
            raise self.error(what, "Save it again with torch.export.save.") from error

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        return self._module

    def load(self) -> nn.Module:
        return self._module

    def tokenizer(self) -> Any:
        return None
