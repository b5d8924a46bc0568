#include "resize/resize_cpu.h"

#include <algorithm>
#include <cmath>

namespace lbs {

ResizeSide resize_side(Store& store, int size, int count, double scale, double offset, int unit) {
    // Whole vectors are read, beyond the last as well: zeros lead to pixel 0.
    const auto entries = static_cast<size_t>(count) + kMaxLanes;
    int32_t* first = store.make<int32_t>(entries);
    int32_t* second = store.make<int32_t>(entries);
    float* weights = store.make<float>(entries);
    float* others = store.make<float>(entries);
    for (int i = 0; i < count; ++i) {
        const double at = std::min(std::max(i * scale + offset, 0.0), static_cast<double>(size - 1));
        const int k = static_cast<int>(std::floor(at));
        first[i] = unit * k;
        second[i] = unit * std::min(k + 1, size - 1);
        weights[i] = static_cast<float>(at - k);
        others[i] = 1.0f - weights[i];
    }
    return {first, second, weights, others};
}

}  // namespace lbs
