#include "common/cuda_check.cuh"
#include "onebit/machine_cuda.cuh"
#include "onebit/onebit_cuda.cuh"
#include "onebit/tiles.h"

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
#else
    __trap();
#endif
}

// Any bits but constant ones: the clock depends on what switches.
template <class T, class Machine>
__device__ __forceinline__ void multiply_only(Machine& machine, int repeats, int* out) {
    for (int byte = 4 * machine.thread(); byte < T::kStageBytes; byte += 4 * T::kThreads) {
        *reinterpret_cast<uint32_t*>(machine.shared(byte)) = (byte + 1u) * 2654435761u;
    }
    machine.publish();
    machine.sync();
    int acc[kMultiplyGroups][T::kN / 2];
    LBS_UNROLL for (int g = 0; g < kMultiplyGroups; ++g) {
        LBS_UNROLL for (int i = 0; i < T::kN / 2; ++i) acc[g][i] = 0;
    }
    const int group_byte = machine.thread() / kWarpgroup * (kWarpgroupRows * kRowBytes);
    int left = repeats;
    LBS_NO_UNROLL do {
        machine.template multiply<T::kN>(acc, group_byte, T::kWeightByte, left % 2);
        machine.template wait_products<2 * Machine::kInFlight>();
    } while (--left > 0);
    machine.finish_products(acc);
    int sum = 0;
    LBS_UNROLL for (int g = 0; g < kMultiplyGroups; ++g) {
        LBS_UNROLL for (int i = 0; i < T::kN / 2; ++i) sum += acc[g][i];
    }
    out[machine.block() * T::kThreads + machine.thread()] = sum;
}

using PeakWgmma = Tile<2, 128, 1>;
using PeakMma = Tile<2, 64, 1>;

__global__ void __launch_bounds__(PeakMma::kThreads, 1) peak_mma(int repeats, int* out) {
    MmaMachine machine(shared_memory);
    multiply_only<PeakMma>(machine, repeats, out);
}

__global__ void __launch_bounds__(PeakWgmma::kThreads, 1) peak_wgmma(int repeats, int* out) {
#if defined(LBS_HAS_WGMMA)
    WgmmaMachine machine(shared_memory);
    multiply_only<PeakWgmma>(machine, repeats, out);
#else
    __trap();
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

// A module built for sm_90 has no wgmma, only sm_90a does: its kernels hold nothing and use next to no registers.
void check_built(const void* kernel) {
    cudaFuncAttributes found{};
    cuda_check(cudaFuncGetAttributes(&found, kernel), "asking for the one-bit kernel");
    if (found.numRegs < 64)
        throw BackendError("the one-bit kernel was built without the instruction it needs; build again with 90a in "
                           "LBS_CUDA_ARCHS");
}

}  // namespace

Launch::Launch(const Task& task, const TileRow& row, int device) : params_(make_params(task, row)), device_(device) {
    const DeviceGuard guard(device);
    check_capability(row.machine, device);
    kernel_ = kernel_of(row);
    check_built(kernel_);
    threads_ = row.groups * kWarpgroup;
    shared_bytes_ = row.shared_bytes + kSwizzleBytes;  // room to begin where the swizzle does
    cuda_check(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes_),
               "asking for " + std::to_string(shared_bytes_) + " bytes of shared memory");
    cuda_check(cudaFuncSetAttribute(kernel_, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "asking for more shared memory than cache");
    int at_once = 0;
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, kernel_, threads_, shared_bytes_),
               "counting blocks of the one-bit kernel");
    if (at_once < 1)
        throw BackendError("the one-bit kernel needs " + std::to_string(shared_bytes_) +
                           " bytes of shared memory per block, more than this GPU has; take fewer stages");
    const int64_t places = static_cast<int64_t>(at_once) * attribute(cudaDevAttrMultiProcessorCount, device);
    blocks_ = static_cast<int>(places < params_.tiles ? places : params_.tiles);
}

int64_t peak_threads(int device) {
    return int64_t{PeakWgmma::kThreads} * attribute(cudaDevAttrMultiProcessorCount, device);
}

int64_t enqueue_peak(const std::string& machine, int repeats, int* out, int device, cudaStream_t stream) {
    check_range(repeats, 1, 1 << 24, "the number of repeats");
    const bool wgmma = machine == "wgmma";
    require(wgmma || machine == "mma", "one-bit roof: machine is '" + machine + "'; there are wgmma and mma");
    const DeviceGuard guard(device);
    check_capability(machine, device);
    const int blocks = attribute(cudaDevAttrMultiProcessorCount, device);
    const void* kernel = wgmma ? reinterpret_cast<const void*>(&peak_wgmma) : reinterpret_cast<const void*>(&peak_mma);
    check_built(kernel);
    const int bytes = (wgmma ? PeakWgmma::kStageBytes : PeakMma::kStageBytes) + kSwizzleBytes;
    void* arguments[] = {&repeats, &out};
    cuda_check(cudaLaunchKernel(kernel, dim3(blocks), dim3(PeakWgmma::kThreads), arguments, bytes, stream),
               "launching the roof of the one-bit tensor cores");
    constexpr int64_t kProducts = 4 * PeakWgmma::kRows * kStepWords * 32;  // of a block, a step and a column
    return int64_t{blocks} * repeats * kProducts * (wgmma ? PeakWgmma::kN : PeakMma::kN);
}

void Launch::enqueue(cudaStream_t stream) const {
    if (blocks_ == 0) return;
    const DeviceGuard guard(device_);
    void* arguments[] = {const_cast<Params*>(&params_)};
    cuda_check(cudaLaunchKernel(kernel_, dim3(blocks_), dim3(threads_), arguments, shared_bytes_, stream),
               "launching the one-bit kernel");
}

}  // namespace lbs::onebit
