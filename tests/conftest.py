"""What holds for every test: a skip that is not expected fails the run where CI=true; golden texts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest

# before torch loads OpenMP: threads that wait by spinning make toy models 100 times slower when another process is busy
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# `make test-triton` runs these: they need Triton, and each a process of its own
collect_ignore = ["on_triton/test_interpreted.py", "on_triton/test_compiled.py"]

EXPECTED = Path(__file__).with_name("expected_skips.txt")
_skipped: dict[str, str] = {}
Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts anew instead of comparing with them")


@pytest.fixture
def own_cache(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, but for what a compiler made: that is the same for all tests of a run, and takes seconds."""
    folder = tmp_path / "cache"
    folder.mkdir()
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a run's processes share what is above their own folders
        base = base.parent
    for kind in ("launcher", "kernels", "segments"):
        shared = base / "binaries" / kind
        shared.mkdir(parents=True, exist_ok=True)
        (folder / kind).symlink_to(shared)
    monkeypatch.setenv("KVCOMPILE_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """golden(name, text): fails with the difference unless golden/<name> beside the test holds exactly `text`.

    A name without a suffix is that of a .txt file.  `pytest --update-golden` writes the texts anew.
    """

    def check(name: str, text: str) -> None:
        path = request.path.parent / "golden" / (name if "." in name else f"{name}.txt")
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        if kept != text:
            diff = difflib.unified_diff(kept.splitlines(), text.splitlines(), f"golden/{path.name}", "now", lineterm="")
            pytest.fail("\n".join([*diff, "", "If the change is meant: pytest --update-golden, and read the difference in git."]))

    return check


def expected_skips() -> dict[str, str]:
    """Pattern of `ID: WHY`, as `unexpected_skips` tells skips -> why the skip is right.  A line is `PATTERN | REASON`."""
    found = {}
    for line in EXPECTED.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            pattern, _, reason = line.partition(" | ")
            assert reason.strip(), f"{EXPECTED.name}: {line!r} has no reason"
            found[pattern.strip()] = reason.strip()
    return found


def unexpected_skips(skipped: dict[str, str]) -> dict[str, str]:
    patterns = expected_skips()
    return {test: why for test, why in skipped.items() if not any(fnmatch(f"{test}: {why}", pattern) for pattern in patterns)}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped[report.nodeid] = _why(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skipped[report.nodeid] = _why(report)


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("CI") == "true" and unexpected_skips(_skipped) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    unexpected = unexpected_skips(_skipped)
    if unexpected:
        terminalreporter.section(f"skips that {EXPECTED.name} does not list" + (" (CI: failed)" if os.environ.get("CI") == "true" else ""))
        for test, why in sorted(unexpected.items()):
            terminalreporter.line(f"{test}: {why}")
