"""Codes and layers of fixed bits."""

from lbs.quant.calibrate import calibrate, estimate_norms
from lbs.quant.layers import QuantConv2d, QuantConvTranspose2d, QuantLayer, QuantLinear
from lbs.quant.quantizers import ActivationQuantizer, InputQuantizer

__all__ = [
    "ActivationQuantizer",
    "InputQuantizer",
    "QuantConv2d",
    "QuantConvTranspose2d",
    "QuantLayer",
    "QuantLinear",
    "calibrate",
    "estimate_norms",
]
