// A launch of the one-bit kernel, bound once and enqueued often.
#pragma once

#include <cuda_runtime.h>

#include "common/onebit/task.h"

namespace lbs::onebit {

// Everything is chosen, checked and allowed when it is made; `enqueue` only launches: it neither allocates nor waits.
class Launch {
public:
    // Raises FormatError for a task no kernel serves, BackendError where the GPU cannot run the kernel of `row`.
    Launch(const Task& task, const TileRow& row, int device);
    void enqueue(cudaStream_t stream) const;

private:
    Params params_;
    const void* kernel_;
    int device_, threads_, shared_bytes_, blocks_;
};

}  // namespace lbs::onebit
