// A vector of pixels of one group of four channels, as it lies in a tensor of codes.
#pragma once

#include "program/emit_kernel.h"
#include "program/plan.h"

namespace {

// One vector of input pixels at `base`; kS pieces, 0 for one offset per lane.
template <int kS>
struct PixelLoader {
    const unsigned char* base[kS > 0 ? kS : 1];
    uint32_t mask[kS > 0 ? kS : 1];
    const int32_t* lanes;

    PixelLoader() = default;
    LBS_INLINE PixelLoader(const unsigned char* in, const lbs::PixelMap& map, int vector) {
        if constexpr (kS == 0) {
            base[0] = in;
            lanes = map.lanes + static_cast<int64_t>(vector) * lbs::kMaxLanes;
        } else {
            const lbs::Piece* piece = map.table + static_cast<int64_t>(vector) * kS;
            for (int s = 0; s < kS; ++s) {
                base[s] = in + piece[s].offset;
                mask[s] = piece[s].mask;
            }
        }
    }
    LBS_INLINE Simd::I load(int32_t offset) const {
        if constexpr (kS == 0) {
            return Simd::igather(base[0] + offset, lanes);
        } else {
            // The first piece starts at lane 0. Slack: what is read past its end others replace, or nobody uses.
            Simd::I x = Simd::iload(base[0] + offset);
            for (int s = 1; s < kS; ++s) x = Simd::iload_mask(x, mask[s], base[s] + offset);
            return x;
        }
    }
};

}  // namespace
