"""The specs that the package carries (`builtin:NAME`), and the head patterns that they name."""
