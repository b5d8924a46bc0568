#include "common/cuda_check.cuh"
#include "common/onebit/machine_cuda.cuh"
#include "common/onebit/onebit_cuda.cuh"
#include "common/onebit/tiles.h"

namespace lbs::onebit {
namespace {

extern __shared__ uint8_t shared_memory[];

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) onebit_mma(const __grid_constant__ Params p) {
    MmaMachine machine(shared_memory);
    run_tiles<T>(machine, p);
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) onebit_wgmma(const __grid_constant__ Params p) {
#if defined(LBS_HAS_WGMMA)
    WgmmaMachine machine(shared_memory);
    run_tiles<T>(machine, p);
#endif
}

const void* kernel_of(const TileRow& row) {
#define LBS_KERNEL(machine, groups, filters, stages)           \
    if (same_row(row, {#machine, groups, filters, stages, 0})) \
        return reinterpret_cast<const void*>(&onebit_##machine<Tile<groups, filters, stages>>);
    LBS_ONEBIT_TILES(LBS_KERNEL)
#undef LBS_KERNEL
    return nullptr;  // find_row() knows the rows of the same table only
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    cuda_check(cudaDeviceGetAttribute(&value, name, device), "asking GPU " + std::to_string(device) + " for its size");
    return value;
}

void check_capability(const std::string& machine, int device) {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    const bool hopper = major == 9 && minor == 0;
    if (hopper || (machine == "mma" && major == 8)) return;
    throw BackendError("one-bit " + machine + " kernels cannot run on GPU " + std::to_string(device) +
                       ", compute capability " + std::to_string(major) + "." + std::to_string(minor) +
                       "; wgmma runs on 9.0, mma on 8.x and 9.0");
}

}  // namespace

Launch::Launch(const Task& task, const TileRow& row, int device) : params_(make_params(task, row)), device_(device) {
    const DeviceGuard guard(device);
    check_capability(row.machine, device);
    kernel_ = kernel_of(row);
    threads_ = row.groups * kWarpgroup;
    shared_bytes_ = row.shared_bytes + kSwizzleBytes;  // room to begin where the swizzle does
    cuda_check(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes_),
               "asking for " + std::to_string(shared_bytes_) + " bytes of shared memory");
    int at_once = 0;
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, kernel_, threads_, shared_bytes_),
               "counting blocks of the one-bit kernel");
    if (at_once < 1)
        throw BackendError("the one-bit kernel needs " + std::to_string(shared_bytes_) +
                           " bytes of shared memory per block, more than this GPU has; take fewer stages");
    const int64_t places = static_cast<int64_t>(at_once) * attribute(cudaDevAttrMultiProcessorCount, device);
    blocks_ = static_cast<int>(places < params_.tiles ? places : params_.tiles);
}

void Launch::enqueue(cudaStream_t stream) const {
    if (blocks_ == 0) return;
    const DeviceGuard guard(device_);
    void* arguments[] = {const_cast<Params*>(&params_)};
    cuda_check(cudaLaunchKernel(kernel_, dim3(blocks_), dim3(threads_), arguments, shared_bytes_, stream),
               "launching the one-bit kernel");
}

}  // namespace lbs::onebit
