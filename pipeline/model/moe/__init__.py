"""The MoE layer: router, dispatch, experts, and the layer that joins them.

Shape suffixes: T tokens, D hidden size, F intermediate size, E experts of the layer (the original
MLP included, as expert 0), K experts that a token chooses, A assignments (token, expert) that are computed.
"""

from pipeline.model.moe.layer import MoELayer
from pipeline.model.moe.router import Routing, collect_routings

__all__ = ["MoELayer", "Routing", "collect_routings"]
