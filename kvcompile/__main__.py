"""`python -m kvcompile`: the command."""

from kvcompile.cli import main

raise SystemExit(main())
