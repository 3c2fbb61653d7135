"""Kernel requests for CUDA devices become Triton source text; Triton itself is not imported here."""

from kvcompile.codegen.triton.decode import render_decode, sources

__all__ = ["render_decode", "sources"]
