#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>

#include "common/check.h"
#include "common/format.h"
#include "common/rules.h"
#include "program/checks.h"

namespace lbs {
namespace {

struct Shape {
    int height, width, channels;
};

bool is_size(int64_t value) { return value >= 1 && value <= kMaxSize; }

bool is_zero(Pair pair) { return pair.y == 0 && pair.x == 0; }
bool is_one(Pair pair) { return pair.y == 1 && pair.x == 1; }

bool is_float32(double value) {
    return std::fabs(value) <= std::numeric_limits<float>::max() &&
           static_cast<double>(static_cast<float>(value)) == value;
}

const char* form_name(Form form) { return form == Form::kImage ? "image" : form == Form::kCodes ? "codes" : "stream"; }

bool same_codes(const ConsumerSpec& consumer, const TensorSpec& tensor) {
    return consumer.bits == tensor.bits && consumer.zero == tensor.zero && consumer.is_signed == tensor.is_signed;
}

// Follows the steps in order, knowing which tensors hold values. As in walk.py, function by function.
class Walk {
public:
    explicit Walk(const ProgramSpec& program) : program_(program), written_(program.tensors.size(), false) {}

    void check() {
        for (int index : program_.inputs) {
            if (spec(index).form != Form::kImage) refuse_here(rule::kInputForm, "a program is given images");
            write(index);
        }
        for (const StepSpec& step : program_.steps) check_step(step);
        step_ = nullptr;
        check_outputs();
        for (size_t i = 0; i < written_.size(); ++i)
            if (!written_[i])
                refuse_here(rule::kNeverWritten,
                            "tensor " + std::to_string(i) + " (" + program_.tensors[i].name + ") is never written");
    }

private:
    [[noreturn]] void refuse_here(const char* rule, const std::string& message) const {
        refuse(rule, step_ ? "step '" + step_->name + "': " + message : message);
    }

    void check_outputs() const {
        std::vector<bool> returned(written_.size(), false);
        bool twice = false;
        for (int index : program_.outputs) {
            if (spec(index).form != Form::kStream) refuse_here(rule::kOutputForm, "a program returns streams");
            twice = twice || returned[static_cast<size_t>(index)];
            returned[static_cast<size_t>(index)] = true;
        }
        if (program_.outputs.empty() || twice)
            refuse_here(rule::kOutputs, "a program returns at least one tensor, each once");
    }

    const TensorSpec& spec(int index) const {
        if (index < 0 || static_cast<size_t>(index) >= program_.tensors.size())
            refuse_here(rule::kTensorNumber, "there is no tensor " + std::to_string(index));
        return program_.tensors[static_cast<size_t>(index)];
    }

    const TensorSpec& read(int index) const {
        const TensorSpec& tensor = spec(index);
        if (!written_[static_cast<size_t>(index)])
            refuse_here(rule::kReadUnwritten, "tensor " + tensor.name + " is read before it is written");
        return tensor;
    }

    const TensorSpec& write(int index) {
        const TensorSpec& tensor = spec(index);
        if (written_[static_cast<size_t>(index)])
            refuse_here(rule::kWrittenTwice, "tensor " + tensor.name + " is written a second time");
        written_[static_cast<size_t>(index)] = true;
        return tensor;
    }

    void check_step(const StepSpec& step) {
        step_ = &step;
        if (step.inputs.empty()) refuse_here(rule::kSelectInputs, "a selection has at least one input");
        const TensorSpec& source = read(step.input);
        Shape shape{source.height, source.width, source.channels};
        bool scaled = true;
        switch (step.kind) {
            case StepKind::kQuantPack:
                expect_form(source, {Form::kImage, Form::kStream});
                check_affine(step, source.channels);
                break;
            case StepKind::kConv: shape = check_conv(step, source); break;
            case StepKind::kLinear: shape = check_linear(step, source); break;
            case StepKind::kMeanPool: shape = check_mean(step, source); break;
            case StepKind::kAveragePool:
                expect_form(source, {Form::kStream});
                shape = check_window(step, source);
                break;
            case StepKind::kMaxPool:
                expect_form(source, {Form::kCodes, Form::kStream});
                shape = check_window(step, source);
                scaled = source.form != Form::kCodes;
                if (!scaled) check_unchanged(step.emit, source);
                break;
            case StepKind::kSelect:
                shape = check_select(step, source);
                scaled = source.form != Form::kCodes;
                break;
            case StepKind::kResize: shape = check_resize(step, source);
        }
        check_emit(step.emit, shape, scaled);
    }

    void check_affine(const StepSpec& step, int channels) const {
        if (step.multiplier.has_value() != step.bias.has_value())
            refuse_here(rule::kAffinePair, "only one of multiplier and bias is given");
        if (!step.multiplier) return;
        check_array(*step.multiplier, "float32", {channels});
        check_array(*step.bias, "float32", {channels});
    }

    Shape check_conv(const StepSpec& step, const TensorSpec& source) const {
        expect_form(source, {Form::kCodes});
        for (Pair pair : {step.kernel, step.stride, step.dilation})
            if (!is_size(pair.y) || !is_size(pair.x))
                refuse_here(rule::kWindow, "kernel, stride and dilation are 1 to " + std::to_string(kMaxSize));
        for (auto [size, kernel, dilation] : {std::array{step.padding.y, step.kernel.y, step.dilation.y},
                                              std::array{step.padding.x, step.kernel.x, step.dilation.x}})
            if (size < 0 || size > int64_t{dilation} * (kernel - 1) + 1)
                refuse_here(rule::kPadding, "padding is 0 to the extent of the kernel");
        if (source.is_signed && !is_zero(step.padding))
            refuse_here(rule::kSignedPadding, "signed codes have no code for 0 to pad with");
        check_padded(source, step.padding);
        const int filters = check_weights(step, source, int64_t{step.kernel.y} * step.kernel.x, step.groups);
        return window_shape(step, source, filters);
    }

    Shape check_linear(const StepSpec& step, const TensorSpec& source) const {
        expect_form(source, {Form::kCodes});
        if (source.pixels() != 1) refuse_here(rule::kOnePixel, "a linear step reads one pixel, pool first");
        return {1, 1, check_weights(step, source, 1, 1)};
    }

    Shape check_select(const StepSpec& step, const TensorSpec& first) const {
        int64_t total = 0;
        for (int index : step.inputs) total += read(index).channels;
        expect_form(first, {Form::kCodes, Form::kStream});
        for (int index : step.inputs)
            if (spec(index).form != first.form)
                refuse_here(rule::kSelectInputs, "the inputs of a selection have one form");
        if (first.form == Form::kCodes)
            for (int index : step.inputs) check_unchanged(step.emit, spec(index));
        const auto exists = [&](int channel) { return channel >= 0 && channel < total; };
        if (total > kMaxSize || !std::all_of(step.channels.begin(), step.channels.end(), exists))
            refuse_here(rule::kSelectChannels, "the inputs have " + std::to_string(total) + " channels, at most " +
                                                   std::to_string(kMaxSize) + ", to select of");
        if (step.size.y || step.size.x) return check_moved(step, total);
        if (!is_one(step.block) || !is_one(step.stride) || !step.top.empty() || !step.left.empty())
            refuse_here(rule::kSelectSize, "a block, stride, top or left is given and no size");
        const int64_t height = int64_t{first.height} * step.repeat.y, width = int64_t{first.width} * step.repeat.x;
        const auto divides = [&](int index) {
            return height % spec(index).height == 0 && width % spec(index).width == 0;
        };
        if (!is_size(height) || !is_size(width) || !std::all_of(step.inputs.begin(), step.inputs.end(), divides))
            refuse_here(rule::kRepeat, "the size that is written is a whole multiple of every input's");
        const auto count = static_cast<int64_t>(step.channels.size());
        return {static_cast<int>(height), static_cast<int>(width), static_cast<int>(count ? count : total)};
    }

    Shape check_moved(const StepSpec& step, int64_t total) const {
        bool sane = is_one(step.repeat);
        for (Pair pair : {step.size, step.block, step.stride}) sane = sane && is_size(pair.y) && is_size(pair.x);
        if (!sane || step.block.y > step.size.y || step.block.x > step.size.x)
            refuse_here(rule::kSelectSize, "size, block and stride are 1 to " + std::to_string(kMaxSize) +
                                               ", blocks no larger than the size, and nothing is repeated");
        const size_t inputs = step.inputs.size();
        const int64_t listed = step.channels.empty() ? total : static_cast<int64_t>(step.channels.size());
        const int64_t places = int64_t{step.block.y} * step.block.x;
        bool fitting = listed % places == 0;
        for (const std::vector<int>* offsets : {&step.top, &step.left}) {
            const bool one_each = offsets->empty() || offsets->size() == inputs;
            const auto sized = [](int value) { return value >= 0 && value <= kMaxSize; };
            fitting = fitting && one_each && std::all_of(offsets->begin(), offsets->end(), sized);
        }
        if (!fitting)
            refuse_here(rule::kSelectWindow,
                        "each input has a top and a left, or none has, and every place of a block as many channels");
        const int64_t each = listed / places;
        std::vector<size_t> holders;
        for (size_t i = 0; i < inputs; ++i)
            holders.insert(holders.end(), static_cast<size_t>(spec(step.inputs[i]).channels), i);
        const auto last = [](int first, int stride, int size, int64_t shift, int block) {
            return first + stride * ((size - 1 - shift) / block);
        };
        for (int64_t at = 0; at < listed; ++at) {
            const int64_t place = at / each;
            const auto index = static_cast<size_t>(at);
            const size_t i = holders[step.channels.empty() ? index : static_cast<size_t>(step.channels[index])];
            const TensorSpec& input = spec(step.inputs[i]);
            const int top = step.top.empty() ? 0 : step.top[i], left = step.left.empty() ? 0 : step.left[i];
            if (last(top, step.stride.y, step.size.y, place / step.block.x, step.block.y) >= input.height ||
                last(left, step.stride.x, step.size.x, place % step.block.x, step.block.x) >= input.width)
                refuse_here(rule::kSelectWindow, "it reads pixels that " + input.name + " does not have");
        }
        return {step.size.y, step.size.x, static_cast<int>(each)};
    }

    // Bits, groups, planes, multiplier and bias of a step; returns the number of filters.
    int check_weights(const StepSpec& step, const TensorSpec& source, int64_t taps, int groups) const {
        if (step.w_bits < 1 || step.w_bits > kMaxBits)
            refuse_here(rule::kWeightBits, "weights have 1 to " + std::to_string(kMaxBits) + " bits");
        if (groups < 1 || source.channels % groups) refuse_here(rule::kGroups, "groups divide the channels");
        const int channels = source.channels / groups;
        const ArraySpec* planes = program_.find_array(step.planes);
        const int64_t filters = planes && planes->shape.size() == 4 ? planes->shape[1] : 0;
        check_array(step.planes, "int32", {step.w_bits, filters, taps, (channels + kWord - 1) / kWord});
        if (filters % groups) refuse_here(rule::kFilterGroups, "groups divide the filters");
        if (step.total_filters < filters || step.total_filters > kMaxSize)
            refuse_here(rule::kTotalFilters, "a step cannot keep more filters than all");
        check_array(*step.multiplier, "float32", {filters});
        check_array(*step.bias, "float32", {filters});
        const int64_t product = int64_t{(1 << step.w_bits) - 1} * ((1 << source.bits) - 1);
        if (taps * channels > std::numeric_limits<int32_t>::max() / product)
            refuse_here(rule::kAccumulator, "it could overflow its accumulator: " + std::to_string(taps * channels) +
                                                " products of up to " + std::to_string(product));
        return static_cast<int>(filters);
    }

    void check_array(const std::string& key, const char* dtype, std::initializer_list<int64_t> shape) const {
        const ArraySpec* array = program_.find_array(key);
        if (!array) refuse_here(rule::kArrayMissing, "there is no array '" + key + "'");
        if (array->dtype != dtype || !std::equal(shape.begin(), shape.end(), array->shape.begin(), array->shape.end()))
            refuse_here(rule::kArrayKind, "array '" + key + "' is of another dtype or shape than the step needs");
    }

    void check_emit(const EmitSpec& emit, const Shape& shape, bool scaled) {
        if (emit.activation) check_activation(*emit.activation, shape);
        check_operand(emit.gate, {1, 1, shape.channels});
        check_residual(emit, shape);
        for (const std::optional<double>& bound : {emit.low, emit.high})
            if (bound && !is_float32(*bound)) refuse_here(rule::kBound, "low and high are exact float32 values");
        if (emit.low && emit.high && *emit.low > *emit.high) refuse_here(rule::kClamp, "low is at most high");
        if (emit.stream == kNoTensor && emit.consumers.empty())
            refuse_here(rule::kWritesNothing, "the step writes nothing");
        if (emit.stream != kNoTensor) {
            const TensorSpec& target = write(emit.stream);
            expect_form(target, {Form::kStream});
            expect_shape(target, shape);
        }
        for (const ConsumerSpec& consumer : emit.consumers) check_consumer(consumer, shape, scaled);
    }

    void check_activation(const ActivationSpec& activation, const Shape& shape) const {
        const bool valued = activation.kind == ActivationKind::kElu || activation.kind == ActivationKind::kLeakyRelu;
        if (!(valued ? is_float32(activation.value) : activation.value == 0))
            refuse_here(rule::kActivationValue,
                        "elu and leaky_relu have a value that is exact in float32, other activations 0");
        if (activation.slope.has_value() != (activation.kind == ActivationKind::kPrelu))
            refuse_here(rule::kActivationSlope, "prelu has a slope, other activations have none");
        if (activation.slope) check_array(*activation.slope, "float32", {shape.channels});
    }

    void check_operand(int index, const Shape& shape) const {
        if (index == kNoTensor) return;
        const TensorSpec& tensor = read(index);
        expect_form(tensor, {Form::kStream});
        expect_shape(tensor, shape);
    }

    void check_residual(const EmitSpec& emit, const Shape& shape) const {
        if (!emit.residual_step) return check_operand(emit.residual, shape);
        if (emit.residual == kNoTensor) refuse_here(rule::kCodeStep, "a residual_step is given and no residual");
        const TensorSpec& tensor = read(emit.residual);
        expect_form(tensor, {Form::kCodes});
        expect_shape(tensor, shape);
        check_code_step(*emit.residual_step, tensor);
    }

    void check_code_step(double step, const TensorSpec& codes) const {
        if (!is_float32(step) || !(step > 0) || codes.bits != kMaxBits || codes.is_signed)
            refuse_here(rule::kCodeStep, "a step is positive and exact in float32, of unsigned codes of " +
                                             std::to_string(kMaxBits) + " bits; " + codes.name + " has another");
    }

    void check_consumer(const ConsumerSpec& consumer, const Shape& shape, bool scaled) {
        const TensorSpec& target = write(consumer.tensor);
        expect_form(target, {Form::kCodes});
        expect_shape(target, shape);
        if (!same_codes(consumer, target))
            refuse_here(rule::kCodeKind, "a consumer has the bits, zero and sign of " + target.name);
        if (scaled && !(is_float32(consumer.scale) && consumer.scale > 0))
            refuse_here(rule::kScale, "a scale is positive and exact in float32");
        if (consumer.step) check_code_step(*consumer.step, target);
        if (consumer.pre_scale.has_value() != consumer.pre_bias.has_value())
            refuse_here(rule::kNormPair, "only one of pre_scale and pre_bias is given");
        if (!consumer.pre_scale) return;
        check_array(*consumer.pre_scale, "float32", {shape.channels});
        check_array(*consumer.pre_bias, "float32", {shape.channels});
    }

    Shape check_mean(const StepSpec& step, const TensorSpec& source) const {
        expect_form(source, {Form::kStream});
        const bool whole = step.kernel.y == source.height && step.kernel.x == source.width;
        const bool one = step.kernel.y == 1 && step.kernel.x == 1;
        if (!(whole || one) || !is_zero(step.padding)) refuse_here(rule::kMeanWindow, "the mean is global, unpadded");
        return {1, 1, source.channels};
    }

    Shape check_window(const StepSpec& step, const TensorSpec& source) const {
        for (auto [kernel, stride, padding] : {std::array{step.kernel.y, step.stride.y, step.padding.y},
                                               std::array{step.kernel.x, step.stride.x, step.padding.x}}) {
            if (!is_size(kernel) || !is_size(stride))
                refuse_here(rule::kWindow, "kernel and stride are 1 to " + std::to_string(kMaxSize));
            if (padding < 0 || padding > kernel / 2)
                refuse_here(rule::kPadding, "padding is at most half of the kernel");
        }
        check_padded(source, step.padding);
        return window_shape(step, source, source.channels);
    }

    Shape check_resize(const StepSpec& step, const TensorSpec& source) const {
        expect_form(source, {Form::kStream});
        if (!is_size(step.size.y) || !is_size(step.size.x) || !(step.scale.y > 0) || !(step.scale.x > 0))
            refuse_here(rule::kResize, "sizes are 1 to " + std::to_string(kMaxSize) + ", scales positive");
        return {step.size.y, step.size.x, source.channels};
    }

    void check_padded(const TensorSpec& source, Pair padding) const {
        const int64_t height = source.height + int64_t{2} * padding.y, width = source.width + int64_t{2} * padding.x;
        // In this order no product leaves 64 bits.
        if (height > kMaxElements || width > kMaxElements || height * width > kMaxElements ||
            height * width * source.channels > kMaxElements)
            refuse_here(rule::kPaddedElements,
                        "more than " + std::to_string(kMaxElements) + " elements per image, padding included");
    }

    // Sums of sizes fit an int behind check_padded.
    Shape window_shape(const StepSpec& step, const TensorSpec& source, int channels) const {
        const int height = output_size(source.height, step.kernel.y, step.stride.y, step.padding.y, step.dilation.y);
        const int width = output_size(source.width, step.kernel.x, step.stride.x, step.padding.x, step.dilation.x);
        if (height < 1 || width < 1) refuse_here(rule::kOutputPixels, "the window yields no pixel");
        return {height, width, channels};
    }

    // Codes pass a maximum or a selection unchanged: exactly one consumer of the same kind, and nothing else.
    void check_unchanged(const EmitSpec& emit, const TensorSpec& source) const {
        const bool plain = !emit.activation && emit.gate == kNoTensor && emit.residual == kNoTensor && !emit.low &&
                           !emit.high && emit.stream == kNoTensor && !emit.residual_step;
        if (!plain || emit.consumers.size() != 1 || emit.consumers[0].pre_scale || emit.consumers[0].relu ||
            emit.consumers[0].step || !same_codes(emit.consumers[0], source))
            refuse_here(rule::kCodesUnchanged, "codes are passed on to one plain consumer of the kind of the inputs");
    }

    void expect_form(const TensorSpec& tensor, std::initializer_list<Form> forms) const {
        for (Form form : forms)
            if (tensor.form == form) return;
        refuse_here(rule::kForm, tensor.name + " is a tensor of form " + form_name(tensor.form));
    }

    void expect_shape(const TensorSpec& tensor, const Shape& shape) const {
        if (tensor.height != shape.height || tensor.width != shape.width || tensor.channels != shape.channels)
            refuse_here(rule::kShape, tensor.name + " has another shape than the step computes");
    }

    const ProgramSpec& program_;
    std::vector<bool> written_;
    const StepSpec* step_ = nullptr;
};

}  // namespace

void walk_program(const ProgramSpec& program) { Walk(program).check(); }

}  // namespace lbs
