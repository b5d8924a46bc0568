// The one-bit kernels as they are launched.
#pragma once

#include "cuda/launch_cuda.cuh"
#include "onebit/task.h"

namespace lbs::onebit {

// Raises FormatError for a task no kernel serves, BackendError where the GPU cannot run the kernel of `row`.
Launch bind(const Task& task, const TileRow& row, int device);

// Enqueues `repeats` steps of products per warp group on every multiprocessor, on operands that stay in shared memory:
// the roof of the one-bit tensor cores. `machine` is wgmma (64 x 128 per group) or mma (64 x 64). `out` receives an
// int32 per thread, `peak_threads(device)` of them. Returns the one-bit multiplications that were enqueued.
int64_t enqueue_peak(const std::string& machine, int repeats, int* out, int device, cudaStream_t stream);
int64_t peak_threads(int device);

}  // namespace lbs::onebit
