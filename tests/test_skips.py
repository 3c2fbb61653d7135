"""A test that is skipped without being listed fails the run in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


BY_ID, BY_REASON, ANOTHER = "test_it.py::test_gpu*", "*: Skipped: no G*", "*: Skipped: no compiler*"


CASES = [("", "true", 1), (ANOTHER, "true", 1), (BY_ID, "true", 0), (BY_REASON, "true", 0), ("", "", 0)]


@pytest.mark.parametrize(("listed", "ci", "code"), CASES)
def test_an_unlisted_skip_fails_in_ci_only(tmp_path: Path, listed: str, ci: str, code: int) -> None:
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "expected_skips.txt").write_text(f"{listed} | no GPU here\n" if listed else "")
    tests = "import pytest\ndef test_gpu_kernel():\n    pytest.skip('no GPU')\ndef test_fine():\n    assert True\n"
    (tmp_path / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "CI": ci})
    assert ran.returncode == code, ran.stdout
    assert ("test_it.py::test_gpu_kernel: Skipped: no GPU" in ran.stdout) is (listed not in (BY_ID, BY_REASON))
