"""The text that the package carries: every compile is verified on it, and examples use it as a long prompt."""

from __future__ import annotations

from importlib.resources import files


def text() -> str:
    """About 43 KB of English prose, pure ASCII, wrapped at 100 columns, paragraphs separated by an empty line."""
    return (files(__name__) / "text.txt").read_text(encoding="ascii")
