#include "program/program.h"

#include <array>

#include "common/check.h"
#include "common/format.h"
#include "common/json.h"

namespace lbs {
namespace {

constexpr int64_t kMaxElements = int64_t{1} << 28;  // of one tensor, as in program/checks.py

Pair read_pair(const Json& value) {
    const auto& items = value.array();
    require(items.size() == 2, "program text: expected a pair of numbers");
    return {items[0].small(), items[1].small()};
}

std::string read_optional_string(const Json& value) { return value.is_null() ? std::string() : value.string(); }
int read_optional_index(const Json& value) { return value.is_null() ? -1 : value.small(); }

TensorSpec read_tensor(const Json& value) {
    TensorSpec tensor;
    tensor.name = value.at("name").string();
    const std::string& form = value.at("form").string();
    require(form == "image" || form == "codes" || form == "stream",
            "tensor '" + tensor.name + "' has form '" + form + "'");
    tensor.form = form == "image" ? Form::kImage : form == "codes" ? Form::kCodes : Form::kStream;
    tensor.channels = value.at("channels").small();
    tensor.height = value.at("height").small();
    tensor.width = value.at("width").small();
    tensor.bits = value.at("bits").small();
    tensor.zero = value.at("zero").small();
    tensor.is_signed = value.at("signed").boolean();
    if (const Json* dtype = value.find("dtype")) {  // since version 2
        require(dtype->string() == "float32" || (dtype->string() == "uint8" && tensor.form == Form::kImage),
                "tensor '" + tensor.name + "' has dtype '" + dtype->string() +
                    "'; only images have one, float32 or uint8");
        tensor.is_bytes = dtype->string() == "uint8";
    }
    return tensor;
}

ConsumerSpec read_consumer(const Json& value) {
    ConsumerSpec consumer;
    consumer.tensor = value.at("tensor").small();
    consumer.bits = value.at("bits").small();
    consumer.zero = value.at("zero").small();
    consumer.is_signed = value.at("signed").boolean();
    consumer.relu = value.at("relu").boolean();
    consumer.scale = static_cast<float>(value.at("scale").number());
    consumer.pre_scale = read_optional_string(value.at("pre_scale"));
    consumer.pre_bias = read_optional_string(value.at("pre_bias"));
    require(consumer.pre_scale.empty() == consumer.pre_bias.empty(),
            "a consumer has only one of pre_scale and pre_bias");
    return consumer;
}

EmitSpec read_emit(const Json& value) {
    EmitSpec emit;
    emit.residual = read_optional_index(value.at("residual"));
    emit.stream = read_optional_index(value.at("stream"));
    emit.has_low = !value.at("low").is_null();
    emit.has_high = !value.at("high").is_null();
    if (emit.has_low) emit.low = static_cast<float>(value.at("low").number());
    if (emit.has_high) emit.high = static_cast<float>(value.at("high").number());
    for (const Json& item : value.at("consumers").array()) emit.consumers.push_back(read_consumer(item));
    return emit;
}

void read_weights(const Json& value, StepSpec& step) {
    step.w_bits = value.at("w_bits").small();
    step.planes = value.at("planes").string();
    step.multiplier = value.at("multiplier").string();
    step.bias = value.at("bias").string();
}

// Since version 2, and optional.
void read_affine(const Json& value, StepSpec& step) {
    if (const Json* key = value.find("multiplier")) step.multiplier = read_optional_string(*key);
    if (const Json* key = value.find("bias")) step.bias = read_optional_string(*key);
    require(step.multiplier.empty() == step.bias.empty(),
            "step '" + step.name + "' has only one of multiplier and bias");
}

StepSpec read_step(const Json& value) {
    StepSpec step;
    const std::string& op = value.at("op").string();
    step.name = value.at("name").string();
    step.input = value.at("input").small();
    step.emit = read_emit(value.at("emit"));
    if (op == "quantpack") {
        step.kind = StepKind::kQuantPack;
        read_affine(value, step);
    } else if (op == "bitconv2d") {
        step.kind = StepKind::kConv;
        read_weights(value, step);
        step.kernel = read_pair(value.at("kernel"));
        step.stride = read_pair(value.at("stride"));
        step.padding = read_pair(value.at("padding"));
        step.dilation = read_pair(value.at("dilation"));
        step.groups = value.at("groups").small();
    } else if (op == "bitlinear") {
        step.kind = StepKind::kLinear;
        read_weights(value, step);
    } else if (op == "pool") {
        const std::string& kind = value.at("kind").string();
        require(kind == "max" || kind == "mean", "step '" + step.name + "' pools by '" + kind + "'");
        step.kind = kind == "max" ? StepKind::kMaxPool : StepKind::kMeanPool;
        step.kernel = read_pair(value.at("kernel"));
        step.stride = read_pair(value.at("stride"));
        step.padding = read_pair(value.at("padding"));
    } else {
        throw FormatError("step '" + step.name + "' has op '" + op + "', which this library does not run");
    }
    return step;
}

ArraySpec read_array(const std::string& key, const Json& value, int64_t blob_bytes) {
    ArraySpec array;
    const std::string& dtype = value.at("dtype").string();
    require(dtype == "float32" || dtype == "int32", "array '" + key + "' has dtype '" + dtype + "'");
    array.is_float = dtype == "float32";
    array.offset = value.at("offset").integer();
    array.count = 1;
    for (const Json& size : value.at("shape").array()) {
        array.shape.push_back(size.small());
        require(array.shape.back() >= 1, "array '" + key + "' has an empty shape");
        array.count *= array.shape.back();
        require(array.count <= blob_bytes, "array '" + key + "' is larger than the blob");
    }
    require(array.offset >= 0 && array.offset % kBlobAlignment == 0 && array.offset + 4 * array.count <= blob_bytes,
            "array '" + key + "' lies outside the blob of " + std::to_string(blob_bytes) + " bytes, or is not aligned");
    return array;
}

// Follows the steps and knows which tensors hold values and what shape a step computes.
class Walk {
public:
    explicit Walk(const ProgramSpec& program) : program_(program), written_(program.tensors.size(), false) {}

    void run() {
        for (int index : program_.inputs) {
            require(in_range(index) && tensor(index).form == Form::kImage, "an input of the program is not an image");
            written_[static_cast<size_t>(index)] = true;
        }
        for (const StepSpec& step : program_.steps) check(step);
        for (int index : program_.outputs)
            require(in_range(index) && written_[static_cast<size_t>(index)] && tensor(index).form == Form::kStream,
                    "an output of the program is not a stream that is written");
    }

private:
    bool in_range(int index) const { return index >= 0 && static_cast<size_t>(index) < written_.size(); }
    const TensorSpec& tensor(int index) const { return program_.tensors[static_cast<size_t>(index)]; }

    void check(const StepSpec& step) {
        const std::string place = "step '" + step.name + "'";
        require(in_range(step.input) && written_[static_cast<size_t>(step.input)],
                place + " reads a tensor before it is written");
        const TensorSpec& source = tensor(step.input);
        int height = source.height, width = source.width, channels = source.channels;
        switch (step.kind) {
            case StepKind::kQuantPack:
                require(source.form != Form::kCodes, place + " reads codes; it reads an image or a stream");
                if (step.multiplier.empty()) break;
                program_.floats(step.multiplier, channels);
                program_.floats(step.bias, channels);
                break;
            case StepKind::kConv:
            case StepKind::kLinear:
                check_weights(step, source, place);
                channels = static_cast<int>(program_.array(step.planes).shape[1]);
                break;
            case StepKind::kMaxPool: require(source.form != Form::kImage, place + " pools an image"); break;
            case StepKind::kMeanPool:
                require(source.form == Form::kStream, place + " takes the mean of something that is not a stream");
                height = width = 1;
        }
        if (step.kind == StepKind::kConv || step.kind == StepKind::kMaxPool) {
            check_window(step, place);
            height = output_size(source.height, step.kernel.y, step.stride.y, step.padding.y, step.dilation.y);
            width = output_size(source.width, step.kernel.x, step.stride.x, step.padding.x, step.dilation.x);
            require(height >= 1 && width >= 1, place + " has no output pixels");
        }
        check_emit(step, source, height, width, channels, place);
    }

    void check_window(const StepSpec& step, const std::string& place) const {
        for (const auto& [kernel, stride, padding, dilation] :
             {std::array{step.kernel.y, step.stride.y, step.padding.y, step.dilation.y},
              std::array{step.kernel.x, step.stride.x, step.padding.x, step.dilation.x}}) {
            const bool sane = kernel >= 1 && stride >= 1 && dilation >= 1 && kernel <= 4096 && dilation <= 4096 &&
                              stride <= (1 << 24);
            require(sane && padding >= 0 && padding <= dilation * (kernel - 1) + 1,
                    place + " has an impossible window");
            // Half the kernel: every window of a pool then holds a pixel.
            require(step.kind == StepKind::kConv || padding <= kernel / 2,
                    place + " pads more than half of its kernel");
        }
    }

    void check_weights(const StepSpec& step, const TensorSpec& source, const std::string& place) const {
        require(source.form == Form::kCodes, place + " multiplies something that is not codes");
        require(step.w_bits >= 1 && step.w_bits <= kMaxBits,
                place + " has " + std::to_string(step.w_bits) + " weight bits");
        require(step.groups >= 1 && source.channels % step.groups == 0,
                place + " has groups that do not divide the channels");
        const ArraySpec& planes = program_.array(step.planes);
        require(planes.shape.size() == 4, place + " has planes of another rank than 4");
        const int64_t taps = static_cast<int64_t>(step.kernel.y) * step.kernel.x;
        const int64_t channels = source.channels / step.groups;
        const int64_t words = (channels + kWord - 1) / kWord;
        require(planes.shape[0] == step.w_bits && planes.shape[2] == taps && planes.shape[3] == words &&
                    planes.shape[1] % step.groups == 0,
                place + " has planes of another shape than its input and kernel need");
        const int64_t limit = taps * channels * ((1 << step.w_bits) - 1) * ((1 << source.bits) - 1);
        require(limit < int64_t{1} << 31, place +
                                              " could overflow its accumulator: " + std::to_string(taps * channels) +
                                              " products of weights up to " + std::to_string((1 << step.w_bits) - 1) +
                                              " and activations up to " + std::to_string((1 << source.bits) - 1));
        require(step.kind != StepKind::kLinear || source.pixels() == 1,
                place + " is linear and reads more than one pixel");
        require(!source.is_signed || (step.padding.y == 0 && step.padding.x == 0),
                place + " pads signed codes, which have no 0");
    }

    void check_emit(const StepSpec& step, const TensorSpec& source, int height, int width, int channels,
                    const std::string& place) {
        const auto fits = [&](int index, Form form) {
            return in_range(index) && tensor(index).form == form && tensor(index).height == height &&
                   tensor(index).width == width && tensor(index).channels == channels;
        };
        const auto write = [&](int index) {
            require(!written_[static_cast<size_t>(index)], place + " writes a tensor a second time");
            written_[static_cast<size_t>(index)] = true;
        };
        const EmitSpec& emit = step.emit;
        if (emit.residual >= 0)
            require(fits(emit.residual, Form::kStream) && written_[static_cast<size_t>(emit.residual)],
                    place + " has an impossible residual");
        if (emit.stream >= 0) {
            require(fits(emit.stream, Form::kStream), place + " has an impossible stream");
            write(emit.stream);
        }
        for (const ConsumerSpec& consumer : emit.consumers) {
            require(fits(consumer.tensor, Form::kCodes), place + " has an impossible consumer");
            const TensorSpec& target = tensor(consumer.tensor);
            require(
                target.bits == consumer.bits && target.zero == consumer.zero && target.is_signed == consumer.is_signed,
                place + " writes codes of another kind than its target holds");
            write(consumer.tensor);
        }
        if (step.kind == StepKind::kMaxPool && source.form == Form::kCodes)
            require(emit.consumers.size() == 1 && emit.stream < 0 && emit.residual < 0 &&
                        emit.consumers[0].zero == source.zero && emit.consumers[0].is_signed == source.is_signed &&
                        emit.consumers[0].bits == source.bits,
                    place + " is a maximum of codes; it has one plain consumer of the same kind");
    }

    const ProgramSpec& program_;
    std::vector<bool> written_;
};

}  // namespace

int output_size(int size, int kernel, int stride, int padding, int dilation) {
    const int64_t span = static_cast<int64_t>(size) + 2 * padding - static_cast<int64_t>(dilation) * (kernel - 1) - 1;
    return span < 0 ? 0 : static_cast<int>(span / stride + 1);
}

ProgramSpec::ProgramSpec(const std::string& text, const unsigned char* blob, int64_t blob_bytes) : blob_(blob) {
    const Json body = Json::parse(text);
    const int version = body.at("version").small();
    require(version >= 1 && version <= kProgramVersion,
            "program has version " + std::to_string(version) + "; this library reads up to " +
                std::to_string(kProgramVersion) + ", update it or pack again");
    const std::string& type = body.at("stream_dtype").string();
    require(type == "float32" || type == "float16" || type == "bfloat16", "stream_dtype is '" + type + "'");
    stream_type = type == "float32"   ? StreamType::kFloat32
                  : type == "float16" ? StreamType::kFloat16
                                      : StreamType::kBfloat16;
    for (const auto& [key, value] : body.at("arrays").object())
        arrays_.emplace(key, read_array(key, value, blob_bytes));
    for (const Json& value : body.at("tensors").array()) tensors.push_back(read_tensor(value));
    for (const Json& value : body.at("steps").array()) steps.push_back(read_step(value));
    for (const Json& value : body.at("inputs").array()) inputs.push_back(value.small());
    for (const Json& value : body.at("outputs").array()) outputs.push_back(value.small());
    check_version(version);
    for (const TensorSpec& tensor : tensors) check_tensor(tensor);
    Walk(*this).run();
}

void ProgramSpec::check_tensor(const TensorSpec& tensor) const {
    const bool sized = tensor.channels >= 1 && tensor.height >= 1 && tensor.width >= 1 &&
                       tensor.pixels() <= kMaxElements && tensor.pixels() * tensor.channels <= kMaxElements;
    require(sized, "tensor '" + tensor.name + "' has an impossible size");
    if (tensor.form == Form::kCodes)
        require(tensor.bits >= 1 && tensor.bits <= kMaxBits && tensor.zero >= 0 && tensor.zero < 1 << tensor.bits &&
                    !(tensor.is_signed && tensor.zero),
                "tensor '" + tensor.name + "' has impossible bits or zero");
}

void ProgramSpec::check_version(int version) const {
    if (version > 1) return;
    for (const TensorSpec& tensor : tensors)
        require(!tensor.is_bytes, "image '" + tensor.name + "' is uint8 in a program of version 1");
    for (const StepSpec& step : steps)
        require(step.kind != StepKind::kQuantPack || step.multiplier.empty(),
                "step '" + step.name + "' has a multiplier in a program of version 1");
}

const ArraySpec& ProgramSpec::array(const std::string& key) const {
    const auto found = arrays_.find(key);
    require(found != arrays_.end(), "the program has no array '" + key + "'");
    return found->second;
}

const float* ProgramSpec::floats(const std::string& key, int64_t count) const {
    const ArraySpec& spec = array(key);
    require(spec.is_float && spec.count == count, "array '" + key + "' is not float32 of " + std::to_string(count));
    return reinterpret_cast<const float*>(blob_ + spec.offset);
}

const int32_t* ProgramSpec::integers(const std::string& key, int64_t count) const {
    const ArraySpec& spec = array(key);
    require(!spec.is_float && spec.count == count, "array '" + key + "' is not int32 of " + std::to_string(count));
    return reinterpret_cast<const int32_t*>(blob_ + spec.offset);
}

}  // namespace lbs
