#include "bitconv2d/lanes_cpu.h"

#include <algorithm>
#include <limits>

#include "bitconv2d/bitconv2d_cpu.h"

namespace lbs {
namespace {

constexpr int kMostTurned = 256;  // pixels: sums and dots of a block of filters stay in the first caches
constexpr int kMostPixels = 1024;

// Four pixels after the other, of groups of `per_group`, or of rows where that is 0.
PixelOffsets offsets_of(const CodeLayout& layout, int64_t first, int width, int pixels, int per_group, Store& store) {
    std::vector<int32_t> offsets;
    for (int i = 0; i < pixels; ++i)
        offsets.push_back(
            static_cast<int32_t>((layout.is_row ? layout.offset(0, i) : layout.offset(i / width, i % width)) - first));
    if (per_group == 0) return {store.keep(offsets), layout.phases == 1, nullptr};
    const int fours = (per_group + 3) / 4;
    uint8_t* is_run = store.make<uint8_t>(static_cast<size_t>(vector_count(pixels, per_group) * fours));
    for (int begin = 0; begin < pixels; begin += per_group)
        for (int i = 0; i < per_group && begin + i < pixels; i += 4) {
            const int from = begin + i, count = std::min(std::min(4, per_group - i), pixels - from);
            bool is_joined = true;
            for (int j = 1; j < count; ++j)
                is_joined =
                    is_joined && offsets[static_cast<size_t>(from + j)] == offsets[static_cast<size_t>(from)] + 4 * j;
            is_run[begin / per_group * fours + i / 4] = is_joined;
        }
    return {store.keep(offsets), layout.phases == 1, is_run};
}

bool suits_lanes(const StepSpec& step, const TensorSpec& source, int height, int width, const KernelTable& kernels,
                 const EmitPlan& emit) {
    const int most = is_made_in_place(source, kernels, emit) ? kMostPixels : kMostTurned;
    return step.groups == 1 && !needs_sum(step) && !kernels.uses_tiles && int64_t{height} * width <= most;
}

}  // namespace

std::vector<FilterCut> cut_vectors(int filters, const KernelTable& kernels) {
    const int vectors = vector_count(filters, kernels.lanes);
    int count = vector_count(vectors, kernels.lanes_vectors);
    if (count > 1 && count < vectors) count += count % 2;  // so that two threads get as much
    std::vector<FilterCut> cut;
    for (int b = 0; b < count; ++b) {
        const int first = vectors * b / count, last = vectors * (b + 1) / count;
        cut.push_back({first * kernels.lanes, (last - first) * kernels.lanes});
    }
    return cut;
}

// Floats of channels that are not there have no place.
bool is_made_in_place(const TensorSpec& source, const KernelTable& kernels, const EmitPlan& emit) {
    return emit.is_lean && !source.is_signed &&
           ((emit.stream < 0 && emit.residual < 0) || emit.channels % kernels.lanes == 0);
}

PixelPlan place_pixels(const std::vector<CodeLayout>& layouts, const EmitPlan& emit, int width, int pixels,
                       int per_group, Store& store) {
    const auto place = [&](int tensor, int64_t first) {
        return offsets_of(layouts[static_cast<size_t>(tensor)], first, width, pixels, per_group, store);
    };
    PixelOffsets* outputs = store.make<PixelOffsets>(static_cast<size_t>(emit.consumer_count));
    for (int i = 0; i < emit.consumer_count; ++i) outputs[i] = place(emit.consumers[i].tensor, 0);
    PixelPlan plan{true, pixels, outputs, {}};
    if (emit.coded.tensor >= 0) plan.residual = place(emit.coded.tensor, emit.coded.first);
    return plan;
}

// A step of K loads weights and broadcasts codes, two a cycle.
double lanes_cycles(const StepSpec& step, const TensorSpec& source, const CodeLayout& layout, int filters, int height,
                    int width, const KernelTable& kernels, const EmitPlan& emit) {
    if (!suits_lanes(step, source, height, width, kernels, emit)) return std::numeric_limits<double>::infinity();
    const int k_steps = step.kernel.y * step.kernel.x * layout.groups;
    const double vectors = static_cast<double>(vector_count(filters, kernels.lanes));
    const int groups = vector_count(height * width, kernels.lanes_pixels);
    const double loads = (kernels.lanes_vectors + kernels.lanes_pixels + 2) / 2.0 / kernels.lanes_vectors;
    const double dots = kernels.lanes_pixels * kernels.dot_cycles;
    const double multiplied = vectors * groups * k_steps * std::max(dots, loads);
    if (is_made_in_place(source, kernels, emit)) {
        // Of the vector of a pixel, half in the shadow of dots; codes of strided readers lie apart.
        const bool is_apart = emit.consumer_count > 0 && (emit.consumers->map.compress || !emit.consumers->map.pieces);
        const double made = 5.7 + (emit.is_usual ? 0 : 6) + (is_apart ? 4 : 0);
        return multiplied + vectors * groups * kernels.lanes_pixels * made;
    }
    constexpr double kTurn = 30, kQuad = 30;  // of a vector of dots from memory; of the epilogue, in nothing's shadow
    const double results = vectors * kernels.lanes * vector_count(groups * kernels.lanes_pixels, kernels.lanes);
    return multiplied + results * (kTurn + kQuad / 4);
}

bool plan_lanes(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout, const KernelTable& kernels,
                Algorithm algorithm, const EmitPlan& emit, Store& store, LanesPlan& plan) {
    const TensorSpec& source = program.tensors[static_cast<size_t>(step.input)];
    const int height = output_size(source.height, step.kernel.y, step.stride.y, step.padding.y, step.dilation.y);
    const int width = output_size(source.width, step.kernel.x, step.stride.x, step.padding.x, step.dilation.x);
    const int pixels = height * width, filters = static_cast<int>(program.array(step.planes).shape[1]);
    if (algorithm == Algorithm::kDirect || !suits_lanes(step, source, height, width, kernels, emit)) return false;
    const int taps = step.kernel.y * step.kernel.x, lanes = kernels.lanes;
    plan.input = step.input;
    plan.k_steps = taps * layout.groups;
    plan.padded_pixels = vector_count(pixels, kernels.lanes_pixels) * kernels.lanes_pixels;
    if (!names_lanes(algorithm) && lanes_cycles(step, source, layout, filters, height, width, kernels, emit) >
                                       direct_cycles(step, source, layout, filters, height, width, kernels, emit))
        return false;

    plan.wide = needs_wide_dot(kernels, step, source.bits);
    plan.k_offsets = store.keep(window_offsets(layout, step, layout.groups));
    std::vector<int32_t> offsets(static_cast<size_t>(plan.padded_pixels));
    const int row = layout.is_row ? pixels : width;
    for (int i = 0; i < plan.padded_pixels; ++i) {
        const int pixel = std::min(i, pixels - 1), y = pixel / row * step.stride.y, x = pixel % row * step.stride.x;
        const int64_t column = layout.offset(0, x - step.padding.x) - layout.offset(0, -step.padding.x);
        offsets[static_cast<size_t>(i)] = static_cast<int32_t>(y * layout.row_pitch() + column);
    }
    plan.pixel_offsets = store.keep(offsets);

    const std::vector<FilterCut> cut = cut_vectors(filters, kernels);
    plan.block_count = static_cast<int>(cut.size());
    const auto step_bytes = static_cast<size_t>(4 * lanes);
    int8_t* weights = store.make<int8_t>(static_cast<size_t>(vector_count(filters, lanes)) *
                                         static_cast<size_t>(plan.k_steps) * step_bytes);
    LanesBlock* blocks = store.make<LanesBlock>(static_cast<size_t>(plan.block_count));
    const std::vector<uint8_t> codes =
        unpack_weight_codes(program.integers(step.planes), step.w_bits, filters, taps, source.channels);
    for (size_t b = 0; b < cut.size(); ++b) {
        const int held = cut[b].width / lanes;
        blocks[b] = {cut[b].first, held, weights};
        write_weights(step, codes, filters, source.channels, blocks[b].first, held * lanes, weights);
        weights += static_cast<size_t>(held) * static_cast<size_t>(plan.k_steps) * step_bytes;
    }
    plan.blocks = blocks;
    plan.acc = plan_accumulator(program, step, source, filters, weight_sums(step, filters, codes), store);
    return true;
}

int64_t lanes_bytes(const LanesPlan& plan, const KernelTable& kernels) {
    if (plan.made.is_placed) return 0;
    const int64_t widest = int64_t{4} * kernels.lanes_vectors * kernels.lanes;
    const int64_t whole = int64_t{vector_count(plan.padded_pixels, kernels.lanes)} * kernels.lanes;
    return widest * (plan.padded_pixels + 2 * whole);  // sums that are read in whole vectors, dots
}

}  // namespace lbs
