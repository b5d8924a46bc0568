// A program as read from its text: mirrors lbs_kernels/program/steps.py.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "program/plan.h"

namespace lbs {

enum class Form { kImage, kCodes, kStream };

struct TensorSpec {
    std::string name;
    Form form = Form::kImage;
    int channels = 0, height = 0, width = 0;
    int bits = 0, zero = 0;
    bool is_signed = false;
    bool is_bytes = false;  // an image of uint8
    int64_t pixels() const { return static_cast<int64_t>(height) * width; }
};

struct ConsumerSpec {
    int tensor = 0;
    int bits = 0, zero = 0;
    bool is_signed = false, relu = false;
    float scale = 1.0f;
    std::string pre_scale, pre_bias;  // empty: none
};

struct EmitSpec {
    int residual = -1, stream = -1;
    bool has_low = false, has_high = false;
    float low = 0.0f, high = 0.0f;
    std::vector<ConsumerSpec> consumers;
};

struct Pair {
    int y = 1, x = 1;
};

enum class StepKind { kQuantPack, kConv, kLinear, kMaxPool, kMeanPool };

struct StepSpec {
    StepKind kind = StepKind::kQuantPack;
    std::string name;
    int input = 0;
    EmitSpec emit;
    int w_bits = 0, groups = 1;
    Pair kernel, stride, padding{0, 0}, dilation;
    std::string planes, multiplier, bias;  // empty: none
};

struct ArraySpec {
    bool is_float = false;
    std::vector<int64_t> shape;
    int64_t offset = 0;
    int64_t count = 0;
};

// The program and the arrays of its blob, which must outlive it.
class ProgramSpec {
public:
    // Raises FormatError for a text or blob that would make a kernel leave its memory.
    ProgramSpec(const std::string& text, const unsigned char* blob, int64_t blob_bytes);

    std::vector<TensorSpec> tensors;
    std::vector<StepSpec> steps;
    std::vector<int> inputs, outputs;
    StreamType stream_type = StreamType::kFloat32;

    // The array `key` of `count` elements; FormatError where it is missing or of another type or size.
    const float* floats(const std::string& key, int64_t count) const;
    const int32_t* integers(const std::string& key, int64_t count) const;
    const ArraySpec& array(const std::string& key) const;

private:
    void check_tensor(const TensorSpec& tensor) const;
    void check_version(int version) const;

    std::map<std::string, ArraySpec> arrays_;
    const unsigned char* blob_;
};

// Pixels of an output dimension.
int output_size(int size, int kernel, int stride, int padding, int dilation);

}  // namespace lbs
