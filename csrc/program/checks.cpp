#include "program/checks.h"

#include <algorithm>

#include "common/check.h"
#include "common/format.h"
#include "common/rules.h"
#include "common/utf8.h"
#include "program/schema.h"

namespace lbs {
namespace {

bool within(int64_t value, int64_t first, int64_t last) { return value >= first && value <= last; }

bool is_digest(const std::string& digest) {
    const auto is_hex = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
    return digest.empty() || (digest.size() == 64 && std::all_of(digest.begin(), digest.end(), is_hex));
}

void check_name(const std::string& name, const std::string& place) {
    int64_t characters = 0;
    bool printable = true;
    for (size_t at = 0; at < name.size(); ++characters)
        printable = is_printable(next_code_point(name, at)) && printable;
    if (!within(characters, 1, kMaxName) || !printable)
        refuse(rule::kName, place + " is named '" + name.substr(0, kMaxName) + "'; names are 1 to " +
                                std::to_string(kMaxName) + " printable characters");
}

void check_count(size_t count, const char* name) {
    if (count > static_cast<size_t>(kMaxCount))
        refuse(rule::kCount, "program has " + std::to_string(count) + " " + name + "; at most " +
                                 std::to_string(kMaxCount) + " are allowed");
}

void check_tensor(const TensorSpec& spec, const std::string& place) {
    check_name(spec.name, place);
    for (int size : {spec.channels, spec.height, spec.width})
        if (!within(size, 1, kMaxSize))
            refuse(rule::kSize,
                   place + " has a size of " + std::to_string(size) + "; sizes are 1 to " + std::to_string(kMaxSize));
    if (spec.pixels() > kMaxElements || spec.pixels() * spec.channels > kMaxElements)
        refuse(rule::kElements, place + " has more than " + std::to_string(kMaxElements) + " elements per image");
    if (spec.form == Form::kCodes) {
        if (!within(spec.bits, 1, kMaxBits))
            refuse(rule::kBits,
                   place + " has " + std::to_string(spec.bits) + " bits; codes have 1 to " + std::to_string(kMaxBits));
        if (!within(spec.zero, 0, (1 << spec.bits) - 1))
            refuse(rule::kZero, place + " has zero = " + std::to_string(spec.zero) + "; it is a code");
        if (spec.is_signed && spec.zero) refuse(rule::kSignedZero, place + " is signed and has a zero");
    } else if (spec.bits || spec.zero || spec.is_signed) {
        refuse(rule::kCodesOnly, place + " has bits, zero or sign; only codes have them");
    }
    if (spec.is_bytes && spec.form != Form::kImage)
        refuse(rule::kImageDtype, place + " is of uint8; only images have a dtype");
    if (spec.is_flat && (spec.form != Form::kStream || spec.pixels() != 1))
        refuse(rule::kFlat, place + " is flat; only a stream of 1 x 1 pixels can be");
}

void check_version_1(const ProgramSpec& program) {
    for (const TensorSpec& tensor : program.tensors)
        if (tensor.is_bytes) refuse(rule::kVersion1, "image '" + tensor.name + "' is uint8 in a program of version 1");
    for (const StepSpec& step : program.steps)
        if (step.kind == StepKind::kQuantPack && (step.multiplier || step.bias))
            refuse(rule::kVersion1, "step '" + step.name + "' has a multiplier or bias in a program of version 1");
}

bool moves_pixels(const StepSpec& step) {
    const auto one = [](Pair pair) { return pair.y == 1 && pair.x == 1; };
    const bool plain = one(step.block) && one(step.stride) && step.top.empty() && step.left.empty();
    return step.size.y || step.size.x || !plain;
}

void check_version_2(const StepSpec& step, const std::string& where) {
    if (!step.w_odd) refuse(rule::kVersion2, "step '" + step.name + "' has weights on a grid with a zero" + where);
    if (step.emit.activation || step.emit.gate != kNoTensor)
        refuse(rule::kVersion2, "step '" + step.name + "' has an activation or a gate" + where);
    if (step.kind == StepKind::kAveragePool || step.kind == StepKind::kSelect)
        refuse(rule::kVersion2, "step '" + step.name + "' is an average or a selection" + where);
}

void check_version_3(const StepSpec& step, const std::string& where) {
    if (step.kind == StepKind::kResize) refuse(rule::kVersion3, "step '" + step.name + "' interpolates" + where);
    if (step.kind == StepKind::kSelect && moves_pixels(step))
        refuse(rule::kVersion3, "step '" + step.name + "' moves pixels" + where);
}

void check_version_4(const StepSpec& step, const std::string& where) {
    const auto stands = [](const ConsumerSpec& consumer) { return consumer.step.has_value(); };
    if (step.emit.residual_step || std::any_of(step.emit.consumers.begin(), step.emit.consumers.end(), stands))
        refuse(rule::kVersion4, "step '" + step.name + "' has a step of codes" + where);
}

void check_version(const ProgramSpec& program) {
    const std::string where = " in a program of version " + std::to_string(program.version);
    if (program.version < 2) check_version_1(program);
    for (const StepSpec& step : program.steps) {
        if (program.version < 3) check_version_2(step, where);
        if (program.version < 4) check_version_3(step, where);
        if (program.version < 5) check_version_4(step, where);
    }
}

void check_array(const ArraySpec& spec, const std::string& key, int64_t blob_bytes) {
    const std::string place = "array '" + key + "'";
    check_name(key, "an array");
    if (spec.dtype != "float32" && spec.dtype != "int32")
        refuse(rule::kArrayDtype, place + " has dtype '" + spec.dtype + "'; expected float32 or int32");
    const auto is_size = [](int64_t size) { return within(size, 1, kMaxSize); };
    if (!within(static_cast<int64_t>(spec.shape.size()), 1, 4) ||
        !std::all_of(spec.shape.begin(), spec.shape.end(), is_size))
        refuse(rule::kArrayShape, place + " is not of 1 to 4 sizes of 1 to " + std::to_string(kMaxSize));
    if (spec.offset < 0 || spec.offset % kBlobAlignment)
        refuse(rule::kArrayPlace, place + " starts at byte " + std::to_string(spec.offset) +
                                      "; offsets are multiples of " + std::to_string(kBlobAlignment));
    const int64_t limit = blob_bytes / 4;
    int64_t count = 1;  // of elements, at most one beyond the limit
    for (int64_t size : spec.shape) count = size > limit / count ? limit + 1 : count * size;
    if (count > limit || spec.offset > blob_bytes - 4 * count)
        refuse(rule::kArrayPlace, place + " lies outside the blob of " + std::to_string(blob_bytes) + " bytes");
}

// Kernels multiply whole words.
void check_planes(const ProgramSpec& program) {
    for (const StepSpec& step : program.steps) {
        if (step.kind != StepKind::kConv && step.kind != StepKind::kLinear) continue;
        const int channels = program.tensors[static_cast<size_t>(step.input)].channels / step.groups;
        if (channels % kWord == 0) continue;
        const std::vector<int64_t>& shape = program.array(step.planes).shape;
        const int32_t* planes = program.integers(step.planes);
        const int64_t words = shape[3], rows = shape[0] * shape[1] * shape[2];
        uint32_t last = 0;
        for (int64_t row = 1; row <= rows; ++row) last |= static_cast<uint32_t>(planes[row * words - 1]);
        if (last >> (channels % kWord))
            refuse(rule::kUnusedBits, "step '" + step.name + "' has planes with bits beyond channel " +
                                          std::to_string(channels - 1) + "; unused bits are 0");
    }
}

}  // namespace

bool is_printable(uint32_t code) {
    for (const schema::CodePoints& hidden : schema::kNotPrintable)
        if (code >= hidden.first && code <= hidden.last) return false;
    return true;
}

void check_program(const ProgramSpec& program, int64_t blob_bytes) {
    check_count(program.tensors.size(), "tensors");
    check_count(program.steps.size(), "steps");
    check_count(program.array_keys().size(), "arrays");
    const std::string& type = program.stream_dtype;
    if (type != "float32" && type != "float16" && type != "bfloat16")
        refuse(rule::kStreamDtype, "stream_dtype is '" + type + "'; expected float32, float16 or bfloat16");
    if (!is_digest(program.digest)) refuse(rule::kDigest, "digest is neither 64 hexadecimal digits nor empty");
    for (size_t i = 0; i < program.tensors.size(); ++i) check_tensor(program.tensors[i], "tensor " + std::to_string(i));
    check_version(program);
    for (const std::string& key : program.array_keys()) check_array(program.array(key), key, blob_bytes);
    for (const StepSpec& step : program.steps) check_name(step.name, "a step");
    walk_program(program);
    if (program.has_blob()) check_planes(program);
}

}  // namespace lbs
