"""Plain data that every layer shares.  Imports torch, numpy and the standard library only; `graphs` needs networkx."""
