"""GPU kernels in CUDA C++: implicit GEMMs on one-bit and on s8 tensor cores."""
