#include "bitconv2d/winograd_cpu.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <numeric>

#include "bitconv2d/bitconv2d_cpu.h"
#include "bitconv2d/lanes_cpu.h"

namespace lbs {
namespace {

constexpr int kPlaces = 16;
constexpr int64_t kChunkBytes = 256 << 10;  // of transformed inputs, which every block of filters reads again
constexpr int64_t kMostChunkBytes = 4 << 20;
// Groups of channels from which on outputs, made in nothing's shadow where filters lie on the lanes, weigh less than
// what that saves: on a Zen 5, 512 filters at 7 x 7 take 206 us instead of 225, 256 at 14 x 14 136 instead of 159, 128
// at 28 x 28 the same, 64 at 56 x 56 180 to 215 instead of 170 to 187.
constexpr int kLongSums = 32;
constexpr int kMostDot = 1 << 29;  // four times a dot is an int32

using Taps = std::array<int, kPlaces>;

// (2G) g (2G)^T; `weight(row, column)` is g.
template <class Weight>
Taps transform_weights(const Weight& weight) {
    const auto expand = [](int a, int b, int c) { return std::array<int, 4>{2 * a, a + b + c, a - b + c, 2 * c}; };
    std::array<std::array<int, 4>, 3> rows;  // of g, expanded
    for (int r = 0; r < 3; ++r) rows[static_cast<size_t>(r)] = expand(weight(r, 0), weight(r, 1), weight(r, 2));
    Taps all;
    for (size_t c = 0; c < 4; ++c) {
        const std::array<int, 4> column = expand(rows[0][c], rows[1][c], rows[2][c]);
        for (size_t r = 0; r < 4; ++r) all[4 * r + c] = column[r];
    }
    return all;
}

// With s_r what takes off a shift of row r's codes, sums of rows 1 and 3 start with a, those of 2 and 0 with b, so that
// b - a = s0 + s1 + s2 and -(a + b) = s1 - s2 - s3.
std::array<int, 2> sum_starts(const Taps& taps, int column, int shift) {
    std::array<int, 4> s;
    for (size_t r = 0; r < 4; ++r) {
        const size_t place = 4 * r + static_cast<size_t>(column);
        s[r] = place == 5 ? 0 : -shift * taps[place];  // place (1, 1) holds sums of codes alone, which need no shift
    }
    return {-s[1] - (s[0] - s[3]) / 2, s[2] + (s[0] + s[3]) / 2};  // exact: a shift is even
}

struct Weights {
    int filters, channels;
    std::vector<Taps> values;   // [filter][channel]
    std::vector<int64_t> sums;  // of the weights, per filter
    int largest = 0;
};

Weights transformed(const ProgramSpec& program, const StepSpec& step, int channels) {
    const int filters = static_cast<int>(program.array(step.planes).shape[1]);
    const std::vector<uint8_t> codes =
        unpack_weight_codes(program.integers(step.planes), step.w_bits, filters, 9, channels);
    Weights all{filters, channels, {}, weight_sums(step, filters, codes)};
    all.values.reserve(static_cast<size_t>(filters) * static_cast<size_t>(channels));
    for (int f = 0; f < filters; ++f)
        for (int c = 0; c < channels; ++c) {
            all.values.push_back(transform_weights([&](int row, int column) {
                return stored_weight(step, codes[static_cast<size_t>((f * 9 + 3 * row + column) * channels + c)]);
            }));
            for (int value : all.values.back()) all.largest = std::max(all.largest, std::abs(value));
        }
    return all;
}

// Cycles on one image, as those of the direct kernel. Measured on a Zen 5: what a place costs beyond its dots, with
// what of the output's transform and the epilogue is not in their shadow; a group of channels of a vector of tiles.
double winograd_cycles(const WinogradPlan& plan, const std::vector<FilterCut>& cut, const KernelTable& kernels) {
    constexpr double kPlace = 64, kRun = 30, kGroup = 60;
    const double chunks = static_cast<double>(plan.unit_count) / plan.chunk_units;
    double products = 0;
    for (const FilterCut& block : cut)
        for (const TileShape* shape = kernels.winograd_shapes; shape->filters; ++shape)
            if (shape->filters == block.width) {
                const int tiles = (plan.chunk_vectors + shape->vectors - 1) / shape->vectors;
                const double dots = std::max(plan.chunk_vectors * block.width * kernels.dot_cycles, 4.0 * tiles);
                products += kPlaces * (plan.groups * dots + kPlace * tiles);
            }
    return chunks * (products + plan.groups * (kGroup * plan.chunk_vectors + kRun * plan.chunk_runs));
}

// The same with filters on the lanes.
double winograd_lanes_cycles(const WinogradPlan& plan, int filters, const KernelTable& kernels) {
    constexpr double kTile = 90, kPlace = 3, kRun = 30, kGroup = 60;  // of a vector of filters: outputs, sums
    const double chunks = static_cast<double>(plan.unit_count) / plan.chunk_units;
    const int columns = (plan.width + 1) / 2, tiles = plan.chunk_units * plan.unit_rows * columns;
    const double made = static_cast<double>(vector_count(tiles, plan.tiles)) * plan.tiles;
    const double products =
        made * vector_count(filters, kernels.lanes) * (kPlaces * (plan.groups * kernels.dot_cycles + kPlace) + kTile);
    return chunks * (products + plan.groups * (kGroup * plan.chunk_vectors + kRun * plan.chunk_runs));
}

// Tiles on the lanes, and of those multiplied together where filters lie there.
double used_lanes(const WinogradPlan& plan, int tiles, int lanes) {
    const double of_groups =
        plan.tiles ? static_cast<double>(tiles) / (vector_count(tiles, plan.tiles) * plan.tiles) : 1;
    return of_groups * tiles / vector_count(tiles, lanes);
}

// As many units as leave the fewest lanes without a tile, and V in the cache of a core.
int choose_chunk(const WinogradPlan& plan, int lanes) {
    const int columns = (plan.width + 1) / 2, rows = (plan.height + 1) / 2;
    int best = 1;
    double best_use = 0;
    for (int units = 1; units <= plan.unit_count; ++units) {
        const int tiles = std::min(units * plan.unit_rows, rows) * columns, vectors = vector_count(tiles, lanes);
        if (units > 1 && vectors * kPlaces * plan.place_pitch > kChunkBytes) break;
        const double use = used_lanes(plan, tiles, lanes);
        if (use > 1.01 * best_use) {
            best = units;
            best_use = use;
        }
    }
    return best;
}

}  // namespace

bool suits_winograd(const StepSpec& step, const TensorSpec& source) {
    return step.kind == StepKind::kConv && step.kernel.y == 3 && step.kernel.x == 3 && step.stride.y == 1 &&
           step.stride.x == 1 && step.dilation.y == 1 && step.dilation.x == 1 && step.groups == 1 && step.w_bits < 8 &&
           source.bits <= 6;
}

bool plan_winograd(const ProgramSpec& program, const StepSpec& step, const CodeLayout& layout,
                   const KernelTable& kernels, Algorithm algorithm, const EmitPlan& emit, Store& store,
                   WinogradPlan& plan) {
    if (algorithm != Algorithm::kAuto && !names_winograd(algorithm)) return false;
    const TensorSpec& source = program.tensors[static_cast<size_t>(step.input)];
    if (!suits_winograd(step, source) || layout.phases != 1 || kernels.uses_tiles) return false;
    const int codes = (1 << source.bits) - 1, heaviest = 1 << step.w_bits;
    if (int64_t{9} * source.channels * codes * heaviest >= kMostDot) return false;
    const Weights weights = transformed(program, step, source.channels);
    if (weights.largest > 127) return false;
    if (kernels.dot_bits != 0 && 2 * weights.largest * 4 * codes > kernels.dot_bits) return false;

    plan.input = step.input;
    plan.height = output_size(source.height, 3, 1, step.padding.y, 1);
    plan.width = output_size(source.width, 3, 1, step.padding.x, 1);
    plan.groups = layout.groups;
    plan.first = layout.offset(-step.padding.y, -step.padding.x);
    plan.row_pitch = layout.row_pitch();
    plan.group_pitch = layout.group_pitch();
    plan.shift = 2 * codes;
    plan.input_bytes = int64_t{4} * kernels.lanes * plan.groups;
    plan.place_pitch = plan.input_bytes + 64;  // an odd number of lines apart where it would be a power of two
    const int rows = (plan.height + 1) / 2, columns = (plan.width + 1) / 2;
    const auto cut_rows = [&](int tiles_together) {
        plan.tiles = tiles_together;
        // Chunks begin where a vector of output pixels does, if those are on the lanes.
        plan.unit_rows = plan.tiles ? 1 : kernels.lanes / 2 / std::gcd(plan.width, kernels.lanes / 2);
        plan.unit_count = (rows + plan.unit_rows - 1) / plan.unit_rows;
        plan.chunk_units = choose_chunk(plan, kernels.lanes);
        const int chunk_rows = std::min(rows, plan.chunk_units * plan.unit_rows);
        plan.chunk_vectors = vector_count(int64_t{chunk_rows} * columns, kernels.lanes);
        plan.chunk_runs = plan.chunk_vectors + chunk_rows;
        return used_lanes(plan, chunk_rows * columns, kernels.lanes);
    };
    cut_rows(0);
    if (plan.groups >= kLongSums && is_made_in_place(source, kernels, emit)) {
        int best = 0;
        double best_use = 0;
        for (const int* tiles = kernels.winograd_tiles; *tiles; ++tiles) {
            const double use = cut_rows(*tiles);
            if (use > best_use) best = *tiles, best_use = use;
        }
        cut_rows(best);
    }
    const int chunk_rows = std::min(rows, plan.chunk_units * plan.unit_rows);
    if (plan.chunk_vectors * kPlaces * plan.place_pitch > kMostChunkBytes) return false;
    const int pixel_vectors = vector_count(int64_t{2} * chunk_rows * plan.width, kernels.lanes);
    plan.dot_pitch = int64_t{pixel_vectors + 1} * kernels.lanes;

    const std::vector<FilterCut> cut = plan.tiles ? cut_vectors(weights.filters, kernels)
                                                  : cut_filters(weights.filters, plan.chunk_vectors, 1,
                                                                kPlaces * plan.groups, kernels.winograd_shapes);
    const double otherwise =
        std::min(direct_cycles(step, source, layout, weights.filters, plan.height, plan.width, kernels, emit),
                 lanes_cycles(step, source, layout, weights.filters, plan.height, plan.width, kernels, emit));
    const double own =
        plan.tiles ? winograd_lanes_cycles(plan, weights.filters, kernels) : winograd_cycles(plan, cut, kernels);
    if (algorithm == Algorithm::kAuto && own > otherwise) return false;
    const int together = plan.tiles ? vector_count(int64_t{chunk_rows} * columns, plan.tiles) * plan.tiles : 0;
    size_t filters = 0;
    for (const FilterCut& block : cut) filters += static_cast<size_t>(block.width);
    int8_t* bytes = store.make<int8_t>(kPlaces * static_cast<size_t>(plan.groups) * filters * 4);  // read in one go
    WinogradBlock* blocks = store.make<WinogradBlock>(cut.size());
    for (size_t b = 0; b < cut.size(); ++b) {
        const int width = cut[b].width;
        const auto place_bytes = static_cast<size_t>(plan.groups) * static_cast<size_t>(width) * 4;
        int32_t* start = store.make<int32_t>(8 * static_cast<size_t>(width));
        for (int f = 0; f < width && cut[b].first + f < weights.filters; ++f)
            for (int c = 0; c < weights.channels; ++c) {
                const size_t from = static_cast<size_t>(cut[b].first + f) * static_cast<size_t>(weights.channels);
                const Taps& taps = weights.values[from + static_cast<size_t>(c)];
                for (size_t at = 0; at < kPlaces; ++at) {
                    const int value = taps[static_cast<size_t>(kPlaceOrder[at])];
                    bytes[at * place_bytes + static_cast<size_t>((c / 4 * width + f) * 4 + c % 4)] =
                        static_cast<int8_t>(at % 4 == 0 ? -value : value);
                }
                for (int column = 0; column < 4; ++column) {
                    const std::array<int, 2> added = sum_starts(taps, column, plan.shift);
                    start[2 * column * width + f] += added[0];
                    start[(2 * column + 1) * width + f] += added[1];
                }
            }
        blocks[b] = {cut[b].first, width, bytes, start};
        bytes += kPlaces * place_bytes;
        plan.widest_filters = std::max(plan.widest_filters, width);
        if (plan.tiles) plan.widest_block = std::max(plan.widest_block, width / kernels.lanes * together);
        for (const TileShape* shape = kernels.winograd_shapes; shape->filters; ++shape)
            if (!plan.tiles && shape->filters == width)
                plan.widest_block = std::max(plan.widest_block, shape->vectors * width);
    }
    plan.blocks = blocks;
    plan.block_count = static_cast<int>(cut.size());
    const int places = kPlaces * ((plan.chunk_vectors + 1) / 2);
    plan.quads_per_place = (pixel_vectors * plan.widest_filters / 4 + places - 1) / places;

    plan.acc = plan_accumulator(program, step, source, weights.filters, weights.sums, store);
    return true;
}

int64_t winograd_bytes(const WinogradPlan& plan, int lanes) {
    const int64_t inputs = plan.chunk_vectors * kPlaces * plan.place_pitch;
    const int64_t products = int64_t{4} * kPlaces * plan.widest_block * lanes;
    const int64_t dots = plan.tiles ? 0 : int64_t{8} * plan.widest_filters * plan.dot_pitch;
    constexpr int64_t kRun = 48, kLines = 7 * 64;
    return inputs + products + dots + plan.chunk_runs * kRun + int64_t{4} * (plan.chunk_vectors + 1) + kLines;
}

}  // namespace lbs
