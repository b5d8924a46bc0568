// The parameters of a one-bit kernel for a task.
#pragma once

#include "cuda/task.h"
#include "onebit/tiles.h"

namespace lbs::onebit {

// Pairs of planes, the most significant first; a step down by one pair multiplies what is there by 2^2.
inline void plan_passes(int w_pairs, int a_pairs, Params& p) {
    p.passes = 0;
    for (int sum = w_pairs + a_pairs - 2; sum >= 0; --sum) {
        bool down = p.passes > 0;
        for (int w = 0; w < w_pairs; ++w) {
            const int a = sum - w;
            if (a < 0 || a >= a_pairs) continue;
            p.pass[p.passes++] = {w, a, down ? 2 : 0, w == 0};
            down = false;
        }
    }
}

// Parameters of `row` for the task. Raises FormatError for what no kernel serves.
inline Params make_params(const Task& t, const TileRow& row) {
    for (int bits : {t.w_bits, t.a_bits})
        require(bits == 2 || bits == 4, "one-bit kernel: codes of " + std::to_string(bits) + " bits; it takes 2 or 4");
    require(t.split == 1, "one-bit kernel: K is shared by " + std::to_string(t.split) + " thread blocks; it takes 1");
    Params p{};
    const int64_t words = (t.channels + kWord - 1) / kWord;
    fill_layer(t, {row.groups * kWarpgroupRows, row.filters, words, kChunkWords}, p);
    check_range(t.batch * t.height * t.width * words * t.a_bits, 0, kMost, "the number of input words");
    p.x = static_cast<const uint32_t*>(t.x), p.w = static_cast<const uint32_t*>(t.w);
    p.words = static_cast<int>(words);
    p.pixel_words = t.a_bits * p.words;
    p.copy_words = words % 4 == 0 ? 4 : words % 2 == 0 ? 2 : 1;
    p.steps = (p.k_pieces + kStepWords - 1) / kStepWords;
    plan_passes(t.w_bits / 2, t.a_bits / 2, p);
    const int x_scale = t.is_signed ? 2 : 1;
    p.dot_scale = (t.w_odd ? 2 : 1) * x_scale;
    p.sum_scale = -(t.w_odd ? (1 << t.w_bits) - 1 : 1 << (t.w_bits - 1)) * x_scale;
    return p;
}

}  // namespace lbs::onebit
