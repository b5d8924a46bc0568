#include "s8/s8_cuda.cuh"

#include "common/cuda_check.cuh"
#include "s8/machine_cuda.cuh"

namespace lbs::s8 {
namespace {

extern __shared__ uint8_t shared_memory[];

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) s8_wgmma(const __grid_constant__ Params p) {
#if defined(LBS_HAS_WGMMA)
    WgmmaMachine machine(shared_memory);
    run_tiles<T>(machine, p);
#else
    __trap();
#endif
}

// Two blocks have room on a multiprocessor.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2) s8_cluster_wgmma(const __grid_constant__ Params p) {
#if defined(LBS_HAS_WGMMA)
    WgmmaMachine machine(shared_memory);
    run_split_tile<T>(machine, p);
#else
    __trap();
#endif
}

using Peak = Tile<2, 128, 4, Reads::kBytes>;
constexpr int kPeakThreads = kConsumers * kWarpgroup;

__global__ void __launch_bounds__(kPeakThreads, 1) peak_wgmma(int repeats, int* out) {
#if defined(LBS_HAS_WGMMA)
    WgmmaMachine machine(shared_memory);
    // Any bits but constant ones: the clock depends on what switches.
    for (int byte = 4 * machine.thread(); byte < Peak::kStageBytes; byte += 4 * kPeakThreads) {
        *reinterpret_cast<uint32_t*>(machine.shared(byte)) = (byte + 1u) * 2654435761u;
    }
    machine.publish();
    machine.sync();
    Sums<Peak> sums;
    clear(sums);
    const uint64_t stage = matrix_descriptor(machine.address(0));
    LBS_NO_UNROLL do {
        machine.open_products();
        LBS_UNROLL for (int step = 0; step < kChunkSteps; ++step) multiply_step(machine, sums, stage, step);
        machine.close_products();
        machine.wait_products<1>();
    } while (--repeats > 0);
    machine.finish_products(sums.acc);
    int sum = 0;
    LBS_UNROLL for (int group = 0; group < Peak::kGroups; ++group) {
        LBS_UNROLL for (int i = 0; i < Peak::kN / 2; ++i) sum += sums.acc[group][i];
    }
    out[machine.block() * kPeakThreads + machine.thread()] = sum;
#else
    __trap();
#endif
}

template <class T>
Kernel kernel_of() {
    return {reinterpret_cast<const void*>(&s8_wgmma<T>), T::kThreads, T::kSharedBytes, 64};
}

template <class T>
Kernel cluster_kernel_of(int split) {
    return {reinterpret_cast<const void*>(&s8_cluster_wgmma<T>), T::kThreads, T::kSharedBytes, 64, split};
}

template <Reads kReads>
Kernel kernel_of(const TileRow& row, int split) {
#define LBS_KERNEL(machine, groups, filters, stages)           \
    if (same_row(row, {#machine, groups, filters, stages, 0})) \
        return kernel_of<Tile<groups, filters, stages, kReads>>();
    LBS_S8_TILES(LBS_KERNEL)
#undef LBS_KERNEL
#define LBS_KERNEL(machine, groups, filters, stages)           \
    if (same_row(row, {#machine, groups, filters, stages, 0})) \
        return cluster_kernel_of<ClusterTile<filters, stages, kReads>>(split);
    LBS_S8_CLUSTER_TILES(LBS_KERNEL)
#undef LBS_KERNEL
    return {};  // find_row() knows the rows of the same table only
}

Kernel kernel_of(const TileRow& row, Reads what, int split) {
    if (what == Reads::kNibbles) return kernel_of<Reads::kNibbles>(row, split);
    return what == Reads::kSummed ? kernel_of<Reads::kSummed>(row, split) : kernel_of<Reads::kBytes>(row, split);
}

}  // namespace

Launch bind(const Task& task, const TileRow& row, int device) {
    const Params params = make_params(task, row);
    const DeviceGuard guard(device);
    check_capability("s8", false, device);
    return Launch(params, kernel_of(row, reads(task), task.split), device);
}

int64_t peak_threads(int device) { return int64_t{kPeakThreads} * multiprocessors(device); }

int64_t enqueue_peak(int repeats, int* out, int device, cudaStream_t stream) {
    check_range(repeats, 1, 1 << 24, "the number of repeats");
    const DeviceGuard guard(device);
    check_capability("s8", false, device);
    const int blocks = multiprocessors(device);
    const Kernel kernel{reinterpret_cast<const void*>(&peak_wgmma), kPeakThreads, Peak::kStageBytes + kSwizzleBytes,
                        64};
    check_built(kernel);
    void* arguments[] = {&repeats, &out};
    cuda_check(
        cudaLaunchKernel(kernel.function, dim3(blocks), dim3(kernel.threads), arguments, kernel.shared_bytes, stream),
        "launching the roof of the s8 tensor cores");
    return int64_t{blocks} * repeats * kConsumers * Peak::kRows * Peak::kN * kRowBytes;
}

}  // namespace lbs::s8
