#include "cuda/launch_cuda.cuh"

#include "common/cuda_check.cuh"
#include "cuda/index.h"

namespace lbs::gpu {
namespace {

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    cuda_check(cudaDeviceGetAttribute(&value, name, device), "asking GPU " + std::to_string(device) + " for its size");
    return value;
}

}  // namespace

int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

void check_capability(const std::string& name, bool ampere, int device) {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    if ((major == 9 && minor == 0) || (ampere && major == 8)) return;
    throw BackendError(name + " kernels cannot run on GPU " + std::to_string(device) + ", compute capability " +
                       std::to_string(major) + "." + std::to_string(minor) + "; wgmma runs on 9.0, mma on 8.x and 9.0");
}

// A module built for sm_90 has no wgmma, only sm_90a does: its kernels hold nothing and use next to no registers.
void check_built(const Kernel& kernel) {
    cudaFuncAttributes found{};
    cuda_check(cudaFuncGetAttributes(&found, kernel.function), "asking for the kernel");
    if (found.numRegs < kernel.least_registers)
        throw BackendError(
            "the kernel was built without the instruction it needs; build again with 90a in "
            "LBS_CUDA_ARCHS");
}

Launch::Launch(const void* params, size_t bytes, int tiles, const Kernel& kernel, int device)
    : params_(static_cast<const unsigned char*>(params), static_cast<const unsigned char*>(params) + bytes),
      kernel_(kernel),
      device_(device) {
    const DeviceGuard guard(device);
    check_built(kernel_);
    kernel_.shared_bytes += kSwizzleBytes;  // room to begin where the swizzle does
    cuda_check(
        cudaFuncSetAttribute(kernel_.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel_.shared_bytes),
        "asking for " + std::to_string(kernel_.shared_bytes) + " bytes of shared memory");
    cuda_check(cudaFuncSetAttribute(kernel_.function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "asking for more shared memory than cache");
    int at_once = 0;
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, kernel_.function, kernel_.threads,
                                                             kernel_.shared_bytes),
               "counting blocks of the kernel");
    if (at_once < 1)
        throw BackendError("the kernel needs " + std::to_string(kernel_.shared_bytes) +
                           " bytes of shared memory per block, more than this GPU has; take fewer stages");
    const int64_t places = static_cast<int64_t>(at_once) * multiprocessors(device);
    blocks_ = static_cast<int>(places < tiles ? places : tiles);
}

void Launch::enqueue(cudaStream_t stream, bool overlaps) const {
    if (blocks_ == 0) return;
    const DeviceGuard guard(device_);
    void* arguments[] = {const_cast<unsigned char*>(params_.data())};
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks_), config.blockDim = dim3(kernel_.threads);
    config.dynamicSmemBytes = kernel_.shared_bytes, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = overlaps ? 1 : 0;
    cuda_check(cudaLaunchKernelExC(&config, kernel_.function, arguments), "launching the kernel");
}

}  // namespace lbs::gpu
