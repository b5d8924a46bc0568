#include "program/layout.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "bitconv2d/winograd_cpu.h"
#include "common/check.h"

namespace lbs {
namespace {

// A run of one vector inside one row of the output map.
struct Run {
    int first_lane, count;
    int y, x;
};

// `apart`: every row begins a vector.
std::vector<std::vector<Run>> cut_into_rows(int height, int width, int lanes, bool apart = false) {
    std::vector<std::vector<Run>> vectors;
    int lane = 0;  // of the last vector, the first that is free
    for (int y = 0; y < height; ++y) {
        if (apart) lane = 0;
        for (int x = 0; x < width;) {
            if (lane == 0) vectors.emplace_back();
            const int count = std::min(lanes - lane, width - x);
            vectors.back().push_back({lane, count, y, x});
            x += count;
            lane = (lane + count) % lanes;
        }
    }
    return vectors;
}

uint32_t lane_bits(int first, int count) { return ((count >= 32 ? 0u : 1u << count) - 1u) << first; }

// The number of pieces a kernel is built for, 0 for one offset per lane.
int supported_pieces(size_t most, int limit) {
    for (int pieces = 1; pieces <= limit; pieces *= 2)
        if (most <= static_cast<size_t>(pieces)) return pieces;
    return 0;
}

PixelMap keep_pieces(Store& store, const std::vector<std::vector<Piece>>& vectors, int pieces, bool compress) {
    PixelMap map;
    map.pieces = pieces;
    map.compress = compress;
    Piece* table = store.make<Piece>((vectors.size() + kPrefetched) * static_cast<size_t>(pieces));
    for (size_t v = 0; v < vectors.size() + kPrefetched; ++v) {
        Piece* row = table + v * static_cast<size_t>(pieces);
        const std::vector<Piece>& vector = vectors[std::min(v, vectors.size() - 1)];
        std::copy(vector.begin(), vector.end(), row);
        for (size_t i = vector.size(); i < static_cast<size_t>(pieces); ++i) row[i] = {row[0].offset, 0};
    }
    map.table = table;
    return map;
}

template <class Offset>
PixelMap keep_lanes(Store& store, int height, int width, int lanes, const Offset& offset) {
    PixelMap map;
    map.pieces = 0;
    const int64_t pixels = static_cast<int64_t>(height) * width;
    const int vectors = vector_count(pixels, lanes);
    int32_t* table = store.make<int32_t>(static_cast<size_t>(vectors) * kMaxLanes);
    for (int v = 0; v < vectors; ++v)
        for (int lane = 0; lane < lanes; ++lane) {
            const int64_t pixel = std::min(static_cast<int64_t>(v) * lanes + lane, pixels - 1);
            table[v * kMaxLanes + lane] =
                static_cast<int32_t>(offset(static_cast<int>(pixel / width), static_cast<int>(pixel % width)));
        }
    map.lanes = table;
    return map;
}

// Pieces of runs as they are stored; `offset(y, x)` is where a pixel lies.
template <class Offset>
PixelMap store_runs(Store& store, const CodeLayout& layout, const std::vector<std::vector<Run>>& vectors, int lanes,
                    const Offset& offset) {
    std::vector<std::vector<Piece>> stored;
    size_t most = 1;
    bool whole = true;
    for (const std::vector<Run>& runs : vectors) {
        stored.emplace_back();
        for (const Run& run : runs)
            for (int phase = 0; phase < std::min(layout.phases, run.count); ++phase) {
                uint32_t mask = 0;
                for (int i = phase; i < run.count; i += layout.phases) mask |= 1u << (run.first_lane + i);
                // Compressed lanes start at the address itself, plain ones keep their place in the vector.
                const int64_t first = offset(run.y, run.x + phase) - (layout.phases > 1 ? 0 : 4 * run.first_lane);
                stored.back().push_back({static_cast<int32_t>(first), mask});
            }
        most = std::max(most, stored.back().size());
        whole = whole && stored.back().size() == 1 && stored.back()[0].mask == lane_bits(0, lanes);
    }
    const int pieces = supported_pieces(most, 8);
    if (pieces == 0) return keep_lanes(store, layout.height, layout.width, lanes, offset);
    PixelMap map = keep_pieces(store, stored, pieces, layout.phases > 1);
    map.masked = pieces == 1 && !whole;  // else the tail would overwrite what follows
    return map;
}

void widen(CodeLayout& layout, const StepSpec& step, const TensorSpec& source) {
    const auto beyond = [](int size, int kernel, int stride, int padding, int dilation) {
        const int outputs = output_size(size, kernel, stride, padding, dilation);
        return std::max(0, (outputs - 1) * stride + (kernel - 1) * dilation - padding - (size - 1));
    };
    layout.top = std::max(layout.top, step.padding.y);
    layout.left = std::max(layout.left, step.padding.x);
    int bottom = beyond(layout.height, step.kernel.y, step.stride.y, step.padding.y, step.dilation.y);
    if (suits_winograd(step, source)) bottom += (layout.height + 2 * step.padding.y) % 2;  // rows in pairs
    layout.bottom = std::max(layout.bottom, bottom);
    layout.right =
        std::max(layout.right, beyond(layout.width, step.kernel.x, step.stride.x, step.padding.x, step.dilation.x));
}

// Tensors that 1x1 windows read pixel by pixel, and nothing else, need no rows: as one they are read and written in
// whole vectors, whatever the width of the map. Codes that pass unchanged (maxima, selections) keep their rows.
std::vector<bool> read_as_rows(const ProgramSpec& program) {
    std::vector<bool> rows(program.tensors.size(), true);
    for (const StepSpec& step : program.steps) {
        const bool pixelwise = step.kind == StepKind::kConv && step.kernel.y == 1 && step.kernel.x == 1 &&
                               step.stride.y == 1 && step.stride.x == 1 && step.padding.y == 0 && step.padding.x == 0 &&
                               step.groups == 1;
        const bool unchanged =
            step.kind == StepKind::kSelect ||
            (step.kind == StepKind::kMaxPool && program.tensors[static_cast<size_t>(step.input)].form == Form::kCodes);
        for (int input : step.inputs)
            if (!pixelwise) rows[static_cast<size_t>(input)] = false;
        if (unchanged)
            for (const ConsumerSpec& consumer : step.emit.consumers) rows[static_cast<size_t>(consumer.tensor)] = false;
    }
    return rows;
}

}  // namespace

const float* Store::padded(const float* values, int count) {
    const int total = (count + kChannelPadding - 1) / kChannelPadding * kChannelPadding;
    float* result = make<float>(static_cast<size_t>(total));
    std::memcpy(result, values, static_cast<size_t>(count) * sizeof(float));
    return result;
}

const int32_t* Store::keep(const std::vector<int32_t>& values) {
    int32_t* result = make<int32_t>(values.size());
    std::copy(values.begin(), values.end(), result);
    return result;
}

uint32_t tail_mask(int64_t pixels, int lanes) {
    const int rest = static_cast<int>(pixels % lanes);
    return lane_bits(0, rest == 0 ? lanes : rest);
}

std::vector<CodeLayout> choose_layouts(const ProgramSpec& program) {
    std::vector<CodeLayout> layouts(program.tensors.size());
    std::vector<int> strides(program.tensors.size(), 0);  // 0: not read through a window yet, -1: by several
    for (size_t i = 0; i < layouts.size(); ++i) {
        const TensorSpec& tensor = program.tensors[i];
        layouts[i].height = tensor.height;
        layouts[i].width = tensor.width;
        layouts[i].groups = (tensor.channels + 3) / 4;
        layouts[i].zero = tensor.zero;
    }
    const auto read = [&](size_t input, int stride) {
        strides[input] = strides[input] == 0 || strides[input] == stride ? stride : -1;
    };
    for (const StepSpec& step : program.steps) {
        if (step.emit.residual_step) read(static_cast<size_t>(step.emit.residual), 1);
        const auto input = static_cast<size_t>(step.input);
        if (program.tensors[input].form != Form::kCodes || step.kind == StepKind::kSelect) continue;  // no window
        widen(layouts[input], step, program.tensors[input]);
        read(input, step.stride.x);
    }
    // Rows of what a selection reads lie as those it writes, so that whole groups are copied.
    for (auto step = program.steps.rbegin(); step != program.steps.rend(); ++step) {
        if (step->kind != StepKind::kSelect || step->emit.consumers.empty() || step->size.y) continue;
        const auto output = static_cast<size_t>(step->emit.consumers[0].tensor);
        for (int input : step->inputs) {
            const auto i = static_cast<size_t>(input);
            const bool same = layouts[i].height == layouts[output].height && layouts[i].width == layouts[output].width;
            if (program.tensors[i].form != Form::kCodes || !same) continue;
            layouts[i].left = std::max(layouts[i].left, layouts[output].left);
            layouts[i].right = std::max(layouts[i].right, layouts[output].right);
            if (strides[i] == 0) strides[i] = strides[output];
        }
    }
    const std::vector<bool> rows = read_as_rows(program);
    for (size_t i = 0; i < layouts.size(); ++i) {
        const TensorSpec& tensor = program.tensors[i];
        if (rows[i] && tensor.form == Form::kCodes && tensor.height > 1) {
            layouts[i].is_row = true;
            layouts[i].height = 1;
            layouts[i].width = static_cast<int>(tensor.pixels());
            layouts[i].right = (kMaxLanes - layouts[i].width % kMaxLanes) % kMaxLanes;
        }
        if (strides[i] > 1 && strides[i] <= layouts[i].width) layouts[i].phases = strides[i];
        if (program.tensors[i].form != Form::kCodes) continue;
        const int64_t rows = int64_t{layouts[i].top} + layouts[i].height + layouts[i].bottom;
        if (rows > (std::numeric_limits<int32_t>::max() - kSlack) / layouts[i].row_pitch())
            throw BackendError("tensor '" + program.tensors[i].name +
                               "' needs more than 2 GiB per image with its padding, which the native kernels cannot "
                               "address; use the reference");
    }
    return layouts;
}

std::vector<int32_t> window_offsets(const CodeLayout& layout, const StepSpec& step, int groups) {
    std::vector<int32_t> offsets;
    for (int ky = 0; ky < step.kernel.y; ++ky)
        for (int group = 0; group < groups; ++group)
            for (int kx = 0; kx < step.kernel.x; ++kx) {
                const int64_t tap =
                    layout.offset(ky * step.dilation.y - step.padding.y, kx * step.dilation.x - step.padding.x);
                offsets.push_back(static_cast<int32_t>(tap + group * layout.group_pitch()));
            }
    return offsets;
}

PixelMap load_map(Store& store, const CodeLayout& layout, int height, int width, Pair stride, int lanes) {
    if (layout.is_row) {
        width *= height;
        height = 1;
    }
    // Relative to the taps of window_offsets. With phases the stride is in the layout: neighbours are one lane apart.
    const int64_t row = stride.y * layout.row_pitch();
    const bool split = layout.phases == stride.x;
    const auto offset = [&](int y, int x) { return y * row + int64_t{4} * (split ? x : x * stride.x); };
    std::vector<std::vector<Piece>> vectors;
    size_t most = 1;
    for (const std::vector<Run>& runs : cut_into_rows(height, width, lanes)) {
        vectors.emplace_back();
        for (const Run& run : runs)
            vectors.back().push_back({static_cast<int32_t>(offset(run.y, run.x) - 4 * run.first_lane),
                                      lane_bits(run.first_lane, run.count)});
        most = std::max(most, runs.size());
    }
    const int pieces = split ? supported_pieces(most, 4) : 0;
    if (pieces == 0) return keep_lanes(store, height, width, lanes, offset);
    return keep_pieces(store, vectors, pieces, false);
}

PixelMap line_map(Store& store, int vectors, int lanes) {
    std::vector<std::vector<Piece>> pieces;
    for (int v = 0; v < vectors; ++v) pieces.push_back({{static_cast<int32_t>(4 * lanes * v), lane_bits(0, lanes)}});
    return keep_pieces(store, pieces, 1, false);
}

PixelMap repeat_map(Store& store, const CodeLayout& layout, int height, int width, int lanes) {
    if (layout.phases == 1 && height == layout.height && width == layout.width)
        return load_map(store, layout, height, width, {1, 1}, lanes);
    const int rows = height / layout.height, columns = width / layout.width;
    const int64_t first = layout.offset(0, 0);
    return keep_lanes(store, height, width, lanes,
                      [&](int y, int x) { return layout.offset(y / rows, x / columns) - first; });
}

PixelMap repeat_map(Store& store, const TensorSpec& stream, int height, int width, int lanes) {
    const int rows = height / stream.height, columns = width / stream.width;
    return keep_lanes(store, height, width, lanes,
                      [&](int y, int x) { return 4 * (int64_t{y / rows} * stream.width + x / columns); });
}

PixelMap store_map(Store& store, const CodeLayout& layout, int lanes) {
    PixelMap map = store_runs(store, layout, cut_into_rows(layout.height, layout.width, lanes), lanes,
                              [&](int y, int x) { return layout.offset(y, x); });
    map.over = layout.is_row;  // nothing follows
    if (map.over) map.masked = false;
    return map;
}

RowMaps row_maps(Store& store, const CodeLayout& from, const CodeLayout& to, const TensorSpec& target, Pair stride,
                 int lanes) {
    RowMaps maps;
    if (from.phases != stride.x) return maps;
    const std::vector<std::vector<Run>> rows = cut_into_rows(target.height, target.width, lanes, true);
    std::vector<std::vector<Piece>> loads;
    for (const std::vector<Run>& runs : rows) {
        const Run& run = runs[0];
        const int64_t row = from.is_row ? int64_t{4} * target.width : stride.y * from.row_pitch();
        loads.push_back({{static_cast<int32_t>(run.y * row + 4 * run.x), lane_bits(0, run.count)}});
    }
    maps.load = keep_pieces(store, loads, 1, false);
    maps.store = store_runs(store, to, rows, lanes, [&](int y, int x) {
        return to.is_row ? to.offset(0, y * target.width + x) : to.offset(y, x);
    });
    maps.store.over = true;
    maps.vectors = maps.store.pieces == 0 ? 0 : static_cast<int>(rows.size());
    return maps;
}

}  // namespace lbs
