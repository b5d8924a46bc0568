// The s8 kernels as they are launched.
#pragma once

#include "cuda/launch_cuda.cuh"
#include "s8/task.h"

namespace lbs::s8 {

// Raises FormatError for a task no kernel serves, BackendError where the GPU cannot run the kernel of `row`.
Launch bind(const Task& task, const TileRow& row, int device);

// Enqueues `repeats` chunks of products for each of two warp groups of 128 x 128 on every multiprocessor, on operands
// that stay in shared memory: the roof of the s8 tensor cores. `out` receives an int32 per thread,
// `peak_threads(device)` of them. Returns the multiplications that were enqueued.
int64_t enqueue_peak(int repeats, int* out, int device, cudaStream_t stream);
int64_t peak_threads(int device);

}  // namespace lbs::s8
