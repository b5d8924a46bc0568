"""Launch configurations of GPU kernels: their texts, which are legal, which are the default."""
