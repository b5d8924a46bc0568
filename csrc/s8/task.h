// The parameters of an s8 kernel for a task.
#pragma once

#include "cuda/task.h"
#include "s8/tiles.h"

namespace lbs::s8 {

// Weights of 8 bits on the odd grid, 2 q - 255, are no bytes: they are multiplied as w = q - 128 and count as 2 w + 1.
inline bool needs_sums(const Task& t) { return t.w_odd && t.w_bits == 8; }

// Codes of at most 4 bits lie two in a byte.
inline Reads reads(const Task& t) {
    if (t.a_bits <= kNibbleBits) return Reads::kNibbles;
    return needs_sums(t) ? Reads::kSummed : Reads::kBytes;
}

// Parameters of `row` for the task. Raises FormatError for what no kernel serves.
inline Params make_params(const Task& t, const TileRow& row) {
    require(t.a_bits == 8 || (t.a_bits >= 1 && t.a_bits <= kNibbleBits),
            "s8 kernel: activations of " + std::to_string(t.a_bits) + " bits; it takes 8, or nibbles of at most 4");
    const bool nibbles = reads(t) == Reads::kNibbles;
    require(!nibbles || !needs_sums(t), "s8 kernel: weights of 8 bits without a zero multiply bytes, not nibbles");
    require(t.border, "s8 kernel: there is no pixel that padding holds");
    for (const ConsumerTarget& k : t.consumers) {
        require(k.kept == Kept::kBytes || run_of(row.filters) >= kLeastOfPlanes,
                "s8 kernel: tiles of " + std::to_string(row.filters) + " filters write bytes and streams alone");
    }
    Params p{};
    const int64_t sixteens = (t.channels + 15) / 16;
    const bool wide = nibbles && sixteens % 2 == 0;  // pieces of 32 channels
    const int64_t pieces = wide ? sixteens / 2 : sixteens;
    p.piece = nibbles && !wide ? kUnitBytes / 2 : kUnitBytes;
    const int chunk_pieces = (nibbles ? PixelRow<true>::kBytes : PixelRow<false>::kBytes) / p.piece;
    fill_layer(t, {row.groups * kWarpgroupRows, row.filters, pieces, chunk_pieces}, p);
    const int64_t pitch = (pieces * p.piece + kUnitBytes - 1) / kUnitBytes * kUnitBytes;
    check_range(t.batch * t.height * t.width * pitch, 0, kMost, "the number of input bytes");
    p.x = static_cast<const int8_t*>(t.x), p.w = static_cast<const int8_t*>(t.w);
    p.border = static_cast<const int8_t*>(t.border);
    p.pitch = static_cast<int>(pitch);
    const int step_pieces = chunk_pieces / kChunkSteps;
    p.last_steps = (p.k_pieces - (p.chunks - 1) * chunk_pieces + step_pieces - 1) / step_pieces;
    const int most = row.clusters ? kMostBlocks : 1;
    check_range(t.split, 1, p.chunks < most ? p.chunks : most, "the number of thread blocks that share K");
    while (1 << p.split_log < t.split) ++p.split_log;
    require(1 << p.split_log == t.split, "s8 kernel: " + std::to_string(t.split) + " thread blocks share K; 1, 2, 4 or 8");
    check_range(int64_t{p.tiles} * t.split, 0, kMost, "the number of thread blocks");
    const int x_scale = t.is_signed ? 2 : 1;
    p.dot_scale = (needs_sums(t) ? 2 : 1) * x_scale;
    p.sum_scale = needs_sums(t) ? x_scale : 0;
    return p;
}

}  // namespace lbs::s8
