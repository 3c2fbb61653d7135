"""A family works because its graph can be traced, not because someone wrote its name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("kvcompile", "passes", "codegen", "runtime")
THE_TABLE = ROOT / "kvcompile" / "sweep" / "overrides.py"
# words of ours that somebody gave to a model type: our own package, and English
OURS = {"codegen", "bit", "beam", "git"}


def test_no_model_type_is_named_outside_the_sweeps_table():
    from transformers import CONFIG_MAPPING

    names = {name.lower() for name in CONFIG_MAPPING} - OURS
    assert len(names) > 300
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in (".py", ".h", ".cpp", ".jinja") or path == THE_TABLE or any(part.is_symlink() for part in path.parents):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                named = [word for word in re.findall(r"[A-Za-z0-9_-]+", line) if word.lower() in names]
                found += [f"{path.relative_to(ROOT)}:{number}: {word}" for word in named]
    assert found == []
