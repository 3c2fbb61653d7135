"""What a command prints and where: results on stdout, progress and errors on stderr; with --json one object on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvcompile.ir.errors import Problem

if TYPE_CHECKING:
    from kvcompile.report import Table


class Output:
    """One command's voice.  as_json: nothing but the final object goes to stdout.  quiet: no progress, no tables."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._status: Any = None

    def progress(self, line: str) -> None:
        """One line of progress: a spinner with the seconds so far on a terminal, a plain line elsewhere."""
        if self.quiet:
            return
        if not sys.stderr.isatty():
            print(f"kvcompile: {line}", file=sys.stderr, flush=True)
            return
        if self._status is None:
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
            self._status = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
            self._status.add_task(line, total=None)
            self._status.start()
        else:
            self._status.update(self._status.task_ids[0], description=line)

    def settle(self) -> None:
        """Takes the spinner away; call it before printing a result."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def say(self, text: str = "") -> None:
        """A line of the result for people."""
        self.settle()
        if not self.as_json:
            print(text, flush=True)

    def aside(self, text: str) -> None:
        """A line about the result, apart from it: stderr, not when quiet."""
        self.settle()
        if not self.quiet and not self.as_json:
            print(text, file=sys.stderr, flush=True)

    def piece(self, text: str) -> None:
        """A piece of generated text, without a line end."""
        self.settle()
        if not self.as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def table(self, table: Table) -> None:
        """Drawn by rich on a terminal, aligned plain text elsewhere."""
        self.settle()
        if self.as_json:
            return
        if not sys.stdout.isatty():
            print(table.text(), flush=True)
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table as Drawn
        from rich.text import Text

        drawn = Drawn(title=Text(table.title) if table.title else None, title_justify="left", box=box.SIMPLE_HEAD)
        for number, name in enumerate(table.header):
            drawn.add_column(Text(name), justify="right" if number in table.right else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        Console().print(drawn)

    def finish(self, value: Mapping[str, Any]) -> None:
        """With --json: the one object."""
        self.settle()
        if self.as_json:
            print(json.dumps(value, indent=2, default=str), flush=True)


def print_problems(problems: Sequence[Problem], *, as_json: bool) -> None:
    """Every problem; never a traceback."""
    if as_json:
        errors = [{"where": problem.where, "what": problem.what, "mend": problem.mend} for problem in problems]
        print(json.dumps({"errors": errors}, indent=2), flush=True)
        return
    for problem in problems:
        print(problem, file=sys.stderr, flush=True)
