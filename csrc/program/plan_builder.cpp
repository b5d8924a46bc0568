#include "program/plan_builder.h"

#include <algorithm>
#include <cmath>

#include "bitconv2d/bitconv2d_cpu.h"
#include "bitconv2d/depthwise_cpu.h"
#include "bitconv2d/lanes_cpu.h"
#include "bitconv2d/winograd_cpu.h"
#include "bitlinear/bitlinear_cpu.h"
#include "common/check.h"
#include "resize/resize_cpu.h"

namespace lbs {
namespace {

constexpr int64_t kLine = 64;              // slots start at cache lines
constexpr int64_t kMaxPoolTaps = 1 << 16;  // of a maximum of codes that reads its padding

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

const TensorSpec& target_of(const ProgramSpec& spec, const StepSpec& step) {
    const int index = step.emit.stream >= 0 ? step.emit.stream : step.emit.consumers.at(0).tensor;
    return spec.tensors[static_cast<size_t>(index)];
}

// One tap on one pixel is a matrix-vector product.
bool is_matrix(const StepSpec& step, const TensorSpec& source) {
    return step.kind == StepKind::kLinear ||
           (step.kind == StepKind::kConv && source.pixels() == 1 && step.kernel.y == 1 && step.kernel.x == 1 &&
            step.groups == 1 && step.padding.y == 0 && step.padding.x == 0);
}

// Multiplying by a scale keeps the order of floats, rounding included, so where codes are all that is made of y the
// upper bound of a ReLU6 and the like is one of the codes: min(y, high) * scale = min(y * scale, high * scale). Not a
// number is the lower bound by then.
void fold_high(EmitPlan& plan, ConsumerPlan* consumers) {
    if (!plan.has_high || !plan.has_low || plan.high < 0.0f || plan.stream >= 0) return;
    for (int i = 0; i < plan.consumer_count; ++i)
        if (consumers[i].gain || consumers[i].shifted || consumers[i].step > 0.0f) return;
    plan.has_high = false;
    for (int i = 0; i < plan.consumer_count; ++i)
        consumers[i].high = std::min(consumers[i].high, plan.high * consumers[i].scale);
}

EmitPlan bounded(EmitPlan emit, const AccumulatorPlan& acc) {
    if (emit.is_usual) emit.is_usual = (acc.largest + 255.0f * emit.coded.step) * emit.consumers->scale < 0x1p30f;
    return emit;
}

// How codes of 8 bits become those of another reader, where 16-bit integers compute the same as steps 5 and 6 do on
// each of the values that they stand for.
CodeScale code_scale(const ConsumerPlan& first, const ConsumerPlan& other) {
    CodeScale made;
    const int last = static_cast<int>(other.high) + other.zero;
    int codes[256];
    for (int q = 0; q < 256; ++q) {
        const float t = static_cast<float>(q - first.zero) * first.step * other.scale;
        codes[q] = static_cast<int>(std::nearbyint(std::min(std::max(t, other.least), other.high))) + other.zero;
    }
    made.most = 255;
    while (made.most > 0 && codes[made.most - 1] == last) --made.most;
    while (made.least < made.most && codes[made.least + 1] == codes[0]) ++made.least;
    for (made.shift = 16; last >> (16 - made.shift); --made.shift) {
    }
    const float times = first.step * other.scale * static_cast<float>(1 << made.shift);
    if (!(times < 65535.0f)) return made;
    const int near = static_cast<int>(std::nearbyint(times));
    for (made.factor = std::max(near - 2, 0); made.factor <= near + 2 && !made.holds; made.factor += !made.holds) {
        int low = 0, high = 65535 - (made.most - made.least) * made.factor;
        for (int q = made.least; q <= made.most; ++q) {
            const int scaled = (q - made.least) * made.factor;
            low = std::max(low, (codes[q] << made.shift) - scaled);
            high = std::min(high, ((codes[q] + 1) << made.shift) - 1 - scaled);
        }
        made.holds = low <= high;
        made.offset = low + (high - low) / 2;
    }
    return made;
}

std::vector<int> tensors_read(const StepSpec& step) {
    std::vector<int> reads = step.inputs;
    for (int tensor : {step.emit.gate, step.emit.residual})
        if (tensor >= 0) reads.push_back(tensor);
    return reads;
}

[[noreturn]] void refuse_algorithm(const StepSpec& step, const char* name, const char* rule) {
    throw BackendError("step '" + step.name + "' cannot be computed by '" + name +
                       "' on this instruction set: " + rule + "; use 'direct', or '' for the faster one");
}

}  // namespace

ProgramPlan::ProgramPlan(const std::string& text, const unsigned char* blob, int64_t blob_bytes,
                         const KernelTable& table, const std::vector<Algorithm>& algorithms)
    : spec(text, blob, blob_bytes), kernels(table), layouts(choose_layouts(spec)) {
    if (!algorithms.empty() && algorithms.size() != spec.steps.size())
        throw BackendError("algorithms has " + std::to_string(algorithms.size()) + " entries for " +
                           std::to_string(spec.steps.size()) + " steps; give one for each, or none");
    plan_steps(algorithms);
    join_bands();
    assign_slots();
    place_meetings();
}

const char* ProgramPlan::algorithm(size_t step) const {
    switch (steps[step].run) {
        case StepPlan::Run::kConv: return "direct";
        case StepPlan::Run::kLanes: return "lanes";
        case StepPlan::Run::kWinograd: return "winograd";
        default: return "";
    }
}

void ProgramPlan::plan_steps(const std::vector<Algorithm>& algorithms) {
    steps.resize(spec.steps.size());
    for (size_t i = 0; i < steps.size(); ++i) {
        const StepSpec& step = spec.steps[i];
        const TensorSpec& source = spec.tensors[static_cast<size_t>(step.input)];
        const CodeLayout& layout = layouts[static_cast<size_t>(step.input)];
        StepPlan& plan = steps[i];
        if (step.emit.stream >= 0) plan.writes.push_back(step.emit.stream);
        for (const ConsumerSpec& consumer : step.emit.consumers) plan.writes.push_back(consumer.tensor);
        const EmitPlan emit = plan_emit(step, target_of(spec, step));
        const Algorithm algorithm = algorithms.empty() ? Algorithm::kAuto : algorithms[i];
        if (is_matrix(step, source)) {
            plan.run = StepPlan::Run::kLinear;
            plan_linear(spec, step, layout, kernels, store, plan.linear);
            plan.linear.emit = emit;
        } else if (step.kind == StepKind::kConv &&
                   plan_winograd(spec, step, layout, kernels, algorithm, emit, store, plan.winograd)) {
            plan.run = StepPlan::Run::kWinograd;
            plan.winograd.emit = bounded(emit, plan.winograd.acc);
            if (plan.winograd.tiles)
                plan.winograd.made =
                    place_pixels(layouts, emit, plan.winograd.width, static_cast<int>(emit.pixels), 0, store);
            scratch_bytes = std::max(scratch_bytes, winograd_bytes(plan.winograd, kernels.lanes));
        } else if (step.kind == StepKind::kConv && is_depthwise(spec, step, layout, emit, kernels.lanes)) {
            plan.run = StepPlan::Run::kDepthwise;
            plan_depthwise(spec, step, layout, kernels, store, plan.depthwise);
            plan.depthwise.emit = bounded(emit, plan.depthwise.acc);
            row_count = std::max(row_count, depthwise_scratch(plan.depthwise));
        } else if (step.kind == StepKind::kConv && algorithm != Algorithm::kWinograd &&
                   plan_lanes(spec, step, layout, kernels, algorithm, emit, store, plan.lanes)) {
            plan.run = StepPlan::Run::kLanes;
            plan.lanes.emit = bounded(emit, plan.lanes.acc);
            if (is_made_in_place(source, kernels, emit))
                plan.lanes.made = place_pixels(layouts, emit, target_of(spec, step).width,
                                               static_cast<int>(emit.pixels), kernels.lanes_pixels, store);
            scratch_bytes = std::max(scratch_bytes, lanes_bytes(plan.lanes, kernels));
        } else if (step.kind == StepKind::kConv) {
            if (algorithm == Algorithm::kWinograd)
                refuse_algorithm(
                    step, "winograd",
                    "that takes 3 x 3 windows of stride 1, few bits and weights whose transforms are bytes");
            if (algorithm == Algorithm::kLanes)
                refuse_algorithm(
                    step, "lanes",
                    "that takes up to 256 pixels, or 1024 where its epilogue is lean and floats are those of "
                    "whole vectors of filters, one group, and "
                    "weights that need no sums");
            plan.run = StepPlan::Run::kConv;
            plan_conv(spec, step, layout, kernels, store, plan.conv);
            plan.conv.emit = bounded(emit, plan.conv.acc);
            plan.conv.is_short = is_short(step, source, plan.conv.k_steps, plan.conv.emit);
            if (plan.conv.is_short) {
                plan_taps(spec, step, layout, store, plan.conv);
                cut_rows_apart(step, layout, plan.conv);
            }
            scratch_bytes = std::max(scratch_bytes, plan.conv.groups * plan.conv.thinned_pitch);
            sum_lanes = std::max(sum_lanes, static_cast<int64_t>(emit.vectors) * kernels.lanes);
            tile_bytes = std::max(tile_bytes, round_up(plan.conv.k_steps, 16) * 128);
        } else {
            plan.emit = emit;
            plan.emit.is_usual = false;  // what floats are read is not known
            if (step.kind == StepKind::kQuantPack) plan_quantpack(step, plan);
            else if (step.kind == StepKind::kSelect) plan_select(step, plan);
            else if (step.kind == StepKind::kResize) plan_resize(step, plan);
            else plan_pool(step, plan);
        }
    }
}

EmitPlan ProgramPlan::plan_emit(const StepSpec& step, const TensorSpec& target) {
    EmitPlan plan;
    plan.channels = target.channels;
    plan.pixels = target.pixels();
    plan.vectors = vector_count(plan.pixels, kernels.lanes);
    plan.tail_mask = tail_mask(plan.pixels, kernels.lanes);
    plan.gate = step.emit.gate;
    plan.is_plain = !step.emit.activation && step.emit.gate < 0;
    if (step.emit.residual_step) plan.coded = plan_coded(step.emit);
    else plan.residual = step.emit.residual;
    if (step.emit.activation) {
        const ActivationSpec& activation = *step.emit.activation;
        ActivationPlan& made = activation.first ? plan.before : plan.behind;
        made.kind = activation.kind;
        made.value = static_cast<float>(activation.value);
        if (activation.slope) made.slope = store.padded(spec.floats(*activation.slope), target.channels);
    }
    plan.stream = step.emit.stream;
    plan.stream_type = spec.stream_type;
    plan.has_low = step.emit.low.has_value();
    plan.has_high = step.emit.high.has_value();
    plan.low = static_cast<float>(step.emit.low.value_or(0.0));
    plan.high = static_cast<float>(step.emit.high.value_or(0.0));
    plan.consumer_count = static_cast<int>(step.emit.consumers.size());
    ConsumerPlan* consumers = store.make<ConsumerPlan>(step.emit.consumers.size());
    for (size_t i = 0; i < step.emit.consumers.size(); ++i) {
        const ConsumerSpec& consumer = step.emit.consumers[i];
        const CodeLayout& layout = layouts[static_cast<size_t>(consumer.tensor)];
        const float levels = static_cast<float>((1 << consumer.bits) - 1);
        ConsumerPlan c;
        c.tensor = consumer.tensor;
        c.scale = static_cast<float>(consumer.scale);
        c.zero = consumer.zero;
        c.low = -static_cast<float>(consumer.zero);
        c.least = consumer.relu ? 0.0f : c.low;
        c.high = levels - static_cast<float>(consumer.zero);
        c.half = levels / 2.0f;
        c.shifted = consumer.is_signed;
        c.relu = consumer.relu;
        c.step = static_cast<float>(consumer.step.value_or(0.0));
        if (consumer.pre_scale) {
            c.gain = store.padded(spec.floats(*consumer.pre_scale), target.channels);
            c.offset = store.padded(spec.floats(*consumer.pre_bias), target.channels);
        }
        c.map = store_map(store, layout, kernels.lanes);
        c.group_pitch = static_cast<int32_t>(layout.group_pitch());
        consumers[i] = c;
    }
    plan.consumers = consumers;
    fold_high(plan, consumers);
    bool lean = true, follow = true;  // all but the first, the first
    for (int i = 0; i < plan.consumer_count; ++i) {
        ConsumerPlan& c = consumers[i];
        lean = lean && !c.gain && !c.shifted;
        if (i == 0) continue;
        if (consumers->step > 0.0f && c.step == 0.0f && lean) c.of_first = code_scale(*consumers, c);
        follow = follow && c.of_first.holds;
        lean = lean && (c.of_first.holds || (consumers->step == 0.0f && c.step == 0.0f));
    }
    plan.is_lean = plan.is_plain && (plan.stream < 0 || plan.stream_type == StreamType::kFloat32) && lean;
    plan.is_usual = plan.is_lean && follow && !plan.has_high && plan.residual < 0 && plan.stream < 0;
    return plan;
}

// Loads of one piece instead of two, for up to a quarter more vectors (depthwise on rows of 56 and of 28 pixels, an
// eighth more: 1.15 times as fast). Taps in fours, whose loads are most of the work, up to twice as many (14 and 7).
void ProgramPlan::cut_rows_apart(const StepSpec& step, const CodeLayout& layout, ConvPlan& plan) {
    const ConsumerPlan& consumer = *plan.emit.consumers;
    const CodeLayout& to = layouts[static_cast<size_t>(consumer.tensor)];
    const TensorSpec& target = spec.tensors[static_cast<size_t>(consumer.tensor)];
    const int vectors = vector_count(target.width, kernels.lanes) * target.height;
    if (!plan.emit.is_usual || plan.emit.consumer_count > 1 || plan.is_thinned || plan.emit.coded.tensor >= 0 ||
        plan.map.pieces == 1)
        return;
    if (4 * vectors > (plan.tap_weights ? 8 : 5) * plan.emit.vectors) return;
    const RowMaps maps = row_maps(store, layout, to, target, step.stride, kernels.lanes);
    if (maps.vectors == 0) return;
    ConsumerPlan* own = store.make<ConsumerPlan>(1);
    *own = consumer;
    own->map = maps.store;
    plan.map = maps.load;
    plan.emit.consumers = own;
    plan.emit.vectors = maps.vectors;
}

CodedPlan ProgramPlan::plan_coded(const EmitSpec& emit) {
    const auto index = static_cast<size_t>(emit.residual);
    const TensorSpec& codes = spec.tensors[index];
    const CodeLayout& layout = layouts[index];
    CodedPlan plan;
    plan.tensor = emit.residual;
    plan.zero = static_cast<float>(codes.zero);
    plan.step = static_cast<float>(*emit.residual_step);
    plan.map = load_map(store, layout, codes.height, codes.width, {1, 1}, kernels.lanes);
    plan.first = layout.offset(0, 0);
    plan.group_pitch = static_cast<int32_t>(layout.group_pitch());
    return plan;
}

void ProgramPlan::plan_quantpack(const StepSpec& step, StepPlan& plan) {
    const TensorSpec& source = spec.tensors[static_cast<size_t>(step.input)];
    const auto place = std::find(spec.inputs.begin(), spec.inputs.end(), step.input);
    plan.run = StepPlan::Run::kQuantPack;
    plan.place = place == spec.inputs.end() ? -1 : static_cast<int>(place - spec.inputs.begin());
    plan.read.bytes = source.is_bytes;
    if (!step.multiplier) return;
    plan.read.gain = store.padded(spec.floats(*step.multiplier), source.channels);
    plan.read.offset = store.padded(spec.floats(*step.bias), source.channels);
}

namespace {

void plan_max(const StepSpec& step, const TensorSpec& source, PoolStreamPlan& plan) {
    plan.height = source.height;
    plan.width = source.width;
    plan.rows = output_size(source.height, step.kernel.y, step.stride.y, step.padding.y, 1);
    plan.columns = output_size(source.width, step.kernel.x, step.stride.x, step.padding.x, 1);
    plan.kernel_rows = step.kernel.y;
    plan.kernel_columns = step.kernel.x;
    // A stride that is never taken may be anything, and working memory grows with it.
    plan.row_stride = plan.rows > 1 ? step.stride.y : 1;
    plan.column_stride = plan.columns > 1 ? step.stride.x : 1;
    plan.top = step.padding.y;
    plan.left = step.padding.x;
    const int64_t read = int64_t{plan.columns + kMaxLanes} * plan.column_stride + step.kernel.x + kMaxLanes;
    plan.row_floats = std::max<int64_t>(read, int64_t{plan.left} + plan.width);
}

}  // namespace

void ProgramPlan::plan_pool(const StepSpec& step, StepPlan& plan) {
    const TensorSpec& source = spec.tensors[static_cast<size_t>(step.input)];
    if (step.kind == StepKind::kMeanPool) {
        plan.run = StepPlan::Run::kMeanStream;
        float_count = std::max<int64_t>(float_count, source.channels + kMaxLanes);
    } else if (source.form == Form::kStream) {
        plan.run = step.kind == StepKind::kMaxPool ? StepPlan::Run::kMaxStream : StepPlan::Run::kAverageStream;
        float_count = std::max<int64_t>(float_count, 4 * plan.emit.pixels + source.width);
        plan_max(step, source, plan.max);
        for (const StepSpec& writer : spec.steps)
            if (writer.emit.stream == step.input) plan.max.numbers = writer.emit.low || writer.emit.high;
        float_count = std::max<int64_t>(float_count, pool_rows_at(plan.emit) + kPoolRows * plan.max.row_floats);
    } else {
        // Where real 0 is code 0, padding holds the smallest code and cannot win, so the window may run over it. A huge
        // window is cut to the image instead, and no table is made of its taps.
        const bool over_padding =
            source.zero == 0 && !source.is_signed && int64_t{step.kernel.y} * step.kernel.x <= kMaxPoolTaps;
        plan.run = over_padding ? StepPlan::Run::kMaxCodes : StepPlan::Run::kMaxCodesAnyZero;
        const CodeLayout& in = layouts[static_cast<size_t>(step.input)];
        const int output = step.emit.consumers[0].tensor;
        const CodeLayout& out = layouts[static_cast<size_t>(output)];
        const std::vector<int32_t> offsets = over_padding ? window_offsets(in, step, 1) : std::vector<int32_t>();
        plan.pool.input = step.input;
        plan.pool.output = output;
        plan.pool.window = static_cast<int>(offsets.size());
        plan.pool.window_offsets = store.keep(offsets);
        plan.pool.groups = in.groups;
        plan.pool.in_pitch = static_cast<int32_t>(in.group_pitch());
        plan.pool.out_pitch = static_cast<int32_t>(out.group_pitch());
        plan.pool.vectors = plan.emit.vectors;
        plan.pool.tail_mask = plan.emit.tail_mask;
        plan.pool.in_map = load_map(store, in, out.height, out.width, step.stride, kernels.lanes);
        plan.pool.out_map = store_map(store, out, kernels.lanes);
    }
}

void ProgramPlan::plan_select(const StepSpec& step, StepPlan& plan) {
    plan.run = StepPlan::Run::kSelect;
    SelectPlan& select = plan.select;
    const TensorSpec& target = target_of(spec, step);
    const bool codes = spec.tensors[static_cast<size_t>(step.input)].form == Form::kCodes;
    if (step.size.y) {
        select.height = step.size.y;
        select.width = step.size.x;
        select.block_rows = step.block.y;
        select.block_columns = step.block.x;
    }
    // Bytes to what is read for each row or column of the result; places of a block that do not read it may lie beyond.
    const auto offsets_along = [&](int count, int size, const auto& index, const auto& offset) {
        int64_t* made = store.make<int64_t>(static_cast<size_t>(count));
        for (int i = 0; i < count; ++i) made[i] = offset(std::min(index(i), size - 1));
        return made;
    };
    SelectSource* sources = store.make<SelectSource>(step.inputs.size());
    std::vector<SelectPlace> all;  // the channels of the inputs side by side
    for (size_t i = 0; i < step.inputs.size(); ++i) {
        const auto index = static_cast<size_t>(step.inputs[i]);
        const TensorSpec& tensor = spec.tensors[index];
        const CodeLayout& layout = layouts[index];
        SelectSource source;
        source.tensor = step.inputs[i];
        for (int channel = 0; channel < tensor.channels; ++channel) all.push_back({static_cast<int>(i), channel});
        if (select.height) {
            const Pair first{step.top.empty() ? 0 : step.top[i], step.left.empty() ? 0 : step.left[i]};
            const auto row = [&](int h) { return first.y + step.stride.y * (h / step.block.y); };
            const auto column = [&](int w) { return first.x + step.stride.x * (w / step.block.x); };
            source.pitch = codes ? layout.group_pitch() : 4 * tensor.pixels();
            source.is_dense = layout.phases == 1 && step.stride.x == 1;
            source.rows = offsets_along(select.height, tensor.height, row,
                                        [&](int y) { return codes ? layout.row(y) : int64_t{4} * y * tensor.width; });
            source.columns = offsets_along(select.width, tensor.width, column, [&](int x) {
                return codes ? layout.offset(0, x) - layout.row(0) : int64_t{4} * x;
            });
        } else if (codes) {
            source.is_alike = layout.has_rows_of(layouts[static_cast<size_t>(step.emit.consumers[0].tensor)]);
            source.row = layout.row(0);
            source.row_pitch = layout.row_pitch();
            source.first = static_cast<int32_t>(layout.offset(0, 0));
            source.pitch = layout.group_pitch();
            source.map = repeat_map(store, layout, target.height, target.width, kernels.lanes);
        } else {
            source.pitch = 4 * tensor.pixels();
            source.is_alike = tensor.height == target.height && tensor.width == target.width;
            if (!source.is_alike) source.map = repeat_map(store, tensor, target.height, target.width, kernels.lanes);
        }
        sources[i] = source;
    }
    select.groups = (target.channels + 3) / 4;
    const size_t count = 4 * static_cast<size_t>(select.groups), each = static_cast<size_t>(target.channels);
    const auto blocks = static_cast<size_t>(step.block.y) * static_cast<size_t>(step.block.x);
    SelectPlace* places = store.make<SelectPlace>(blocks * count);
    for (size_t block = 0; block < blocks; ++block)
        for (size_t c = 0; c < count; ++c) {
            const size_t chosen = block * each + std::min(c, each - 1);
            const size_t taken = step.channels.empty() ? chosen : static_cast<size_t>(step.channels[chosen]);
            places[block * count + c] = all[taken];
        }
    select.sources = sources;
    select.places = places;
    if (!codes) return;
    select.output = step.emit.consumers[0].tensor;
    const CodeLayout& out = layouts[static_cast<size_t>(select.output)];
    select.rows = out.height;
    select.out_row = out.row(0);
    select.out_row_pitch = out.row_pitch();
    select.out_pitch = static_cast<int32_t>(out.group_pitch());
    select.out_map = store_map(store, out, kernels.lanes);
    const auto itself = [](int i) { return i; };
    if (!select.height) return;
    select.out_rows = offsets_along(out.height, out.height, itself, [&](int y) { return out.row(y); });
    select.out_columns =
        offsets_along(out.width, out.width, itself, [&](int x) { return out.offset(0, x) - out.row(0); });
}

void ProgramPlan::plan_resize(const StepSpec& step, StepPlan& plan) {
    const TensorSpec& source = spec.tensors[static_cast<size_t>(step.input)];
    plan.run = StepPlan::Run::kResize;
    plan.resize.input = step.input;
    plan.resize.width = source.width;
    plan.resize.pixels = source.pixels();
    plan.resize.columns = step.size.x;
    plan.resize.down = resize_side(store, source.height, step.size.y, step.scale.y, step.offset.y);
    plan.resize.across = resize_columns(store, source.width, step.size.x, step.scale.x, step.offset.x, kernels.lanes);
    plan.resize.pitch = round_up(step.size.x, kMaxLanes) + 2 * kMaxLanes;
    float_count = std::max(float_count, kResizeRows * plan.resize.pitch);
}

// Convolutions whose stream the next step alone reads, for a maximum.
void ProgramPlan::join_bands() {
    for (size_t i = 1; i < steps.size(); ++i) {
        StepPlan& before = steps[i - 1];
        const int stream = spec.steps[i].input;
        if (steps[i].run != StepPlan::Run::kMaxStream || before.run != StepPlan::Run::kConv ||
            before.writes != std::vector<int>{stream} || before.conv.emit.residual >= 0)
            continue;
        size_t readers = 0;
        for (const StepSpec& step : spec.steps) {
            const std::vector<int> reads = tensors_read(step);
            readers += static_cast<size_t>(std::count(reads.begin(), reads.end(), stream));
        }
        if (readers != 1 || std::count(spec.outputs.begin(), spec.outputs.end(), stream)) continue;
        steps[i].bands = plan_bands(before.conv, steps[i].max, kernels.lanes);
        before.in_bands = steps[i].bands.unit_count > 0;
    }
}

// What is read while a step runs, by the convolution of its bands as well.
std::vector<int> ProgramPlan::reads_of(size_t step) const {
    std::vector<int> reads = tensors_read(spec.steps[step]);
    if (step > 0 && steps[step - 1].in_bands)
        for (int tensor : tensors_read(spec.steps[step - 1])) reads.push_back(tensor);
    return reads;
}

void ProgramPlan::assign_slots() {
    const size_t count = spec.tensors.size();
    std::vector<int> last_use(count, -1);
    for (size_t i = 0; i < steps.size(); ++i)
        for (int tensor : reads_of(i)) last_use[static_cast<size_t>(tensor)] = static_cast<int>(i);
    slot_of.assign(count, -1);
    std::vector<bool> external(count, false);
    for (int output : spec.outputs) external[static_cast<size_t>(output)] = true;
    std::vector<int> free;

    // A free slot: for codes one of the same layout; for a stream the smallest that is large enough, or the largest to
    // grow.
    const auto take = [&](const Slot& wish) {
        int best = -1;
        for (int candidate : free) {
            const Slot& slot = slots[static_cast<size_t>(candidate)];
            if (slot.is_codes != wish.is_codes || (wish.is_codes && !(slot.layout == wish.layout))) continue;
            if (best < 0) best = candidate;
            const int64_t size = slot.bytes, held = slots[static_cast<size_t>(best)].bytes;
            if (held < wish.bytes ? size > held : size >= wish.bytes && size < held) best = candidate;
        }
        if (best < 0) {
            slots.push_back(wish);
            return static_cast<int>(slots.size()) - 1;
        }
        free.erase(std::find(free.begin(), free.end(), best));
        slots[static_cast<size_t>(best)].bytes = std::max(slots[static_cast<size_t>(best)].bytes, wish.bytes);
        return best;
    };
    const auto release = [&](int tensor, size_t step) {
        const int slot = slot_of[static_cast<size_t>(tensor)];
        const bool over = last_use[static_cast<size_t>(tensor)] <= static_cast<int>(step);
        if (slot >= 0 && over && std::find(free.begin(), free.end(), slot) == free.end()) free.push_back(slot);
    };

    for (size_t i = 0; i < steps.size(); ++i) {
        const EmitSpec& emit = spec.steps[i].emit;
        const std::vector<int> reads = tensors_read(spec.steps[i]);
        for (int tensor : steps[i].writes) {
            const TensorSpec& target = spec.tensors[static_cast<size_t>(tensor)];
            if (external[static_cast<size_t>(tensor)]) continue;
            // Each element of the residual is read just before the stream's is written, so they may share where nothing
            // else of the step reads it.
            const bool in_place = tensor == emit.stream && emit.residual >= 0 && !emit.residual_step &&
                                  std::count(reads.begin(), reads.end(), emit.residual) == 1 &&
                                  last_use[static_cast<size_t>(emit.residual)] == static_cast<int>(i) &&
                                  slot_of[static_cast<size_t>(emit.residual)] >= 0;
            if (in_place) {
                slot_of[static_cast<size_t>(tensor)] = slot_of[static_cast<size_t>(emit.residual)];
                continue;
            }
            Slot wish;
            wish.is_codes = target.form == Form::kCodes;
            if (wish.is_codes) wish.layout = layouts[static_cast<size_t>(tensor)];
            wish.bytes = wish.is_codes ? wish.layout.bytes() : 4 * target.pixels() * target.channels;
            slot_of[static_cast<size_t>(tensor)] = take(wish);
        }
        for (int tensor : reads_of(i)) {
            const bool shared =
                emit.stream >= 0 && slot_of[static_cast<size_t>(emit.stream)] == slot_of[static_cast<size_t>(tensor)];
            if (!shared) release(tensor, i);
        }
        for (int tensor : steps[i].writes) release(tensor, i);  // those nobody reads
    }
    for (Slot& slot : slots) {
        slot.offset = arena_bytes;
        arena_bytes += round_up(slot.bytes + kSlack, kLine);
    }
}

void ProgramPlan::place_meetings() {
    // Memory is told apart by slot; what the caller owns by tensor.
    const auto place = [&](int tensor) {
        const int slot = slot_of[static_cast<size_t>(tensor)];
        return slot >= 0 ? slot : static_cast<int>(slots.size()) + tensor;
    };
    std::vector<int> read, written;
    const auto holds = [](const std::vector<int>& places, int one) {
        return std::find(places.begin(), places.end(), one) != places.end();
    };
    for (size_t i = 0; i < steps.size(); ++i) {
        bool meet = false;
        for (int tensor : reads_of(i)) meet = meet || holds(written, place(tensor));
        for (int tensor : steps[i].writes) meet = meet || holds(written, place(tensor)) || holds(read, place(tensor));
        if (meet) {
            read.clear();
            written.clear();
        }
        steps[i].meet_before = meet;
        for (int tensor : reads_of(i)) read.push_back(place(tensor));
        for (int tensor : steps[i].writes) written.push_back(place(tensor));
    }
}

}  // namespace lbs
