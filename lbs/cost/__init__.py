"""What a network costs: bit operations and bytes, logical and as executed.

>>> import lbs.cost, lbs.models
>>> layers = lbs.cost.network_layers(lbs.models.create("preresnet20"), lbs.models.example("preresnet20"))
>>> f"{layers.with_bits(4, 4).bops() / 1e6:.1f}M of {layers.full_precision_bops() / 1e6:.1f}M"
'674.6M of 41798.6M'
"""

from __future__ import annotations

from lbs.cost.bops import (
    FULL_PRECISION_BITS,
    bops,
    full_precision,
    macs,
    pair_macs,
    physical,
    physical_bops,
    total_bops,
)
from lbs.cost.edges import EDGE_BITS, edge_layers, uniform_bits
from lbs.cost.latency import Tuned, timed
from lbs.cost.network import CountedLayer, NetworkLayers, network_layers
from lbs.cost.storage import activation_bytes, float_weight_bytes, weight_bytes

__all__ = [
    "EDGE_BITS",
    "FULL_PRECISION_BITS",
    "CountedLayer",
    "NetworkLayers",
    "Tuned",
    "activation_bytes",
    "bops",
    "edge_layers",
    "float_weight_bytes",
    "full_precision",
    "macs",
    "network_layers",
    "pair_macs",
    "physical",
    "physical_bops",
    "timed",
    "total_bops",
    "uniform_bits",
    "weight_bytes",
]
