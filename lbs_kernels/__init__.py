"""Bit-plane kernels and the program they run in. Knows nothing of how a network was searched or packed."""
