#include "bitconv2d/depthwise_cpu.h"

#include <algorithm>

#include "bitconv2d/bitconv2d_cpu.h"

namespace lbs {
namespace {

constexpr int kKept = 256;  // dots beyond a row, so that those left over are moved rarely
// Integers: rows of larger images, or of more rows, stay in no cache.
constexpr int64_t kMostScratch = int64_t{1} << 20;

int quads_of(const StepSpec& step) { return (step.kernel.x + 3) / 4; }

int width_of(const StepSpec& step, const TensorSpec& source) {
    return output_size(source.width, step.kernel.x, step.stride.x, step.padding.x, step.dilation.x);
}

int whole_vectors(int pixels, int lanes) { return (pixels + lanes - 1) / lanes * lanes; }

// Bytes from the first tap of a row to another. Where the kernel has none, its weight is zero and the last is read.
int32_t tap_offset(const StepSpec& step, const CodeLayout& layout, int tap) {
    const int column = std::min(tap, step.kernel.x - 1) * step.dilation.x - step.padding.x;
    return static_cast<int32_t>(layout.offset(0, column) - layout.offset(0, -step.padding.x));
}

int ring_of(const StepSpec& step) { return (step.kernel.y - 1) * step.dilation.y + 1; }

}  // namespace

bool is_depthwise(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout, const EmitPlan& emit,
                  int lanes) {
    const TensorSpec& source = program.tensors[static_cast<size_t>(step.input)];
    if (step.groups != source.channels || program.array(step.planes).shape[1] != source.channels) return false;
    // Short windows need no codes to be spread: taps in fours (plan_taps), or sums over four channels each.
    const int taps = step.kernel.y * step.kernel.x;
    if (taps <= kShortTaps && is_short(step, source, taps, emit)) return false;
    if (layout.phases != step.stride.x || layout.is_row) return false;
    if (int64_t{step.kernel.y} * quads_of(step) > kMaxQuads) return false;
    const int64_t spread = whole_vectors(width_of(step, source), lanes);
    if (4 * spread * ring_of(step) * quads_of(step) > kMostScratch) return false;
    // The last group of the last row, as far as its vectors reach.
    int32_t farthest = 0;
    for (int tap = 0; tap < step.kernel.x; ++tap) farthest = std::max(farthest, tap_offset(step, layout, tap));
    const int rows = output_size(source.height, step.kernel.y, step.stride.y, step.padding.y, step.dilation.y);
    const int last = (rows - 1) * step.stride.y + (step.kernel.y - 1) * step.dilation.y - step.padding.y;
    const int64_t end =
        layout.offset(last, -step.padding.x) + (layout.groups - 1) * layout.group_pitch() + farthest + 4 * spread;
    return end <= layout.bytes() + kSlack;
}

void plan_depthwise(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout,
                    const KernelTable& kernels, Store& store, DepthwisePlan& plan) {
    const TensorSpec& source = program.tensors[static_cast<size_t>(step.input)];
    const int channels = source.channels, taps = step.kernel.y * step.kernel.x;
    plan.input = step.input;
    plan.groups = layout.groups;
    plan.width = width_of(step, source);
    plan.kernel_rows = step.kernel.y;
    plan.quads = quads_of(step);
    plan.stride = step.stride.y;
    plan.dilation = step.dilation.y;
    int32_t* offsets = store.make<int32_t>(static_cast<size_t>(4) * plan.quads);
    for (int tap = 0; tap < 4 * plan.quads; ++tap) offsets[tap] = tap_offset(step, layout, tap);
    plan.taps = offsets;
    plan.spread = whole_vectors(plan.width, kernels.lanes);
    plan.ring = ring_of(step);
    plan.kept = whole_vectors(plan.width + kKept, kernels.lanes);
    plan.first = layout.offset(-step.padding.y, -step.padding.x);
    plan.row_pitch = layout.row_pitch();
    plan.group_pitch = layout.group_pitch();
    plan.wide = needs_wide_dot(kernels, step, source.bits);

    const std::vector<uint8_t> codes =
        unpack_weight_codes(program.integers(step.planes), step.w_bits, channels, taps, 1);
    std::vector<int64_t> sums(static_cast<size_t>(channels), 0);
    const size_t group_bytes = static_cast<size_t>(16) * step.kernel.y * plan.quads;
    int8_t* weights = store.make<int8_t>(static_cast<size_t>(plan.groups) * group_bytes);
    int8_t* ones = needs_sum(step) ? store.make<int8_t>(group_bytes) : nullptr;
    for (int channel = 0; channel < channels; ++channel)
        for (int tap = 0; tap < taps; ++tap) {
            const int code = codes[static_cast<size_t>(channel) * taps + tap];
            const int row = tap / step.kernel.x, column = tap % step.kernel.x;
            const int quad = row * plan.quads + column / 4;
            const int place = (quad * 4 + channel % 4) * 4 + column % 4;
            weights[channel / 4 * group_bytes + static_cast<size_t>(place)] =
                static_cast<int8_t>(stored_weight(step, code));
            if (ones) ones[place] = 1;
            sums[static_cast<size_t>(channel)] += weight_units(step, code);
        }
    plan.weights = weights;
    plan.ones = ones;
    plan.acc = plan_accumulator(program, step, source, channels, sums, store);
}

void plan_taps(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout, Store& store,
               ConvPlan& plan) {
    const int channels = program.tensors[static_cast<size_t>(step.input)].channels;
    const int taps = step.kernel.y * step.kernel.x;
    const EmitPlan& emit = plan.emit;
    if (plan.is_thinned || step.groups != channels || emit.channels != channels || !emit.is_usual || emit.consumer_count != 1 ||
        emit.coded.tensor >= 0 || emit.consumers->map.pieces == 0)
        return;
    plan.tap_quads = (taps + 3) / 4;
    plan.last_alone = taps % 4 == 1;
    std::vector<int32_t> offsets = window_offsets(layout, step, 1);
    offsets.resize(static_cast<size_t>(4) * plan.tap_quads, offsets.back());
    plan.tap_offsets = store.keep(offsets);
    const std::vector<uint8_t> codes =
        unpack_weight_codes(program.integers(step.planes), step.w_bits, channels, taps, 1);
    int8_t* weights = store.make<int8_t>(static_cast<size_t>(layout.groups) * 16 * plan.tap_quads);
    for (int channel = 0; channel < channels; ++channel)
        for (int tap = 0; tap < taps; ++tap) {
            const int quad = channel / 4 * plan.tap_quads + tap / 4;
            weights[(quad * 4 + channel % 4) * 4 + tap % 4] =
                static_cast<int8_t>(stored_weight(step, codes[static_cast<size_t>(channel) * taps + tap]));
        }
    plan.tap_weights = weights;
}

int64_t depthwise_scratch(const DepthwisePlan& plan) {
    return int64_t{4} * plan.ring * plan.quads * plan.spread + int64_t{8} * plan.kept + kMaxLanes;
}

}  // namespace lbs
