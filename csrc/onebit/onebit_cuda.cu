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

Kernel kernel_of(const TileRow& row) {
#define LBS_KERNEL(machine, groups, filters, stages)                                                                  \
    if (same_row(row, {#machine, groups, filters, stages, 0}))                                                        \
        return {reinterpret_cast<const void*>(&onebit_##machine<Tile<groups, filters, stages>>), groups * kWarpgroup, \
                row.shared_bytes, 64};
    LBS_ONEBIT_TILES(LBS_KERNEL)
#undef LBS_KERNEL
    return {};  // find_row() knows the rows of the same table only
}

}  // namespace

Launch bind(const Task& task, const TileRow& row, int device) {
    const Params params = make_params(task, row);
    const DeviceGuard guard(device);
    const std::string machine = row.machine;
    check_capability("one-bit " + machine, machine == "mma", device);
    return Launch(params, kernel_of(row), device);
}

int64_t peak_threads(int device) { return int64_t{PeakWgmma::kThreads} * multiprocessors(device); }

int64_t enqueue_peak(const std::string& machine, int repeats, int* out, int device, cudaStream_t stream) {
    check_range(repeats, 1, 1 << 24, "the number of repeats");
    const bool wgmma = machine == "wgmma";
    require(wgmma || machine == "mma", "one-bit roof: machine is '" + machine + "'; there are wgmma and mma");
    const DeviceGuard guard(device);
    check_capability("one-bit " + machine, !wgmma, device);
    const int blocks = multiprocessors(device);
    const void* function =
        wgmma ? reinterpret_cast<const void*>(&peak_wgmma) : reinterpret_cast<const void*>(&peak_mma);
    const int bytes = (wgmma ? PeakWgmma::kStageBytes : PeakMma::kStageBytes) + kSwizzleBytes;
    check_built({function, PeakWgmma::kThreads, bytes, 64});
    void* arguments[] = {&repeats, &out};
    cuda_check(cudaLaunchKernel(function, dim3(blocks), dim3(PeakWgmma::kThreads), arguments, bytes, stream),
               "launching the roof of the one-bit tensor cores");
    constexpr int64_t kProducts = 4 * PeakWgmma::kRows * kStepWords * 32;  // of a block, a step and a column
    return int64_t{blocks} * repeats * kProducts * (wgmma ? PeakWgmma::kN : PeakMma::kN);
}

}  // namespace lbs::onebit
