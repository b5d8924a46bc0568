#include "bitconv2d/bitconv2d_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/format.h"

namespace lbs {
namespace {

int round_up(int value, int step) { return (value + step - 1) / step * step; }

// Cycles of one tile: dots and loads issue two per cycle each, and a dot takes four. See bitconv2d_kernel.h for the
// cost of the epilogue. Measured on Zen 5; only ratios matter.
double tile_cost(int vectors, int filters, int pieces, int k_steps) {
    const double dots = vectors * filters / 2.0;
    const double loads =
        (vectors * std::max(1, pieces) * 2 + filters + 1) / 2.0;  // activations mostly cross cache lines
    const double epilogue = vectors * filters / 4 * (vectors * filters >= 24 ? 7.0 : 20.0);
    return k_steps * std::max({dots, loads, 4.0}) + epilogue;
}

double block_cost(TileShape shape, int vectors, int pieces, int k_steps) {
    const int full = vectors / shape.vectors, rest = vectors % shape.vectors;
    return full * tile_cost(shape.vectors, shape.filters, pieces, k_steps) +
           (rest ? tile_cost(rest, shape.filters, pieces, k_steps) : 0.0);
}

// Filters of different groups read different channels: a block spans two groups only where four filters already do.
std::vector<FilterCut> cut_grouped(int filters, int per_group, const TileShape* shapes) {
    std::vector<FilterCut> blocks;
    for (int first = 0; first < filters;) {
        int width = 4;
        const int group_end = (first / per_group + 1) * per_group;
        for (const TileShape* shape = shapes; shape->filters; ++shape)
            if (shape->filters > width && first + shape->filters <= group_end) width = shape->filters;
        blocks.push_back({first, width});
        first += width;
    }
    return blocks;
}

// Groups of four channels [first, last) that the filters of a block read.
struct Range {
    int first, last;
};

Range channel_range(const FilterCut& block, int filters, int filters_per_group, int channels_per_group) {
    const int last_filter = std::min(block.first + block.width, filters) - 1;
    const int first = block.first / filters_per_group * channels_per_group / 4;
    const int last = ((last_filter / filters_per_group + 1) * channels_per_group + 3) / 4;
    return {first, last};
}

// Where weight codes go: int8 [k_steps][width][4], k in (row, group, column) order, zeros where nothing is.
class BlockWriter {
public:
    BlockWriter(const StepSpec& step, const std::vector<uint8_t>& codes, int filters, int channels, int range)
        : step_(step), codes_(codes), filters_(filters), channels_(channels), range_(range) {}

    int steps() const { return step_.kernel.y * step_.kernel.x * range_; }

    // value(filter, tap, channel) for every weight of `width` filters.
    template <class Value>
    void write(int first, int width, int first_group, int8_t* out, const Value& value) const {
        const int per_group = filters_ / step_.groups, taps = step_.kernel.y * step_.kernel.x;
        for (int f = 0; f < width && first + f < filters_; ++f) {
            const int filter = first + f;
            const int base = filter / per_group * channels_;
            for (int tap = 0; tap < taps; ++tap)
                for (int c = 0; c < channels_; ++c) {
                    const int channel = base + c - 4 * first_group;
                    const int row = tap / step_.kernel.x, column = tap % step_.kernel.x;
                    const int k = (row * range_ + channel / 4) * step_.kernel.x + column;
                    out[(static_cast<size_t>(k) * width + f) * 4 + channel % 4] =
                        static_cast<int8_t>(value(filter, tap, c));
                }
        }
    }

    int code(int filter, int tap, int channel) const {
        const size_t taps = static_cast<size_t>(step_.kernel.y) * step_.kernel.x;
        return codes_[(static_cast<size_t>(filter) * taps + tap) * channels_ + channel];
    }

private:
    const StepSpec& step_;
    const std::vector<uint8_t>& codes_;
    int filters_, channels_, range_;
};

// A rows of the tile multiply: [filters / 16][k_steps / 16][16 filters][16 steps][4].
const int8_t* tile_weights(const BlockWriter& writer, const StepSpec& step, int filters, Store& store) {
    const int steps = writer.steps(), chunks = (steps + 15) / 16, groups = (filters + 15) / 16;
    int8_t* tiles = store.make<int8_t>(static_cast<size_t>(groups) * chunks * 1024);
    std::vector<int8_t> flat(static_cast<size_t>(steps) * 64);
    for (int group = 0; group < groups; ++group) {
        std::fill(flat.begin(), flat.end(), int8_t{0});
        const auto value = [&](int filter, int tap, int c) { return stored_weight(step, writer.code(filter, tap, c)); };
        writer.write(16 * group, 16, 0, flat.data(), value);
        for (int k = 0; k < steps; ++k)
            for (int f = 0; f < 16; ++f)
                std::copy_n(&flat[(static_cast<size_t>(k) * 16 + f) * 4], 4,
                            tiles + (static_cast<size_t>(group) * chunks + k / 16) * 1024 + f * 64 + k % 16 * 4);
    }
    return tiles;
}

}  // namespace

std::vector<FilterCut> cut_filters(int filters, int vectors, int pieces, int k_steps, const TileShape* shapes) {
    const size_t units = static_cast<size_t>(round_up(filters, 4) / 4);
    std::vector<double> best(units + 1, std::numeric_limits<double>::infinity());
    std::vector<int> taken(units + 1, 0);
    best[0] = 0.0;
    for (const TileShape* shape = shapes; shape->filters; ++shape) {
        const size_t width = static_cast<size_t>(shape->filters / 4);
        const double cost = block_cost(*shape, vectors, pieces, k_steps);
        for (size_t i = width; i <= units; ++i)
            if (best[i - width] + cost < best[i]) {
                best[i] = best[i - width] + cost;
                taken[i] = shape->filters;
            }
    }
    std::vector<FilterCut> blocks;
    for (size_t i = units; i > 0; i -= static_cast<size_t>(taken[i] / 4)) blocks.push_back({0, taken[i]});
    int first = 0;
    for (FilterCut& block : blocks) {
        block.first = first;
        first += block.width;
    }
    return blocks;
}

double direct_cycles(const StepSpec& step, const TensorSpec& source, const CodeLayout& layout, int filters, int height,
                     int width, const KernelTable& kernels, const EmitPlan& emit) {
    const int vectors = vector_count(int64_t{height} * width, kernels.lanes);
    const int taps = step.kernel.y * step.kernel.x, steps = taps * layout.groups;
    int pieces = width % kernels.lanes == 0 || layout.is_row ? 1 : 1 + kernels.lanes / width;
    if (taps == 1 && layout.phases != step.stride.x) pieces = 1;         // of a copy
    else if (layout.phases != step.stride.x || pieces > 4) pieces = 16;  // an offset for every lane
    if (is_short(step, source, steps, emit)) {
        // What is seen of the epilogue; on a Zen 5 13 cycles where codes are stored in whole vectors, 19 in rows of 28,
        // 27 of 14.
        const PixelMap& map = emit.consumers->map;
        const double quad = map.pieces == 1 && !map.masked ? 13 : 12 + 210.0 / width;
        return (steps * 4 * kernels.dot_cycles + quad) * vectors * ((filters + 3) / 4);
    }
    double cost = 0;
    for (const FilterCut& block : cut_filters(filters, vectors, pieces, steps, kernels.shapes))
        for (const TileShape* shape = kernels.shapes; shape->filters; ++shape)
            if (shape->filters == block.width) cost += block_cost(*shape, vectors, pieces, steps);
    return cost * kernels.dot_cycles / 0.5;
}

void write_weights(const StepSpec& step, const std::vector<uint8_t>& codes, int filters, int channels, int first,
                   int width, int8_t* out) {
    const BlockWriter writer(step, codes, filters, channels, (channels + 3) / 4);
    writer.write(first, width, 0, out,
                 [&](int o, int tap, int c) { return stored_weight(step, writer.code(o, tap, c)); });
}

std::vector<uint8_t> unpack_weight_codes(const int32_t* planes, int bits, int filters, int taps, int channels) {
    const size_t words = (static_cast<size_t>(channels) + kWord - 1) / kWord;
    const size_t rows = static_cast<size_t>(filters) * taps;
    std::vector<uint8_t> codes(rows * channels, 0);
    for (int plane = 0; plane < bits; ++plane)
        for (size_t row = 0; row < rows; ++row) {
            const int32_t* word = planes + (static_cast<size_t>(plane) * rows + row) * words;
            for (int c = 0; c < channels; ++c)
                codes[row * channels + c] |=
                    static_cast<uint8_t>((static_cast<uint32_t>(word[c / kWord]) >> (c % kWord) & 1u) << plane);
        }
    return codes;
}

std::vector<int64_t> weight_sums(const StepSpec& step, int filters, const std::vector<uint8_t>& codes) {
    std::vector<int64_t> sums(static_cast<size_t>(filters), 0);
    const size_t each = codes.size() / sums.size();
    for (size_t i = 0; i < codes.size(); ++i) sums[i / each] += weight_units(step, codes[i]);
    return sums;
}

AccumulatorPlan plan_accumulator(const ProgramSpec& program, const StepSpec& step, const TensorSpec& source,
                                 int filters, const std::vector<int64_t>& weight_sums, Store& store) {
    AccumulatorPlan plan;
    plan.needs_sum = needs_sum(step);
    plan.shift = plan.needs_sum ? 1 : 0;
    int64_t offset = -source.zero;
    if (source.is_signed) {
        // sum w (2x - m) = 2 sum w x - m sum w
        plan.shift += 1;
        plan.sum_shift = 1;
        offset = -((1 << source.bits) - 1);
    }
    if (offset != 0) {
        int32_t* constant = store.make<int32_t>(static_cast<size_t>(round_up(filters, kChannelPadding)));
        for (int o = 0; o < filters; ++o)
            constant[o] = static_cast<int32_t>(offset * weight_sums[static_cast<size_t>(o)]);
        plan.constant = constant;
    }
    plan.multiplier = store.padded(program.floats(*step.multiplier), filters);
    plan.bias = store.padded(program.floats(*step.bias), filters);
    plan.largest = 0.0f;
    for (int o = 0; o < filters; ++o)
        plan.largest = std::max(plan.largest, std::fabs(plan.multiplier[o]) * 0x1p31f + std::fabs(plan.bias[o]));
    return plan;
}

bool needs_wide_dot(const KernelTable& kernels, const StepSpec& step, int a_bits) {
    const int weight = std::max(-stored_weight(step, 0), stored_weight(step, (1 << step.w_bits) - 1));
    return kernels.dot_bits != 0 && 2 * weight * ((1 << a_bits) - 1) > kernels.dot_bits;
}

void plan_conv(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout, const KernelTable& kernels,
               Store& store, ConvPlan& plan) {
    const TensorSpec& source = program.tensors[static_cast<size_t>(step.input)];
    const int filters = static_cast<int>(program.array(step.planes).shape[1]);
    const int channels = source.channels / step.groups, taps = step.kernel.y * step.kernel.x;
    const std::vector<uint8_t> codes =
        unpack_weight_codes(program.integers(step.planes), step.w_bits, filters, taps, channels);

    const int height = output_size(source.height, step.kernel.y, step.stride.y, step.padding.y, step.dilation.y);
    const int width = output_size(source.width, step.kernel.x, step.stride.x, step.padding.x, step.dilation.x);
    plan.input = step.input;
    plan.map = load_map(store, layout, height, width, step.stride, kernels.lanes);
    plan.wide = needs_wide_dot(kernels, step, source.bits);
    const bool is_point = taps == 1 && step.groups == 1 && step.padding.y == 0 && step.padding.x == 0;
    if (is_point && plan.map.pieces == 0) {
        plan.is_thinned = true;
        plan.thinned_from = plan.map;
        plan.thinned_first = layout.offset(0, 0);
        plan.group_pitch = layout.group_pitch();
        plan.groups = layout.groups;
        plan.thinned_pitch = int64_t{4} * round_up(height * width, kernels.lanes);
        plan.map = line_map(store, vector_count(int64_t{height} * width, kernels.lanes), kernels.lanes);
    }

    const int per_group = filters / step.groups;
    const int vectors = vector_count(static_cast<int64_t>(height) * width, kernels.lanes);
    const std::vector<FilterCut> cut =
        step.groups == 1 ? cut_filters(filters, vectors, plan.map.pieces, taps * layout.groups, kernels.shapes)
                         : cut_grouped(filters, per_group, kernels.shapes);
    int range = 0;
    for (const FilterCut& block : cut) {
        const Range groups = channel_range(block, filters, per_group, channels);
        range = std::max(range, groups.last - groups.first);
    }
    std::vector<int32_t> offsets = window_offsets(layout, step, range);
    if (plan.is_thinned)
        for (size_t k = 0; k < offsets.size(); ++k) offsets[k] = static_cast<int32_t>(k * plan.thinned_pitch);
    plan.k_offsets = store.keep(offsets);
    const BlockWriter writer(step, codes, filters, channels, range);
    plan.k_steps = writer.steps();

    // One piece of memory for all blocks, which are read one after the other.
    size_t filled = 0;
    for (const FilterCut& block : cut)
        filled += static_cast<size_t>(plan.k_steps) * static_cast<size_t>(block.width) * 4;
    int8_t* weights = store.make<int8_t>(filled);

    FilterBlock* blocks = store.make<FilterBlock>(cut.size());
    for (size_t b = 0; b < cut.size(); ++b) {
        const FilterCut& block = cut[b];
        const int first = std::min(channel_range(block, filters, per_group, channels).first, layout.groups - range);
        const size_t bytes = static_cast<size_t>(plan.k_steps) * static_cast<size_t>(block.width) * 4;
        writer.write(block.first, block.width, first, weights,
                     [&](int o, int tap, int c) { return stored_weight(step, writer.code(o, tap, c)); });
        blocks[b] = {block.first, block.width, static_cast<int32_t>(first * layout.group_pitch()), weights, nullptr};
        if (needs_sum(step) && step.groups > 1) {
            int8_t* ones = store.make<int8_t>(bytes);
            writer.write(block.first, block.width, first, ones, [](int, int, int) { return 1; });
            blocks[b].ones = ones;
        }
        weights += bytes;
    }
    plan.blocks = blocks;
    plan.block_count = static_cast<int>(cut.size());
    if (needs_sum(step) && step.groups == 1) {
        int8_t* ones = store.make<int8_t>(static_cast<size_t>(plan.k_steps) * 4);
        writer.write(0, 1, 0, ones, [](int, int, int) { return 1; });
        plan.shared_ones = ones;
    }
    if (kernels.uses_tiles && step.groups == 1) {
        plan.tiles = tile_weights(writer, step, filters, store);
        plan.block_count = (filters + 15) / 16;
    }

    plan.acc = plan_accumulator(program, step, source, filters, weight_sums(step, filters, codes), store);
}

}  // namespace lbs
