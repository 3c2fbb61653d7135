"""The operators at which tokens meet: there the graph is cut, and there a session remembers."""

from __future__ import annotations

import torch

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.convolve_op import CONVOLVE

SITES = (ATTEND, CONVOLVE)


def site_nodes(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The sites of every kind in program order."""
    return [node for node in graph.nodes if node.target in SITES]


def site_name(node: torch.fx.Node) -> str:
    """ "3" for attention 3, "convolution 0" for the first convolution, "" for what is no site.  Each kind has its own numbers."""
    if node.target is ATTEND:
        return str(node.args[4])
    return f"convolution {node.args[3]}" if node.target is CONVOLVE else ""
