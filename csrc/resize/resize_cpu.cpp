#include "resize/resize_cpu.h"

#include <algorithm>
#include <cmath>

namespace lbs {
namespace {

// A side under construction. Whole vectors are read, beyond the last as well: zeros lead to pixel 0.
struct Taps {
    int32_t *first, *second;
    float *weights, *others;

    Taps(Store& store, int size, int count, double scale, double offset) {
        const auto entries = static_cast<size_t>(count) + kMaxLanes;
        first = store.make<int32_t>(entries);
        second = store.make<int32_t>(entries);
        weights = store.make<float>(entries);
        others = store.make<float>(entries);
        for (int i = 0; i < count; ++i) {
            const double at = std::min(std::max(i * scale + offset, 0.0), static_cast<double>(size - 1));
            first[i] = static_cast<int32_t>(std::floor(at));
            second[i] = std::min(first[i] + 1, size - 1);
            weights[i] = static_cast<float>(at - first[i]);
            others[i] = 1.0f - weights[i];
        }
    }
};

}  // namespace

ResizeSide resize_side(Store& store, int size, int count, double scale, double offset) {
    const Taps taps(store, size, count, scale, offset);
    return {taps.first, taps.second, taps.weights, taps.others};
}

ResizeSide resize_columns(Store& store, int size, int count, double scale, double offset, int lanes) {
    const Taps taps(store, size, count, scale, offset);
    // Positions do not fall, so a vector lies between its first and its last.
    const auto last = [&](int start) { return std::min(start + lanes, count) - 1; };
    bool near = true;
    for (int start = 0; start < count; start += lanes)
        near = near && taps.second[last(start)] - taps.first[start] < lanes;
    Piece* spans = near ? store.make<Piece>(static_cast<size_t>(vector_count(count, lanes))) : nullptr;
    for (int start = 0; start < count; start += lanes) {
        const int base = near ? taps.first[start] : 0, unit = near ? 1 : 4, end = last(start);
        if (near) spans[start / lanes] = {4 * base, (1u << std::min(lanes, size - base)) - 1u};
        for (int i = start; i <= end; ++i) {
            taps.first[i] = unit * (taps.first[i] - base);
            taps.second[i] = unit * (taps.second[i] - base);
        }
    }
    return {taps.first, taps.second, taps.weights, taps.others, spans};
}

}  // namespace lbs
