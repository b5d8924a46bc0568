#include "program/program.h"

#include <algorithm>
#include <limits>

#include "common/check.h"
#include "common/format.h"
#include "common/rules.h"
#include "program/checks.h"
#include "program/conform.h"
#include "program/schema.h"

namespace lbs {
namespace {

// What follows reads a text that conforms to the schema: every key is there and of its type.
const Json& at(const Json& value, const char* key) { return *value.find(key); }
const Json::Array& list(const Json& value, const char* key) { return *at(value, key).array(); }
const std::string& text(const Json& value, const char* key) { return *at(value, key).string(); }
bool truth(const Json& value, const char* key) { return *at(value, key).boolean(); }

// A whole number, or the nearest one that fits: both are far beyond every limit and break the same rule.
int whole(const Json& value) {
    using Limits = std::numeric_limits<int>;
    return static_cast<int>(std::clamp<int64_t>(value.number()->integer, Limits::min(), Limits::max()));
}
int whole(const Json& value, const char* key) { return whole(at(value, key)); }

// A number that the text gives is no tensor where it is negative, but not the absence of one either.
int optional_tensor(const Json& value) {
    if (value.is_null()) return kNoTensor;
    const int index = whole(value);
    return index < 0 ? std::numeric_limits<int>::min() : index;
}

std::optional<std::string> optional_text(const Json& value) {
    return value.is_null() ? std::nullopt : std::optional<std::string>(*value.string());
}

std::optional<double> optional_number(const Json& value) {
    return value.is_null() ? std::nullopt : std::optional<double>(value.number()->value);
}

Pair pair(const Json& value, const char* key) {
    const Json::Array& items = list(value, key);
    return {whole(items[0]), whole(items[1])};
}

Numbers number_pair(const Json& value, const char* key) {
    const Json::Array& items = list(value, key);
    return {items[0].number()->value, items[1].number()->value};
}

std::vector<int> numbers(const Json& value, const char* key) {
    std::vector<int> result;
    for (const Json& item : list(value, key)) result.push_back(whole(item));
    return result;
}

TensorSpec read_tensor(const Json& value) {
    TensorSpec tensor;
    tensor.name = text(value, "name");
    const std::string& form = text(value, "form");
    tensor.form = form == "image" ? Form::kImage : form == "codes" ? Form::kCodes : Form::kStream;
    tensor.channels = whole(value, "channels");
    tensor.height = whole(value, "height");
    tensor.width = whole(value, "width");
    tensor.bits = whole(value, "bits");
    tensor.zero = whole(value, "zero");
    tensor.is_signed = truth(value, "signed");
    tensor.is_flat = truth(value, "flat");
    tensor.is_bytes = text(value, "dtype") == "uint8";
    return tensor;
}

ConsumerSpec read_consumer(const Json& value) {
    ConsumerSpec consumer;
    consumer.tensor = whole(value, "tensor");
    consumer.bits = whole(value, "bits");
    consumer.scale = at(value, "scale").number()->value;
    consumer.zero = whole(value, "zero");
    consumer.is_signed = truth(value, "signed");
    consumer.pre_scale = optional_text(at(value, "pre_scale"));
    consumer.pre_bias = optional_text(at(value, "pre_bias"));
    consumer.relu = truth(value, "relu");
    consumer.step = optional_number(at(value, "step"));
    return consumer;
}

ActivationSpec read_activation(const Json& value) {
    static const std::map<std::string, ActivationKind> kinds{
        {"elu", ActivationKind::kElu},
        {"gelu", ActivationKind::kGelu},
        {"gelu_tanh", ActivationKind::kGeluTanh},
        {"hardsigmoid", ActivationKind::kHardsigmoid},
        {"hardswish", ActivationKind::kHardswish},
        {"leaky_relu", ActivationKind::kLeakyRelu},
        {"mish", ActivationKind::kMish},
        {"prelu", ActivationKind::kPrelu},
        {"sigmoid", ActivationKind::kSigmoid},
        {"silu", ActivationKind::kSilu},
        {"tanh", ActivationKind::kTanh},
    };
    ActivationSpec activation;
    activation.kind = kinds.at(text(value, "kind"));
    activation.value = at(value, "value").number()->value;
    activation.slope = optional_text(at(value, "slope"));
    activation.first = truth(value, "first");
    return activation;
}

EmitSpec read_emit(const Json& value) {
    EmitSpec emit;
    const Json& activation = at(value, "activation");
    if (!activation.is_null()) emit.activation = read_activation(activation);
    emit.gate = optional_tensor(at(value, "gate"));
    emit.residual = optional_tensor(at(value, "residual"));
    emit.residual_step = optional_number(at(value, "residual_step"));
    emit.low = optional_number(at(value, "low"));
    emit.high = optional_number(at(value, "high"));
    emit.stream = optional_tensor(at(value, "stream"));
    for (const Json& item : list(value, "consumers")) emit.consumers.push_back(read_consumer(item));
    return emit;
}

StepSpec read_step(const Json& value) {
    StepSpec step;
    step.name = text(value, "name");
    step.emit = read_emit(at(value, "emit"));
    const std::string& op = text(value, "op");
    if (op == "select") {
        step.kind = StepKind::kSelect;
        step.inputs = numbers(value, "inputs");
        step.input = step.inputs.empty() ? kNoTensor : step.inputs.front();
        step.channels = numbers(value, "channels");
        step.repeat = pair(value, "repeat");
        step.size = pair(value, "size");
        step.block = pair(value, "block");
        step.stride = pair(value, "stride");
        step.top = numbers(value, "top");
        step.left = numbers(value, "left");
        return step;
    }
    step.input = whole(value, "input");
    step.inputs = {step.input};
    if (op == "resize") {
        step.kind = StepKind::kResize;
        step.size = pair(value, "size");
        step.scale = number_pair(value, "scale");
        step.offset = number_pair(value, "offset");
        return step;
    }
    if (op == "pool") {
        const std::string& kind = text(value, "kind");
        step.kind = kind == "max" ? StepKind::kMaxPool : kind == "mean" ? StepKind::kMeanPool : StepKind::kAveragePool;
    } else {
        step.kind = op == "quantpack" ? StepKind::kQuantPack : op == "bitconv2d" ? StepKind::kConv : StepKind::kLinear;
        step.multiplier = optional_text(at(value, "multiplier"));
        step.bias = optional_text(at(value, "bias"));
    }
    if (step.kind == StepKind::kConv || step.kind == StepKind::kLinear) {
        step.w_bits = whole(value, "w_bits");
        step.w_odd = text(value, "w_grid") == "odd";
        step.total_filters = whole(value, "total_filters");
        step.planes = text(value, "planes");
    }
    if (op == "pool" || step.kind == StepKind::kConv) {
        step.kernel = pair(value, "kernel");
        step.stride = pair(value, "stride");
        step.padding = pair(value, "padding");
    }
    if (step.kind == StepKind::kConv) {
        step.dilation = pair(value, "dilation");
        step.groups = whole(value, "groups");
    }
    return step;
}

ArraySpec read_array(const Json& value) {
    ArraySpec array;
    array.dtype = text(value, "dtype");
    for (const Json& size : list(value, "shape")) array.shape.push_back(size.number()->integer);
    array.offset = at(value, "offset").number()->integer;
    return array;
}

int read_version(const Json& body) {
    if (!body.object()) refuse(rule::kType, "program text is not a JSON object");
    const Json* version = body.find("version");
    const Json::Number* number = version ? version->number() : nullptr;
    if (!number || !number->whole || number->integer < 1 || number->integer > kProgramVersion)
        refuse(rule::kVersion,
               "program text has " + (number ? "version " + std::to_string(number->integer) : "no version") +
                   "; this library reads up to " + std::to_string(kProgramVersion) + ", update it or pack again");
    return static_cast<int>(number->integer);
}

}  // namespace

int output_size(int size, int kernel, int stride, int padding, int dilation) {
    const int64_t span = size + int64_t{2} * padding - static_cast<int64_t>(dilation) * (kernel - 1) - 1;
    return span < 0 ? 0 : static_cast<int>(span / stride + 1);
}

ProgramSpec::ProgramSpec(const std::string& text_of_it, const unsigned char* blob, int64_t blob_bytes) : blob_(blob) {
    Json body = Json::parse(text_of_it);
    version = read_version(body);
    conform(body, schema::kProgram);
    for (const Json& value : list(body, "tensors")) tensors.push_back(read_tensor(value));
    for (const Json& value : list(body, "steps")) steps.push_back(read_step(value));
    inputs = numbers(body, "inputs");
    outputs = numbers(body, "outputs");
    for (const Json::Member& member : *at(body, "arrays").object()) {
        keys_.push_back(member.key);
        arrays_.emplace(member.key, read_array(member.value));
    }
    stream_dtype = text(body, "stream_dtype");
    digest = text(body, "digest");
    check_program(*this, blob_bytes);
    stream_type = stream_dtype == "float32"   ? StreamType::kFloat32
                  : stream_dtype == "float16" ? StreamType::kFloat16
                                              : StreamType::kBfloat16;
}

const ArraySpec* ProgramSpec::find_array(const std::string& key) const {
    const auto found = arrays_.find(key);
    return found == arrays_.end() ? nullptr : &found->second;
}

const float* ProgramSpec::floats(const std::string& key) const {
    return reinterpret_cast<const float*>(blob_ + array(key).offset);
}

const int32_t* ProgramSpec::integers(const std::string& key) const {
    return reinterpret_cast<const int32_t*>(blob_ + array(key).offset);
}

}  // namespace lbs
