// The s8 kernels as they are launched.
#pragma once

#include "cuda/launch_cuda.cuh"
#include "s8/task.h"

namespace lbs::s8 {

// Raises FormatError for a task no kernel serves, BackendError where the GPU cannot run the kernel of `row`.
Launch bind(const Task& task, const TileRow& row, int device);

}  // namespace lbs::s8
