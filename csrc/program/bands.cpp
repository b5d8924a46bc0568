#include "program/bands.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>

#include "program/plan_builder.h"

namespace lbs {
namespace {

constexpr int64_t kWholeBytes = 1 << 19;  // of streams that stay in a second-level cache as they are
constexpr int64_t kBandBytes = 1 << 18;

// Floats of a channel for so many rows of the result, where the first may begin within a vector.
int64_t band_floats(const PoolStreamPlan& max, int rows, int lanes) {
    const int64_t first = int64_t{std::min(rows, max.rows) - 1} * max.row_stride;
    const int64_t pixels = (first + max.kernel_rows) * max.width;
    return int64_t{vector_count(pixels, lanes) + 1} * lanes;
}

}  // namespace

BandPlan plan_bands(const ConvPlan& conv, const PoolStreamPlan& max, int lanes) {
    BandPlan plan;
    const auto bytes = [&](int units) {
        return 4 * conv.emit.channels * band_floats(max, units * plan.unit_rows, lanes);
    };
    if (conv.is_thinned || 4 * conv.emit.channels * conv.emit.pixels < kWholeBytes) return plan;
    plan.unit_rows = lanes / std::gcd(max.columns, lanes);
    if (bytes(1) > 2 * kBandBytes) return plan;
    plan.unit_count = (max.rows + plan.unit_rows - 1) / plan.unit_rows;
    for (plan.units = 1; plan.units < plan.unit_count && bytes(plan.units + 1) <= kBandBytes; ++plan.units) {
    }
    plan.conv = conv;
    plan.conv.emit.pixels = band_floats(max, plan.units * plan.unit_rows, lanes);
    return plan;
}

double run_bands(const StepPlan& step, const KernelTable& kernels, const RunContext& context, const BandMemory& memory,
                 const Team::Member& self, bool timed) {
    using Clock = std::chrono::steady_clock;
    const BandPlan& plan = step.bands;
    const PoolStreamPlan& max = step.max;
    const EmitPlan& emit = step.emit;
    const int lanes = kernels.lanes, channels = plan.conv.emit.channels;
    const int64_t pitch = plan.conv.emit.pixels;
    float* const stream = reinterpret_cast<float*>(memory.stream);
    float* const rows = memory.floats + pool_rows_at(emit);
    const int last_unit = static_cast<int>(int64_t{plan.unit_count} * (self.rank + 1) / self.size);
    int unit = static_cast<int>(int64_t{plan.unit_count} * self.rank / self.size);
    int held = 0, done = -1;  // vectors of the stream: the first in memory, and behind the last
    double seconds = 0;
    for (; unit < last_unit; unit += plan.units) {
        const int first = unit * plan.unit_rows;
        const int last = std::min(std::min(unit + plan.units, last_unit) * plan.unit_rows, max.rows);
        const int start = first * max.row_stride - max.top, begin = std::max(start, 0);
        const int end = std::min((last - 1) * max.row_stride - max.top + max.kernel_rows, max.height);
        const int64_t first_pixel = int64_t{begin} * max.width;
        const int from = static_cast<int>(first_pixel / lanes), to = vector_count(int64_t{end} * max.width, lanes);
        if (done > from)  // what the band before has as well
            for (int channel = 0; channel < channels; ++channel) {
                float* plane = stream + channel * pitch;
                std::memmove(plane, plane + int64_t{from - held} * lanes, size_t{4} * (done - from) * lanes);
            }
        held = from;
        memory.tensors[plan.conv.emit.stream] = memory.stream - int64_t{4} * from * lanes;
        const Clock::time_point before = timed ? Clock::now() : Clock::time_point();
        kernels.conv(plan.conv, context, std::max(done, from), to, 0, plan.conv.block_count);
        if (timed) seconds += std::chrono::duration<double>(Clock::now() - before).count();
        done = to;

        PoolStreamPlan part = max;
        part.height = end - begin;
        part.rows = last - first;
        part.top = begin - start;
        const int64_t made = int64_t{first} * max.columns;
        for (int channel = 0; channel < channels; ++channel) {
            const float* plane = stream + channel * pitch + first_pixel - int64_t{from} * lanes;
            kernels.max_plane(part, plane, rows, memory.floats + channel % 4 * emit.pixels + made);
            if (channel % 4 == 3 || channel + 1 == channels)
                kernels.emit_planes(emit, context, memory.floats, channel / 4 * 4, channel / 4, channel / 4 + 1,
                                    static_cast<int>(made / lanes), vector_count(int64_t{last} * max.columns, lanes));
        }
    }
    return seconds;
}

}  // namespace lbs
