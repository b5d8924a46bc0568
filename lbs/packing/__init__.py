"""From a quantized network to bit-planes and a program: fold, lower, save, verify, explain.

The functions are offered by `lbs` itself: `lbs.pack`, `lbs.load`, `lbs.verify`, `lbs.explain`.
"""
