// A launch of a kernel, bound once and enqueued often.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "cuda/layer.h"

namespace lbs::gpu {

// A kernel whose one argument is its parameters, for blocks that stay and share the tiles, or for clusters of blocks
// that share one tile each.
struct Kernel {
    const void* function;
    int threads, shared_bytes, least_registers;  // a kernel with fewer registers was built without its instruction
    int cluster = 0;                             // blocks, if they share a tile
};

// Everything is chosen, checked and allowed when it is made; `enqueue` only launches: it neither allocates nor waits.
class Launch {
public:
    // `params` is a structure that begins with a Layer. Raises BackendError where the GPU cannot run the kernel.
    template <class Params>
    Launch(const Params& params, const Kernel& kernel, int device)
        : Launch(&params, sizeof(Params), params.tiles, kernel, device) {}
    // overlaps: it may begin before the kernel in front of it on the stream has ended, whatever that is; its own waits
    // are then what orders the two (programmatic dependent launch, from compute capability 9.0 on).
    void enqueue(cudaStream_t stream, bool overlaps) const;

private:
    Launch(const void* params, size_t bytes, int tiles, const Kernel& kernel, int device);
    int blocks_at_once() const;  // of the whole GPU

    std::vector<unsigned char> params_;
    Kernel kernel_;
    int device_, blocks_;
};

int multiprocessors(int device);
// Raises BackendError unless `device` is of compute capability 9.0, or 8.x where `ampere`; `name` is what is refused.
void check_capability(const std::string& name, bool ampere, int device);
void check_built(const Kernel& kernel);

}  // namespace lbs::gpu
