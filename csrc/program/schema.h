// Written by `python -m lbs_kernels.program.schema`; change what it reads and run it again.
#pragma once

#include "program/record.h"

namespace lbs {
namespace schema {

constexpr CodePoints kNotPrintable[] = {
    {0x0, 0x1f},
    {0x7f, 0xa0},
    {0xad, 0xad},
    {0x600, 0x605},
    {0x61c, 0x61c},
    {0x6dd, 0x6dd},
    {0x70f, 0x70f},
    {0x890, 0x891},
    {0x8e2, 0x8e2},
    {0x1680, 0x1680},
    {0x180e, 0x180e},
    {0x2000, 0x200f},
    {0x2028, 0x202f},
    {0x205f, 0x206f},
    {0x3000, 0x3000},
    {0xd800, 0xf8ff},
    {0xfeff, 0xfeff},
    {0xfff0, 0xfffb},
    {0xfffe, 0xffff},
    {0x110bd, 0x110bd},
    {0x110cd, 0x110cd},
    {0x13430, 0x1343f},
    {0x1bca0, 0x1bca3},
    {0x1d173, 0x1d17a},
    {0xe0000, 0xe00ff},
    {0xf0000, 0x10ffff},
};

constexpr const char* kTensorSpec_form[] = {"image", "codes", "stream", nullptr};
constexpr const char* kTensorSpec_dtype[] = {"float32", "uint8", nullptr};
constexpr Field kTensorSpecFields[] = {
    {"name", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"form", Kind::kChoice, Count::kOne, false, nullptr, kTensorSpec_form, nullptr},
    {"channels", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"height", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"width", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"bits", Kind::kInt, Count::kOne, false, "0", nullptr, nullptr},
    {"zero", Kind::kInt, Count::kOne, false, "0", nullptr, nullptr},
    {"signed", Kind::kBool, Count::kOne, false, "false", nullptr, nullptr},
    {"flat", Kind::kBool, Count::kOne, false, "false", nullptr, nullptr},
    {"dtype", Kind::kChoice, Count::kOne, false, "\"float32\"", kTensorSpec_dtype, nullptr},
};
constexpr Record kTensorSpec = {"TensorSpec", kTensorSpecFields, 10};

constexpr Field kConsumerFields[] = {
    {"tensor", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"bits", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"scale", Kind::kNumber, Count::kOne, false, nullptr, nullptr, nullptr},
    {"zero", Kind::kInt, Count::kOne, false, "0", nullptr, nullptr},
    {"signed", Kind::kBool, Count::kOne, false, "false", nullptr, nullptr},
    {"pre_scale", Kind::kText, Count::kOne, true, "null", nullptr, nullptr},
    {"pre_bias", Kind::kText, Count::kOne, true, "null", nullptr, nullptr},
    {"relu", Kind::kBool, Count::kOne, false, "false", nullptr, nullptr},
    {"step", Kind::kNumber, Count::kOne, true, "null", nullptr, nullptr},
};
constexpr Record kConsumer = {"Consumer", kConsumerFields, 9};

constexpr const char* kActivation_kind[] = {"elu", "gelu", "gelu_tanh", "hardsigmoid", "hardswish", "leaky_relu", "mish", "prelu", "sigmoid", "silu", "tanh", nullptr};
constexpr Field kActivationFields[] = {
    {"kind", Kind::kChoice, Count::kOne, false, nullptr, kActivation_kind, nullptr},
    {"value", Kind::kNumber, Count::kOne, false, "0.0", nullptr, nullptr},
    {"slope", Kind::kText, Count::kOne, true, "null", nullptr, nullptr},
    {"first", Kind::kBool, Count::kOne, false, "false", nullptr, nullptr},
};
constexpr Record kActivation = {"Activation", kActivationFields, 4};

constexpr Field kEmitFields[] = {
    {"residual", Kind::kInt, Count::kOne, true, "null", nullptr, nullptr},
    {"low", Kind::kNumber, Count::kOne, true, "null", nullptr, nullptr},
    {"high", Kind::kNumber, Count::kOne, true, "null", nullptr, nullptr},
    {"stream", Kind::kInt, Count::kOne, true, "null", nullptr, nullptr},
    {"consumers", Kind::kRecord, Count::kList, false, "[]", nullptr, &kConsumer},
    {"activation", Kind::kRecord, Count::kOne, true, "null", nullptr, &kActivation},
    {"gate", Kind::kInt, Count::kOne, true, "null", nullptr, nullptr},
    {"residual_step", Kind::kNumber, Count::kOne, true, "null", nullptr, nullptr},
};
constexpr Record kEmit = {"Emit", kEmitFields, 8};

constexpr Field kQuantPackStepFields[] = {
    {"name", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"input", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"emit", Kind::kRecord, Count::kOne, false, nullptr, nullptr, &kEmit},
    {"multiplier", Kind::kText, Count::kOne, true, "null", nullptr, nullptr},
    {"bias", Kind::kText, Count::kOne, true, "null", nullptr, nullptr},
};
constexpr Record kQuantPackStep = {"QuantPackStep", kQuantPackStepFields, 5};

constexpr const char* kConvStep_w_grid[] = {"odd", "zero", nullptr};
constexpr Field kConvStepFields[] = {
    {"name", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"input", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"emit", Kind::kRecord, Count::kOne, false, nullptr, nullptr, &kEmit},
    {"w_bits", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"kernel", Kind::kInt, Count::kPair, false, nullptr, nullptr, nullptr},
    {"stride", Kind::kInt, Count::kPair, false, nullptr, nullptr, nullptr},
    {"padding", Kind::kInt, Count::kPair, false, nullptr, nullptr, nullptr},
    {"dilation", Kind::kInt, Count::kPair, false, nullptr, nullptr, nullptr},
    {"groups", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"total_filters", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"planes", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"multiplier", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"bias", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"w_grid", Kind::kChoice, Count::kOne, false, "\"odd\"", kConvStep_w_grid, nullptr},
};
constexpr Record kConvStep = {"ConvStep", kConvStepFields, 14};

constexpr const char* kLinearStep_w_grid[] = {"odd", "zero", nullptr};
constexpr Field kLinearStepFields[] = {
    {"name", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"input", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"emit", Kind::kRecord, Count::kOne, false, nullptr, nullptr, &kEmit},
    {"w_bits", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"total_filters", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"planes", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"multiplier", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"bias", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"w_grid", Kind::kChoice, Count::kOne, false, "\"odd\"", kLinearStep_w_grid, nullptr},
};
constexpr Record kLinearStep = {"LinearStep", kLinearStepFields, 9};

constexpr const char* kPoolStep_kind[] = {"max", "mean", "average", nullptr};
constexpr Field kPoolStepFields[] = {
    {"name", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"input", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"emit", Kind::kRecord, Count::kOne, false, nullptr, nullptr, &kEmit},
    {"kind", Kind::kChoice, Count::kOne, false, nullptr, kPoolStep_kind, nullptr},
    {"kernel", Kind::kInt, Count::kPair, false, "[1, 1]", nullptr, nullptr},
    {"stride", Kind::kInt, Count::kPair, false, "[1, 1]", nullptr, nullptr},
    {"padding", Kind::kInt, Count::kPair, false, "[0, 0]", nullptr, nullptr},
};
constexpr Record kPoolStep = {"PoolStep", kPoolStepFields, 7};

constexpr Field kSelectStepFields[] = {
    {"name", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"inputs", Kind::kInt, Count::kList, false, nullptr, nullptr, nullptr},
    {"emit", Kind::kRecord, Count::kOne, false, nullptr, nullptr, &kEmit},
    {"channels", Kind::kInt, Count::kList, false, "[]", nullptr, nullptr},
    {"repeat", Kind::kInt, Count::kPair, false, "[1, 1]", nullptr, nullptr},
    {"size", Kind::kInt, Count::kPair, false, "[0, 0]", nullptr, nullptr},
    {"block", Kind::kInt, Count::kPair, false, "[1, 1]", nullptr, nullptr},
    {"stride", Kind::kInt, Count::kPair, false, "[1, 1]", nullptr, nullptr},
    {"top", Kind::kInt, Count::kList, false, "[]", nullptr, nullptr},
    {"left", Kind::kInt, Count::kList, false, "[]", nullptr, nullptr},
};
constexpr Record kSelectStep = {"SelectStep", kSelectStepFields, 10};

constexpr Field kResizeStepFields[] = {
    {"name", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"input", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
    {"emit", Kind::kRecord, Count::kOne, false, nullptr, nullptr, &kEmit},
    {"size", Kind::kInt, Count::kPair, false, nullptr, nullptr, nullptr},
    {"scale", Kind::kNumber, Count::kPair, false, nullptr, nullptr, nullptr},
    {"offset", Kind::kNumber, Count::kPair, false, nullptr, nullptr, nullptr},
};
constexpr Record kResizeStep = {"ResizeStep", kResizeStepFields, 6};

constexpr Field kArraySpecFields[] = {
    {"dtype", Kind::kText, Count::kOne, false, nullptr, nullptr, nullptr},
    {"shape", Kind::kInt, Count::kList, false, nullptr, nullptr, nullptr},
    {"offset", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
};
constexpr Record kArraySpec = {"ArraySpec", kArraySpecFields, 3};

constexpr Field kProgramFields[] = {
    {"tensors", Kind::kRecord, Count::kList, false, nullptr, nullptr, &kTensorSpec},
    {"steps", Kind::kStep, Count::kList, false, nullptr, nullptr, nullptr},
    {"inputs", Kind::kInt, Count::kList, false, nullptr, nullptr, nullptr},
    {"outputs", Kind::kInt, Count::kList, false, nullptr, nullptr, nullptr},
    {"arrays", Kind::kRecord, Count::kMap, false, "{}", nullptr, &kArraySpec},
    {"stream_dtype", Kind::kText, Count::kOne, false, "\"float32\"", nullptr, nullptr},
    {"digest", Kind::kText, Count::kOne, false, "\"\"", nullptr, nullptr},
    {"version", Kind::kInt, Count::kOne, false, nullptr, nullptr, nullptr},
};
constexpr Record kProgram = {"Program", kProgramFields, 8};

// By their op.
constexpr StepRecord kSteps[] = {
    {"quantpack", &kQuantPackStep},
    {"bitconv2d", &kConvStep},
    {"bitlinear", &kLinearStep},
    {"pool", &kPoolStep},
    {"select", &kSelectStep},
    {"resize", &kResizeStep},
};

}  // namespace schema
}  // namespace lbs
