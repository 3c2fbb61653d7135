"""The one table of model types: fields that a tiny configuration needs and its class does not tell, each with its reason."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, tuple[dict[str, Any], str]] = {}
