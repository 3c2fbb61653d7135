"""Kernel requests and graphs become source text; nothing here compiles or runs it."""
