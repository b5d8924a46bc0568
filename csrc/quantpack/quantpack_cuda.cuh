// Codes to bit-planes and back, and images to codes, on a GPU. All pointers are device memory of `device`.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lbs {

// planes[row][p][w] = sum_j ((codes[row][32 w + j] >> p) & 1) << j; codes uint8 [rows][channels], planes int32
// [rows][bits][CW].
void pack_planes_cuda(const uint8_t* codes, int32_t* planes, int64_t rows, int channels, int bits, int device,
                      cudaStream_t stream);

// The inverse; bits beyond the last channel are ignored.
void unpack_planes_cuda(const int32_t* planes, uint8_t* codes, int64_t rows, int channels, int bits, int device,
                        cudaStream_t stream);

// q = clamp(rint(x * scale [+ n / 2]) + zero, 0, n), not a number becomes 0; x float32 [batch][channels][pixels],
// codes uint8 [batch][pixels][channels].
struct EncodeImage {
    const float* x;
    uint8_t* codes;
    int64_t batch, pixels;
    int channels, bits, zero;
    bool is_signed;
    float scale;
};
void encode_image_cuda(const EncodeImage& task, int device, cudaStream_t stream);

}  // namespace lbs
