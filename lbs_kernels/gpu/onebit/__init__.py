"""GPU kernels in CUDA C++: the implicit GEMM on one-bit tensor cores."""
