"""The families of a sweep, each checked in a worker process: one that hangs or dies is replaced, and its family says so.

1. A worker serves many families: importing torch and transformers takes longer than most of them.
2. A family's time begins when its worker is ready.
3. Results come in the order of the families that were asked for, whatever the order in which they end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from kvcompile.ir.errors import KvcompileError, ModelError
from kvcompile.sweep.family import FamilyResult, check_family
from kvcompile.sweep.tiny import causal_model_types

Check = Callable[[str], FamilyResult]  # at the top level of a module: workers import it
OnResult = Callable[[FamilyResult, int, int], None]  # the result, how many are done, how many there are

START_TIMEOUT_S = 300.0  # of a worker that imports; a busy machine takes a minute


def families(asked: Sequence[str]) -> list[str]:
    """The model types asked for, each once and sorted; all of the installed transformers for none.  Raises ModelError."""
    known = causal_model_types()
    for name in asked:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            mend = f"Did you mean {near[0]}?" if near else f"Write one of the {len(known)}: {', '.join(known)}."
            raise ModelError.at(name, "transformers has no causal language model of this type.", mend)
    return sorted(set(asked)) or known


def sweep(
    model_types: Sequence[str],
    *,
    jobs: int = 1,
    timeout_s: float = 600.0,
    on_result: OnResult = lambda result, done, total: None,
    check: Check = check_family,
    record: Path | None = None,
) -> list[FamilyResult]:
    """One result a model type, in their order.

    jobs: workers at a time.  timeout_s: of one family; beyond it the result is `crashed`.  record: a file that gets each result
    as it comes; what stands there already, of the same code and versions, is not checked again.
    """
    known = _Record(record)
    results = {name: known.results[name] for name in model_types if name in known.results}
    waiting = [name for name in model_types if name not in results]
    total = len(model_types)

    def finish(result: FamilyResult) -> None:
        results[result.model_type] = result
        known.add(result)
        on_result(result, len(results), total)

    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker.start(check, threads=max(1, (os.cpu_count() or 1) // jobs)))
            patience_s = max(0.0, min(worker.deadline for worker in workers) - time.monotonic())
            heard = wait([worker.connection for worker in workers], patience_s)
            for worker in list(workers):
                alive = True
                if worker.connection in heard:
                    alive = _hear(worker, waiting, timeout_s, finish)
                elif time.monotonic() >= worker.deadline:
                    alive = False
                    if worker.family is None:
                        raise _not_ready(worker)
                    finish(_lost(worker, timeout_s, f"it took longer than {timeout_s:.0f} s"))
                if not alive or worker.idle:
                    worker.stop()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.stop()
    return [results[name] for name in model_types]


@dataclass
class _Worker:
    """family: what it is busy with; None while it starts.  idle: there is nothing left for it.  deadline: of time.monotonic()."""

    process: Any
    connection: Connection[Any, Any]
    deadline: float
    family: str | None = None
    idle: bool = False

    @classmethod
    def start(cls, check: Check, threads: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, check, threads), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours, time.monotonic() + START_TIMEOUT_S)

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


def _hear(worker: _Worker, waiting: list[str], timeout_s: float, finish: Callable[[FamilyResult], None]) -> bool:
    """Takes what a worker says and gives it the next family; False when it has died."""
    try:
        said = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        if worker.family is None:
            raise _not_ready(worker) from None
        finish(_lost(worker, timeout_s, f"its process died with exit code {worker.process.exitcode}"))
        return False
    if isinstance(said, FamilyResult):
        finish(said)
    if not waiting:
        worker.idle = True
        return True
    worker.family = waiting.pop(0)
    worker.deadline = time.monotonic() + timeout_s
    with contextlib.suppress(OSError):  # it died in between: the next call hears so
        worker.connection.send(worker.family)
    return True


def _lost(worker: _Worker, timeout_s: float, reason: str) -> FamilyResult:
    assert worker.family is not None
    return FamilyResult(worker.family, "crashed", timeout_s - (worker.deadline - time.monotonic()), reason=reason)


def _not_ready(worker: _Worker) -> KvcompileError:
    exit_code = worker.process.exitcode
    what = f"a worker ended before it was ready (exit code {exit_code})." if exit_code is not None else "a worker did not start."
    return KvcompileError.at("sweep", what, "See what it wrote to stderr; a smaller --jobs needs less memory.")


def _serve(connection: Connection[Any, Any], check: Check, threads: int) -> None:
    """What runs in a worker.  torch tells of each failed try of an export on stderr; the result says it once."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before it is imported: it tells of each kernel package that is missing
    import torch

    torch.set_num_threads(threads)
    logging.getLogger("torch").setLevel(logging.CRITICAL + 1)
    connection.send("ready")
    while True:
        try:
            family = connection.recv()
        except EOFError:
            return
        connection.send(check(family))


class _Record:
    """Results of one state of the code, a line each.  A line that cannot be read is a line that is not there."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.results: dict[str, FamilyResult] = {}
        if path is None:
            return
        self._key = code_key()
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["key"] == self._key:
                    result = FamilyResult.from_dict(entry["result"])
                    self.results[result.model_type] = result

    def add(self, result: FamilyResult) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": self._key, "result": result.as_dict()}) + "\n")


def code_key() -> str:
    """A hash of all that decides a result: kvcompile's own code, torch, transformers."""
    import hashlib
    from importlib.metadata import version

    import kvcompile

    digest = hashlib.sha256(f"{version('torch')} {version('transformers')}".encode())
    for source in _sources(Path(kvcompile.__file__).parent):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _sources(package: Path) -> Iterator[Path]:
    """Every Python file, also below the links to the other folders."""
    for folder, _, names in sorted(os.walk(package, followlinks=True)):
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))
