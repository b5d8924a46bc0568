// What becomes of one thread's run of consecutive channels of one pixel: steps 1 to 6 of the format, or thresholds.
#pragma once

#include "cuda/layer.h"

namespace lbs::gpu {

constexpr float kRintMagic = 12582912.0f;  // 1.5 * 2^23: added to |t| < 2^22, leaves rint(t) in the low bits
constexpr uint32_t kRintMagicBits = 0x4B400000u;

// What a run is worked off in.
LBS_HD constexpr int piece_of(int run) { return run < 8 ? run : 8; }

// 4, 8 or 16 bytes at once.
template <int kBytes>
struct alignas(kBytes) Bytes {
    uint32_t v[kBytes / 4];
};

// A piece of a stream [M][C] from `index` on, of which `count` values exist; at once where C makes it whole and aligned.
template <int kPiece>
LBS_HD void load_stream(const Layer& p, int64_t index, int count, float (&y)[kPiece]) {
    if (p.stream_type == StreamType::kFloat32) {
        const float* from = static_cast<const float*>(p.residual) + index;
        LBS_UNROLL for (int i = 0; i < kPiece; i += 4) {
            if (p.filters % 4 == 0 && i < count) {
                const Floats4 four = *reinterpret_cast<const Floats4*>(from + i);
                LBS_UNROLL for (int j = 0; j < 4; ++j) y[i + j] = four.v[j];
            } else {
                LBS_UNROLL for (int j = i; j < i + 4; ++j) y[j] = j < count ? from[j] : 0.0f;
            }
        }
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(p.residual) + index;
    uint16_t bits[kPiece];
    if (p.filters % kPiece == 0) {
        const auto all = *reinterpret_cast<const Bytes<2 * kPiece>*>(from);
        LBS_UNROLL for (int i = 0; i < kPiece; ++i) bits[i] = static_cast<uint16_t>(all.v[i / 2] >> 16 * (i % 2));
    } else {
        LBS_UNROLL for (int i = 0; i < kPiece; ++i) bits[i] = i < count ? from[i] : uint16_t{0};
    }
    const bool brain = p.stream_type == StreamType::kBfloat16;
    LBS_UNROLL for (int i = 0; i < kPiece; ++i) y[i] = brain ? from_bfloat16(bits[i]) : from_float16(bits[i]);
}

// Adds what the codes of a residual stand for; bytes behind the last channel hold anything, and none is read behind the
// pixel.
template <int kPiece>
LBS_HD void add_coded(const Coded& r, int row, int first, float (&y)[kPiece]) {
    if (first >= r.pitch) return;
    const auto codes = *reinterpret_cast<const Bytes<kPiece>*>(r.codes + static_cast<int64_t>(row) * r.pitch + first);
    LBS_UNROLL for (int i = 0; i < kPiece; ++i) {
        const int code = static_cast<int8_t>(codes.v[i / 4] >> 8 * (i % 4));
        y[i] += static_cast<float>(code + 128 - r.zero) * r.step;
    }
}

// Stores y in the stream type; y becomes the stored value.
template <int kPiece>
LBS_HD void store_stream(const Layer& p, int64_t index, int count, float (&y)[kPiece]) {
    if (p.stream_type == StreamType::kFloat32) {
        float* to = static_cast<float*>(p.stream) + index;
        LBS_UNROLL for (int i = 0; i < kPiece; i += 4) {
            if (p.filters % 4 == 0 && i < count) {
                *reinterpret_cast<Floats4*>(to + i) = Floats4{{y[i], y[i + 1], y[i + 2], y[i + 3]}};
            } else {
                LBS_UNROLL for (int j = i; j < i + 4; ++j) if (j < count) to[j] = y[j];
            }
        }
        return;
    }
    const bool brain = p.stream_type == StreamType::kBfloat16;
    uint16_t bits[kPiece];
    LBS_UNROLL for (int i = 0; i < kPiece; ++i) {
        bits[i] = brain ? to_bfloat16(y[i]) : to_float16(y[i]);
        y[i] = brain ? from_bfloat16(bits[i]) : from_float16(bits[i]);
    }
    uint16_t* to = static_cast<uint16_t*>(p.stream) + index;
    if (p.filters % kPiece == 0) {
        Bytes<2 * kPiece> all;
        LBS_UNROLL for (int i = 0; i < kPiece / 2; ++i) {
            all.v[i] = bits[2 * i] | static_cast<uint32_t>(bits[2 * i + 1]) << 16;
        }
        *reinterpret_cast<Bytes<2 * kPiece>*>(to) = all;
    } else {
        LBS_UNROLL for (int i = 0; i < kPiece; ++i) if (i < count) to[i] = bits[i];
    }
}

// Steps 1 to 5.
template <int kRun>
LBS_HD void stored_values(const Layer& p, const int (&acc)[kRun], int row, int first, float (&y)[kRun]) {
    constexpr int kPiece = piece_of(kRun);
    LBS_UNROLL for (int c = 0; c < kRun; c += kPiece) {
        const int64_t index = static_cast<int64_t>(row) * p.filters + first + c;
        const int count = p.filters - first - c;
        float piece[kPiece], add[kPiece];
        LBS_UNROLL for (int i = 0; i < kPiece; i += 4) {
            const Floats4 multiplier = *reinterpret_cast<const Floats4*>(p.multiplier + first + c + i);
            const Floats4 bias = *reinterpret_cast<const Floats4*>(p.bias + first + c + i);
            LBS_UNROLL for (int j = 0; j < 4; ++j) {
                piece[i + j] = fused(static_cast<float>(acc[c + i + j]), multiplier.v[j], bias.v[j]);
            }
        }
        if (p.residual && count > 0) {
            load_stream(p, index, count, add);
            LBS_UNROLL for (int i = 0; i < kPiece; ++i) piece[i] += add[i];
        }
        if (p.coded.codes) add_coded(p.coded, row, first + c, piece);
        if (p.has_low) {
            LBS_UNROLL for (int i = 0; i < kPiece; ++i) piece[i] = fmaxf(piece[i], p.low);
        }
        if (p.has_high) {
            LBS_UNROLL for (int i = 0; i < kPiece; ++i) piece[i] = fminf(piece[i], p.high);
        }
        if (p.stream && count > 0) store_stream(p, index, count, piece);
        LBS_UNROLL for (int i = 0; i < kPiece; ++i) y[c + i] = piece[i];
    }
}

// Step 6 for one consumer, four codes to a register, channel by channel from the lowest byte on.
//
// All bounds are integers, or the value of 0 where a ReLU stands in front: clamping before rint gives what clamping
// after it gives, and as a scale is positive, no negative u reaches beyond the value of 0 in either order. A sum of
// four codes, each shifted to its byte, is exact modulo 2^32 whatever its terms were, so what every code lacks is added
// once.
template <int kRun>
LBS_HD void encode(const ConsumerTarget& k, const float (&y)[kRun], int first, uint32_t (&codes)[kRun / 4]) {
    const float levels = static_cast<float>((1 << k.bits) - 1), centre = k.is_signed ? levels * 0.5f : 0.0f;
    const float lowest = k.relu ? centre : -static_cast<float>(k.zero), highest = levels - static_cast<float>(k.zero);
    const uint32_t lacking = (static_cast<uint32_t>(k.zero) - kRintMagicBits) * 0x01010101u;
    LBS_UNROLL for (int c = 0; c < kRun; c += 4) {
        float u[4];
        LBS_UNROLL for (int i = 0; i < 4; ++i) u[i] = y[c + i];
        if (k.pre_scale) {
            const Floats4 scale = *reinterpret_cast<const Floats4*>(k.pre_scale + first + c);
            const Floats4 bias = *reinterpret_cast<const Floats4*>(k.pre_bias + first + c);
            LBS_UNROLL for (int i = 0; i < 4; ++i) u[i] = fused(u[i], scale.v[i], bias.v[i]);
        }
        uint32_t four = lacking;
        LBS_UNROLL for (int i = 0; i < 4; ++i) {
            const float t = fminf(fmaxf(u[i] * k.scale + centre, lowest), highest);
            four += float_bits(t + kRintMagic) << 8 * i;
        }
        codes[c / 4] = four;
    }
}

// What a run of codes stands for.
template <int kRun>
LBS_HD void stand_for(const ConsumerTarget& k, const uint32_t (&codes)[kRun / 4], float (&y)[kRun]) {
    LBS_UNROLL for (int c = 0; c < kRun; ++c) {
        y[c] = static_cast<float>(static_cast<int>(codes[c / 4] >> 8 * (c % 4) & 255u) - k.zero) * k.step;
    }
}

// Which channels of a run exist, one bit each.
template <int kRun>
LBS_HD uint32_t existing(const Layer& p, int first) {
    const int count = p.filters - first;
    return count >= kRun ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
}

// A run's bits of one plane. Filters that do not exist are 0 bits: words are written whole, by halves or by bytes.
template <int kRun>
LBS_HD void store_plane(const Layer& p, const ConsumerTarget& k, int plane, uint32_t bits, int row, int first) {
    const int words = (p.filters + 31) / 32;
    if (first / 32 >= words) return;
    uint32_t* to = static_cast<uint32_t*>(k.codes) + static_cast<int64_t>(row) * k.pitch + plane * words + first / 32;
    bits &= existing<kRun>(p, first);
    if (kRun == 32) *to = bits;
    else if (kRun == 16) reinterpret_cast<uint16_t*>(to)[first % 32 / 16] = static_cast<uint16_t>(bits);
    else reinterpret_cast<uint8_t*>(to)[first % 32 / 8] = static_cast<uint8_t>(bits);
}

// Biased bytes, nibbles or planes of a run of codes.
template <int kRun>
LBS_HD void store_codes(const Layer& p, const ConsumerTarget& k, const uint32_t (&codes)[kRun / 4], int row,
                        int first) {
    if (k.kept == Kept::kBytes) {
        int8_t* to = static_cast<int8_t*>(k.codes) + static_cast<int64_t>(row) * k.pitch + first;
        constexpr int kStored = kRun < 16 ? kRun : 16;
        LBS_UNROLL for (int c = 0; c < kRun; c += kStored) {
            Bytes<kStored> all;
            LBS_UNROLL for (int i = 0; i < kStored / 4; ++i) all.v[i] = codes[c / 4 + i] ^ 0x80808080u;
            if (first + c < k.pitch) *reinterpret_cast<Bytes<kStored>*>(to + c) = all;
        }
        return;
    }
    if constexpr (kRun >= kLeastOfPlanes) {  // no other task is accepted (task.h)
        if (k.kept == Kept::kNibbles) {
            uint32_t* to = static_cast<uint32_t*>(k.codes) + static_cast<int64_t>(row) * k.pitch + first / 8;
            constexpr int kWords = kRun < 16 ? 1 : 2;  // at once: 16 bytes would spill in the largest tile of bits
            LBS_UNROLL for (int w = 0; w < kRun / 8; w += kWords) {
                Bytes<4 * kWords> all;
                LBS_UNROLL for (int i = 0; i < kWords; ++i) all.v[i] = codes[2 * (w + i)] | codes[2 * (w + i) + 1] << 4;
                if (first / 8 + w < k.pitch) *reinterpret_cast<Bytes<4 * kWords>*>(to + w) = all;
            }
            return;
        }
        LBS_NO_UNROLL for (int plane = 0; plane < k.bits; ++plane) {
            uint32_t bits = 0;
            LBS_UNROLL for (int c = 0; c < kRun; c += 4) {
                // Bit 0 of the four bytes, gathered: 2^24 + 2^17 + 2^10 + 2^3 puts byte i at bit 24 + i, without carries.
                bits |= ((codes[c / 4] >> plane & 0x01010101u) * 0x01020408u >> 24) << c;
            }
            store_plane<kRun>(p, k, plane, bits, row, first);
        }
    }
}

// Codes by comparisons with integers: q = number of thresholds reached, from below or (one bit per filter) from above.
// `acc <= T` is `~acc >= ~T`, and ~T is what is stored then. Thresholds are ordered, so bit p of the number is the
// parity of how many of those at multiples of 2^p are reached: planes come without codes.
template <int kRun, int kBlock>
LBS_HD void compare(const Layer& p, const int (&acc)[kRun], int row, int first) {
    const ConsumerTarget& k = p.consumer[0];
    const int levels = (1 << k.bits) - 1, block = first / kBlock;
    const uint32_t flips = p.flips[first / 32] >> first % 32;
    const int* table = p.thresholds + static_cast<int64_t>(block) * levels * kBlock + first % kBlock;
    int value[kRun];
    LBS_UNROLL for (int c = 0; c < kRun; ++c) value[c] = acc[c] ^ -static_cast<int>(flips >> c & 1u);
    uint32_t planes[4] = {0, 0, 0, 0};
    LBS_NO_UNROLL for (int level = 1; level <= levels; ++level, table += kBlock) {
        uint32_t reached = 0;
        LBS_UNROLL for (int c = 0; c < kRun; c += 4) {
            const Ints4 least = *reinterpret_cast<const Ints4*>(table + c);
            LBS_UNROLL for (int i = 0; i < 4; ++i) reached |= value[c + i] >= least.v[i] ? 1u << (c + i) : 0u;
        }
        LBS_UNROLL for (int plane = 0; plane < 4; ++plane) {
            if (level % (1 << plane) == 0) planes[plane] ^= reached;
        }
    }
    LBS_UNROLL for (int plane = 0; plane < 4; ++plane) {
        if (plane < k.bits) store_plane<kRun>(p, k, plane, planes[plane], row, first);
    }
}

// All of it for the accumulators of channels first .. first + kRun - 1 of output pixel `row`, in blocks of kBlock
// filters.
template <int kRun, int kBlock>
LBS_HD void emit(const Layer& p, const int (&acc)[kRun], int row, int first) {
    static_assert(kRun == 32 || kRun == 16 || kRun == 8 || kRun == 4, "a run is a word, or a part of one");
    if (p.accumulators) {
        LBS_UNROLL for (int c = 0; c < kRun; ++c) {
            if (first + c < p.filters) p.accumulators[static_cast<int64_t>(row) * p.filters + first + c] = acc[c];
        }
        return;
    }
    if (p.thresholds) return compare<kRun, kBlock>(p, acc, row, first);
    uint32_t codes[kRun / 4];
    float y[kRun];
    stored_values<kRun>(p, acc, row, first, y);
    LBS_NO_UNROLL for (int k = 0; k < p.consumers; ++k) {
        encode<kRun>(p.consumer[k], y, first, codes);
        store_codes<kRun>(p, p.consumer[k], codes, row, first);
        if (p.consumer[k].stands) stand_for<kRun>(p.consumer[k], codes, y);
    }
}

}  // namespace lbs::gpu
