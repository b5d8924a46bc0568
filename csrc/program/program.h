// A program as read from its text: mirrors lbs_kernels/program/steps.py.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
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
    bool is_flat = false;
    bool is_bytes = false;  // an image of uint8
    int64_t pixels() const { return static_cast<int64_t>(height) * width; }
};

struct ConsumerSpec {
    int tensor = 0;
    int bits = 0, zero = 0;
    bool is_signed = false, relu = false;
    double scale = 1.0;  // exact in float32, as low and high are
    std::optional<std::string> pre_scale, pre_bias;
    std::optional<double> step;  // exact in float32
};

constexpr int kNoTensor = -1;

struct ActivationSpec {
    ActivationKind kind = ActivationKind::kNone;
    double value = 0.0;  // exact in float32 where the kind has one
    std::optional<std::string> slope;
    bool first = false;
};

struct EmitSpec {
    int gate = kNoTensor, residual = kNoTensor, stream = kNoTensor;
    std::optional<ActivationSpec> activation;
    std::optional<double> low, high;
    std::optional<double> residual_step;  // of a residual of codes, exact in float32
    std::vector<ConsumerSpec> consumers;
};

struct Pair {
    int y = 1, x = 1;
};

struct Numbers {
    double y = 1, x = 1;
};

enum class StepKind { kQuantPack, kConv, kLinear, kMaxPool, kMeanPool, kAveragePool, kSelect, kResize };

struct StepSpec {
    StepKind kind = StepKind::kQuantPack;
    std::string name;
    int input = 0;               // the first of a selection
    std::vector<int> inputs;     // all of them
    std::vector<int> channels;   // of a selection; empty: all, in order
    std::vector<int> top, left;  // of a selection: one for each input; empty: 0
    EmitSpec emit;
    int w_bits = 0, groups = 1, total_filters = 0;
    bool w_odd = true;  // a weight code counts as 2 q - n, else as q - 2^(w_bits - 1)
    Pair kernel, stride, padding{0, 0}, dilation, repeat, block;
    Pair size{0, 0};        // of interpolation, and of what a selection makes that moves pixels
    Numbers scale, offset;  // of interpolation: of positions in the input
    std::string planes;
    std::optional<std::string> multiplier, bias;
};

struct ArraySpec {
    std::string dtype;
    std::vector<int64_t> shape;
    int64_t offset = 0;
};

// The program and the arrays of its blob, which must outlive it.
class ProgramSpec {
public:
    // Raises FormatError for a text or blob that breaks a rule of lbs_kernels/program/rules.py: a kernel that is given
    // the others stays inside its memory. Where the blob is not there yet (null), the text alone is read.
    ProgramSpec(const std::string& text, const unsigned char* blob, int64_t blob_bytes);

    std::vector<TensorSpec> tensors;
    std::vector<StepSpec> steps;
    std::vector<int> inputs, outputs;
    StreamType stream_type = StreamType::kFloat32;
    std::string stream_dtype, digest;
    int version = 0;

    // The array `key`, which a step names and so exists with the dtype it needs.
    const float* floats(const std::string& key) const;
    const int32_t* integers(const std::string& key) const;
    const ArraySpec& array(const std::string& key) const { return arrays_.at(key); }
    const ArraySpec* find_array(const std::string& key) const;  // null where there is none
    const std::vector<std::string>& array_keys() const { return keys_; }
    bool has_blob() const { return blob_ != nullptr; }

private:
    std::map<std::string, ArraySpec> arrays_;
    std::vector<std::string> keys_;  // of the arrays, in the order of the text
    const unsigned char* blob_;
};

// Pixels of an output dimension, 0 where the window does not fit.
int output_size(int size, int kernel, int stride, int padding, int dilation);

}  // namespace lbs
