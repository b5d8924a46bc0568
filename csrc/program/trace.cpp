#include "program/trace.h"

#include <cstring>

namespace lbs {
namespace {

uint16_t bfloat16_bits(float value) {  // exact: the value was rounded before
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(bits >> 16);
}

uint16_t float16_bits(float value) {  // exact: the value was rounded before
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits == 0x7f800000u) return sign | 0x7c00u;
    if (bits >= 0x38800000u) return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));  // at least 2^-14
    std::memcpy(&value, &bits, 4);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(value * 16777216.0f));  // subnormal: steps of 2^-24
}

void export_codes(const CodeLayout& layout, int channels, const unsigned char* in, uint8_t* out) {
    for (int y = 0; y < layout.height; ++y)
        for (int x = 0; x < layout.width; ++x)
            for (int c = 0; c < channels; ++c) *out++ = in[layout.offset(y, x, c)];
}

void export_stream(const TensorSpec& tensor, StreamType type, const float* in, void* out) {
    const int64_t pixels = tensor.pixels();
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
        for (int c = 0; c < tensor.channels; ++c) {
            const float value = in[c * pixels + pixel];
            const int64_t at = pixel * tensor.channels + c;
            if (type == StreamType::kFloat32) static_cast<float*>(out)[at] = value;
            else
                static_cast<uint16_t*>(out)[at] =
                    type == StreamType::kFloat16 ? float16_bits(value) : bfloat16_bits(value);
        }
}

}  // namespace

void export_tensors(const ProgramPlan& plan, const std::vector<int>& written, const std::map<int, void*>& traces,
                    int64_t image, unsigned char* const* tensors) {
    for (int index : written) {
        const auto found = traces.find(index);
        if (found == traces.end()) continue;
        const auto i = static_cast<size_t>(index);
        const TensorSpec& tensor = plan.spec.tensors[i];
        const int64_t element = tensor.form == Form::kCodes ? 1 : plan.spec.stream_type == StreamType::kFloat32 ? 4 : 2;
        unsigned char* out =
            static_cast<unsigned char*>(found->second) + image * tensor.pixels() * tensor.channels * element;
        if (tensor.form == Form::kCodes) export_codes(plan.layouts[i], tensor.channels, tensors[i], out);
        else export_stream(tensor, plan.spec.stream_type, reinterpret_cast<const float*>(tensors[i]), out);
    }
}

}  // namespace lbs
