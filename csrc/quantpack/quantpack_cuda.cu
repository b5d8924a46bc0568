#include "common/cuda_check.cuh"
#include "common/format.h"
#include "quantpack/quantpack_cuda.cuh"

namespace lbs {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
static_assert(kWord == kWarp, "a warp votes on one bit of the 32 channels of a word");
constexpr int64_t kMaxBlocks = 1 << 16;  // the kernels stride over what is beyond

int blocks_for(int64_t threads) {
    const int64_t blocks = (threads + kThreads - 1) / kThreads;
    return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// One warp per (row, word): lane j votes for channel 32 w + j, lane p keeps and writes plane p.
__global__ void pack_planes_kernel(const uint8_t* __restrict__ codes, int32_t* __restrict__ planes, int64_t rows,
                                   int channels, int bits, int words) {
    const int lane = threadIdx.x % kWarp;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp;
    for (int64_t item = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; item < rows * words;
         item += warps) {
        const int64_t row = item / words;
        const int word = static_cast<int>(item % words), channel = word * kWord + lane;
        const unsigned code = channel < channels ? codes[row * channels + channel] : 0u;
        unsigned mine = 0;
        for (int p = 0; p < bits; ++p) {
            const unsigned vote = __ballot_sync(0xffffffffu, code >> p & 1u);
            if (lane == p) mine = vote;
        }
        if (lane < bits) planes[(row * bits + lane) * words + word] = static_cast<int32_t>(mine);
    }
}

__global__ void unpack_planes_kernel(const int32_t* __restrict__ planes, uint8_t* __restrict__ codes, int64_t rows,
                                     int channels, int bits, int words) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < rows * channels;
         item += step) {
        const int64_t row = item / channels;
        const int channel = static_cast<int>(item % channels);
        unsigned code = 0;
        for (int p = 0; p < bits; ++p) {
            const unsigned word = static_cast<unsigned>(planes[(row * bits + p) * words + channel / kWord]);
            code |= (word >> (channel % kWord) & 1u) << p;
        }
        codes[item] = static_cast<uint8_t>(code);
    }
}

// One thread per pixel: reads of a channel are contiguous across threads.
__global__ void encode_image_kernel(EncodeImage t) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const float levels = static_cast<float>((1 << t.bits) - 1);
    for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < t.batch * t.pixels;
         item += step) {
        const int64_t image = item / t.pixels, pixel = item % t.pixels;
        for (int c = 0; c < t.channels; ++c) {
            float value = __fmul_rn(t.x[(image * t.channels + c) * t.pixels + pixel], t.scale);
            if (t.is_signed) value = __fadd_rn(value, levels * 0.5f);
            value = fminf(fmaxf(__fadd_rn(rintf(value), static_cast<float>(t.zero)), 0.0f), levels);
            t.codes[item * t.channels + c] = static_cast<uint8_t>(value);
        }
    }
}

void check_shape(int64_t rows, int channels, int bits, const char* name) {
    require(rows >= 0 && channels >= 1 && bits >= 1 && bits <= kMaxBits,
            std::string(name) + ": " + std::to_string(rows) + " rows of " + std::to_string(channels) +
                " channels with " + std::to_string(bits) + " bits; codes have 1 to 8 bits and at least one channel");
}

}  // namespace

void pack_planes_cuda(const uint8_t* codes, int32_t* planes, int64_t rows, int channels, int bits, int device,
                      cudaStream_t stream) {
    check_shape(rows, channels, bits, "pack_planes");
    const int words = (channels + kWord - 1) / kWord;
    if (rows == 0) return;
    const DeviceGuard guard(device);
    pack_planes_kernel<<<blocks_for(rows * words * kWarp), kThreads, 0, stream>>>(codes, planes, rows, channels, bits,
                                                                                  words);
    cuda_check(cudaGetLastError(), "launching pack_planes");
}

void unpack_planes_cuda(const int32_t* planes, uint8_t* codes, int64_t rows, int channels, int bits, int device,
                        cudaStream_t stream) {
    check_shape(rows, channels, bits, "unpack_planes");
    const int words = (channels + kWord - 1) / kWord;
    if (rows == 0) return;
    const DeviceGuard guard(device);
    unpack_planes_kernel<<<blocks_for(rows * channels), kThreads, 0, stream>>>(planes, codes, rows, channels, bits,
                                                                               words);
    cuda_check(cudaGetLastError(), "launching unpack_planes");
}

void encode_image_cuda(const EncodeImage& task, int device, cudaStream_t stream) {
    check_shape(task.batch * task.pixels, task.channels, task.bits, "encode_image");
    if (task.batch * task.pixels == 0) return;
    const DeviceGuard guard(device);
    encode_image_kernel<<<blocks_for(task.batch * task.pixels), kThreads, 0, stream>>>(task);
    cuda_check(cudaGetLastError(), "launching encode_image");
}

}  // namespace lbs
