#include "cuda/launch_cuda.cuh"

#include <algorithm>

#include "common/cuda_check.cuh"
#include "cuda/index.h"

namespace lbs::gpu {
namespace {

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    cuda_check(cudaDeviceGetAttribute(&value, name, device), "asking GPU " + std::to_string(device) + " for its size");
    return value;
}

// A launch, but for its stream; `attributes` has room for two.
cudaLaunchConfig_t config_of(const Kernel& kernel, int blocks, bool overlaps, cudaLaunchAttribute* attributes) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks), config.blockDim = dim3(kernel.threads);
    config.dynamicSmemBytes = kernel.shared_bytes, config.attrs = attributes;
    if (kernel.cluster) {
        cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = kernel.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
    if (overlaps) {
        cudaLaunchAttribute& order = attributes[config.numAttrs++];
        order.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        order.val.programmaticStreamSerializationAllowed = 1;
    }
    return config;
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
    const int at_once = blocks_at_once();
    if (at_once < 1)
        throw BackendError("the kernel needs " + std::to_string(kernel_.shared_bytes) +
                           " bytes of shared memory per block, more than this GPU has; take fewer stages");
    blocks_ = kernel_.cluster ? tiles * kernel_.cluster : std::min(at_once, tiles);
}

int Launch::blocks_at_once() const {
    int count = 0;
    if (kernel_.cluster) {
        cudaLaunchAttribute attributes[2]{};
        const cudaLaunchConfig_t config = config_of(kernel_, kernel_.cluster, false, attributes);
        cuda_check(cudaOccupancyMaxActiveClusters(&count, kernel_.function, &config), "counting clusters of the kernel");
        return count * kernel_.cluster;
    }
    cuda_check(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel_.function, kernel_.threads, kernel_.shared_bytes),
        "counting blocks of the kernel");
    return count * multiprocessors(device_);
}

void Launch::enqueue(cudaStream_t stream, bool overlaps) const {
    if (blocks_ == 0) return;
    const DeviceGuard guard(device_);
    void* arguments[] = {const_cast<unsigned char*>(params_.data())};
    cudaLaunchAttribute attributes[2]{};
    cudaLaunchConfig_t config = config_of(kernel_, blocks_, overlaps, attributes);
    config.stream = stream;
    cuda_check(cudaLaunchKernelExC(&config, kernel_.function, arguments), "launching the kernel");
}

}  // namespace lbs::gpu
