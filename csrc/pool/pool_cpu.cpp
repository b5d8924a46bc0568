#include "pool/pool_cpu.h"

#include <algorithm>

namespace lbs {
namespace {

// The part of a window that lies inside: taps [first, last).
struct Span {
    int first, last;
};

Span window(int position, int stride, int padding, int kernel, int size) {
    const int start = position * stride - padding;
    return {std::max(start, 0), std::min(start + kernel, size)};
}

}  // namespace

void mean_planes(const float* stream, int channels, int64_t pixels, float* out) {
    // Eight sums side by side: the order within a channel is fixed, so only channels can overlap.
    constexpr int kTogether = 8;
    const float factor = static_cast<float>(1.0 / static_cast<double>(pixels));
    for (int first = 0; first < channels; first += kTogether) {
        const int count = std::min(kTogether, channels - first);
        const float* planes[kTogether];
        float sums[kTogether];
        for (int c = 0; c < kTogether; ++c) {
            planes[c] = stream + (first + std::min(c, count - 1)) * pixels;
            sums[c] = planes[c][0];
        }
        for (int64_t i = 1; i < pixels; ++i)
            for (int c = 0; c < kTogether; ++c) sums[c] += planes[c][i];
        for (int c = 0; c < count; ++c) out[first + c] = sums[c] * factor;
    }
}

void average_plane(const float* plane, int height, int width, const StepSpec& step, float* out) {
    const int rows = output_size(height, step.kernel.y, step.stride.y, step.padding.y, 1);
    const int columns = output_size(width, step.kernel.x, step.stride.x, step.padding.x, 1);
    const double taps = static_cast<double>(step.kernel.y) * step.kernel.x;
    const float factor = static_cast<float>(1.0 / taps);
    for (int y = 0; y < rows; ++y) {
        const Span down = window(y, step.stride.y, step.padding.y, step.kernel.y, height);
        for (int x = 0; x < columns; ++x) {
            const Span across = window(x, step.stride.x, step.padding.x, step.kernel.x, width);
            float sum = 0.0f;
            for (int row = down.first; row < down.last; ++row)
                for (int column = across.first; column < across.last; ++column)
                    sum += plane[static_cast<int64_t>(row) * width + column];
            *out++ = sum * factor;
        }
    }
}

void max_codes(const unsigned char* in, const CodeLayout& in_layout, const StepSpec& step, unsigned char* out,
               const CodeLayout& out_layout, int first_group, int last_group) {
    for (int y = 0; y < out_layout.height; ++y) {
        const Span rows = window(y, step.stride.y, step.padding.y, step.kernel.y, in_layout.height);
        for (int x = 0; x < out_layout.width; ++x) {
            const Span columns = window(x, step.stride.x, step.padding.x, step.kernel.x, in_layout.width);
            for (int channel = 4 * first_group; channel < 4 * last_group; ++channel) {
                unsigned char best = 0;
                for (int row = rows.first; row < rows.last; ++row)
                    for (int column = columns.first; column < columns.last; ++column)
                        best = std::max(best, in[in_layout.offset(row, column, channel)]);
                out[out_layout.offset(y, x, channel)] = best;
            }
        }
    }
}

}  // namespace lbs
