"""Every kernel compiles for each GPU without spilling a register, at the cost written in golden/; no GPU is needed.

`make test-triton PYTEST_ARGS=--update-golden` writes the costs of the installed Triton anew.  Another Triton than those that
golden/ knows is held to "no spill" only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from on_triton.cases import COMPILED

HERE = Path(__file__).parent
ARCHES = (80, 90, 100)


def compiled(arch: int, name: str, folder: Path) -> dict:
    command = [sys.executable, HERE / "compile_offline.py", str(arch), json.dumps(asdict(COMPILED[name])), folder]
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(command, env={**kept, "TRITON_CACHE_DIR": str(folder)}, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("arch", ARCHES)
def test_no_register_spills_and_the_cost_is_the_golden_one(arch: int, name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    result = compiled(arch, name, tmp_path)
    version, kernels = result["triton"], result["kernels"]
    for kernel, cost in kernels.items():
        assert cost["spilled_bytes"] == cost["stack_bytes"] == 0, (kernel, cost)
    assert kernels["attend_spans"]["asynchronous_copies"] > 0, "the loads of the next tile do not overlap this one"
    path = HERE / "golden" / f"sm_{arch}.json"
    golden = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if request.config.getoption("--update-golden"):
        golden.setdefault(version, {})[name] = kernels
        path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    elif version in golden:
        assert kernels == golden[version].get(name)


@pytest.mark.parametrize("arch", ARCHES)
def test_golden_costs_have_no_orphans(arch: int) -> None:
    golden = json.loads((HERE / "golden" / f"sm_{arch}.json").read_text(encoding="utf-8"))
    for version, costs in golden.items():
        assert set(costs) == set(COMPILED), version
