"""The wheel, installed where nothing of this checkout can be seen, holds every file and compiles a model."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"kvcompile": ROOT / "kvcompile", **{f"kvcompile/{name}": ROOT / name for name in ("passes", "codegen", "runtime", "specs")}}

pytestmark = pytest.mark.slow


def run(command: list[str | Path], cwd: Path) -> str:
    """stdout of a command that must succeed, in an environment without this checkout's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    ran = subprocess.run([str(word) for word in command], cwd=cwd, env=kept, capture_output=True, text=True, check=False, timeout=540)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools' build/ folder remembers files that were deleted since."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    for name in ("kvcompile", "passes", "codegen", "runtime", "specs"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, "./source"]
    run(command, folder)
    [built] = folder.glob("kvcompile-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel, which sees the packages of the running one but not its kvcompile."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:  # a pure wheel is installed by unpacking it; pip would need the network for nothing
        archive.extractall(packages)
    # A .pth line is a path and not a site folder: the .pth files in it, so the editable kvcompile too, are not read.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin" / "python"


def test_the_wheel_holds_every_module_and_data_file_of_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    suffixes = {".py", ".yaml", ".txt", ".h", ".cpp", ".jinja", ".tsv", ".json", ".typed"}
    missing = []
    for name, folder in SOURCES.items():
        for path in folder.rglob("*"):  # rglob does not follow the links of kvcompile/
            inside = path.relative_to(folder)
            linked = name == "kvcompile" and inside.parts[0] in {"passes", "codegen", "runtime", "specs"}
            if path.is_file() and path.suffix in suffixes and not linked and f"{name}/{inside}" not in packed:
                missing.append(f"{name}/{inside}")
    assert not missing, f"not in the wheel; list them in pyproject.toml: {missing}"
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    assert not [name for name in packed if name.startswith("tests/")]


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        f"{name}/{path.parent.relative_to(folder)}".removesuffix("/.").replace("/", ".")
        for name, folder in SOURCES.items()
        for path in folder.rglob("__init__.py")
        if not (name == "kvcompile" and path.relative_to(folder).parts[0] in {"passes", "codegen", "runtime", "specs"})
    }
    assert sorted(listed) == sorted(found)


def test_the_installed_package_carries_its_text_and_specs(python: Path, tmp_path: Path) -> None:
    script = (
        "import json, kvcompile, kvcompile.data, kvcompile.spec\n"
        "print(json.dumps([kvcompile.__file__, len(kvcompile.data.text()), list(kvcompile.spec.bundled_specs())]))"
    )
    place, characters, names = json.loads(run([python, "-c", script], tmp_path))
    assert Path(place).is_relative_to(python.parents[1]), "another kvcompile was imported"
    assert characters > 40_000
    assert names == sorted(path.stem for path in (ROOT / "specs").glob("*.yaml"))
    for name in names:
        script = f"from kvcompile.spec import load_spec; load_spec('builtin:{name}', check_model=False)"
        run([python, "-c", script], tmp_path)


COMPILE = """
import torch, kvcompile
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=512)
model = LlamaForCausalLM(config).eval()
spec = {"kvcompile": 1, "heads": [{"policy": "full"}], "verify": {"tokens": 32}, "target": {"segments": "eager"}}
compiled = kvcompile.compile(model, spec=spec)
tokens = torch.arange(20) % 64
session = compiled.session()
session.prefill(tokens[:-1])
logits = session.step(int(tokens[-1]))
with torch.no_grad():
    expected = model(tokens[None]).logits[0, -1]
assert torch.allclose(logits, expected, atol=1e-5), (logits - expected).abs().max()
print("equal", kvcompile.__file__)
"""


def test_the_installed_package_compiles_a_model_from_another_folder(python: Path, tmp_path: Path) -> None:
    word, place = run([python, "-c", COMPILE], tmp_path).split()
    assert word == "equal"
    assert Path(place).is_relative_to(python.parents[1])


def test_the_installed_command_answers(python: Path, tmp_path: Path) -> None:
    script = "import sys; from kvcompile.cli import main; sys.exit(main(['--version']))"
    expected = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    assert run([python, "-c", script], tmp_path).startswith(f"{expected} 0.")
