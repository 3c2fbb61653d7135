"""Who may import whom, read from the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where each layer stands, and the name that it is imported by.
LAYERS = {
    "kvcompile.ir": ROOT / "kvcompile" / "ir",
    "kvcompile.spec": ROOT / "kvcompile" / "spec",
    "kvcompile.models": ROOT / "kvcompile" / "models",
    "kvcompile.passes": ROOT / "passes",
    "kvcompile.codegen": ROOT / "codegen",
    "kvcompile.runtime": ROOT / "runtime",
}
# layer -> what it may import of this project, and from outside beside the standard library
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "kvcompile.ir": ({"kvcompile.ir"}, {"torch", "numpy", "safetensors"}),
    "kvcompile.runtime": ({"kvcompile.ir", "kvcompile.runtime"}, {"torch", "numpy", "safetensors"}),
    "kvcompile.passes": ({"kvcompile.ir", "kvcompile.passes"}, {"torch", "numpy", "networkx", "transformers"}),
    "kvcompile.codegen": ({"kvcompile.ir", "kvcompile.codegen"}, {"torch", "numpy", "jinja2"}),
    "kvcompile.spec": (
        {"kvcompile.ir", "kvcompile.spec", "kvcompile.models.header", "kvcompile.specs", "kvcompile.__version__"},
        {"pydantic", "pydantic_core", "yaml"},
    ),
    "kvcompile.models": (
        {"kvcompile.ir", "kvcompile.models"},
        {"torch", "transformers", "huggingface_hub"},
    ),
}
# single files that may import more
ALSO = {("kvcompile.ir", "graphs.py"): {"networkx"}}


def imports(path: Path, package: str) -> set[str]:
    """Every module that a file imports anywhere, in functions and under TYPE_CHECKING too, by its full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (parent, node.module or "") if part)
            inner = [f"{module}.{alias.name}" for alias in node.names]
            # `from kvcompile import runtime` names a layer; `from kvcompile.ir.errors import Problem` a thing in a module
            found.update(inner if module in {"kvcompile", *LAYERS} else [module])
    return found


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


FILES = [(layer, path) for layer, folder in LAYERS.items() for path in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize(("layer", "path"), FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES])
def test_a_layer_imports_only_what_it_may(layer: str, path: Path) -> None:
    ours, others = ALLOWED[layer]
    others = others | ALSO.get((layer, path.name), set())
    wrong = []
    for name in sorted(imports(path, layer)):
        top = name.partition(".")[0]
        if top == "kvcompile":
            fits = any(below(name, package) for package in ours)
        else:
            fits = top in others or top in sys.stdlib_module_names
        if not fits:
            wrong.append(name)
    assert not wrong, f"{path.relative_to(ROOT)} ({layer}) imports {', '.join(wrong)}"


def test_every_layer_has_files() -> None:
    assert {layer for layer, _ in FILES} == set(LAYERS)


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in sys.modules after a statement, in an interpreter of its own."""
    script = f"{statement}\nimport sys\nprint(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ran.stdout.splitlines()[-1].split())


def test_importing_kvcompile_imports_nothing_heavy() -> None:
    assert not loaded_by("import kvcompile") & {"torch", "numpy", "transformers", "yaml", "pydantic", "typer", "rich"}


def test_reading_a_spec_imports_no_torch() -> None:
    loaded = loaded_by("import kvcompile\nkvcompile.load_spec({'kvcompile': 1, 'heads': [{'policy': 'full'}]})")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "numpy", "transformers"}


def test_the_runtime_needs_neither_the_spec_reader_nor_transformers() -> None:
    loaded = loaded_by("import kvcompile.runtime.model, kvcompile.runtime.session")
    assert "torch" in loaded
    assert not loaded & {"transformers", "pydantic", "yaml", "typer", "rich", "jinja2"}


def test_every_public_name_can_be_imported() -> None:
    import kvcompile

    for name in kvcompile.__all__:
        assert getattr(kvcompile, name) is not None
    with pytest.raises(AttributeError, match="module 'kvcompile' has no attribute 'nothing'"):
        _ = kvcompile.nothing
