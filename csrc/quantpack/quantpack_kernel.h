// quantpack: the floats of a stream, or an image as it lies in the caller's memory, to codes and streams.
//
//     x = float32(value);  y = fma(x, gain[c], offset[c]) where there are any, else x;  then what emit says
//
// An image is float32 or bytes, and its channels lie first ([channel][pixel], as in a stream) or last ([pixel][channel]);
// it is read where it is, without a copy and never past its end.
#pragma once

#include "program/emit_kernel.h"
#include "program/plan.h"

namespace {

// Each reader gives four channels, of which `live` exist, of the vector that starts at `pixel` and has `count` pixels.

struct FloatPlanes {
    const float* values;
    int64_t pixels;
    LBS_INLINE Quad operator()(int channel, int live, int64_t pixel, int count) const {
        const float* first = values + channel * pixels + pixel;
        const uint32_t valid = (1u << count) - 1u;
        Quad y;
        for (int j = 0; j < 4; ++j) y.v[j] = Simd::fload_mask(first + j * pixels, j < live ? valid : 0);
        return y;
    }
};

struct BytePlanes {
    const uint8_t* values;
    int64_t pixels;
    LBS_INLINE Quad operator()(int channel, int live, int64_t pixel, int count) const {
        const uint8_t* first = values + channel * pixels + pixel;
        Quad y;
        for (int j = 0; j < 4; ++j) y.v[j] = Simd::fset(0.0f);
        for (int j = 0; j < live; ++j) {
            uint8_t tail[Simd::L] = {};
            const uint8_t* plane = first + j * pixels;
            if (count < Simd::L) plane = static_cast<const uint8_t*>(__builtin_memcpy(tail, plane, static_cast<size_t>(count)));
            y.v[j] = Simd::fcvt(Simd::ibytes(plane));
        }
        return y;
    }
};

struct FloatPixels {
    const float* values;
    int64_t channels;
    LBS_INLINE Quad operator()(int channel, int live, int64_t pixel, int count) const {
        const float* first = values + pixel * channels + channel;
        if (count == Simd::L && live == 4) return whole<4>(first);
        if (count == Simd::L && live == 3) return whole<3>(first);
        float planes[4][Simd::L] = {};
        for (int i = 0; i < count; ++i)
            for (int j = 0; j < live; ++j) planes[j][i] = first[i * channels + j];
        return {{Simd::fload(planes[0]), Simd::fload(planes[1]), Simd::fload(planes[2]), Simd::fload(planes[3])}};
    }

    // One by one, in loops of constant length.
    template <int kLive>
    LBS_INLINE Quad whole(const float* first) const {
        float planes[kLive][Simd::L];
        for (int i = 0; i < Simd::L; ++i)
            for (int j = 0; j < kLive; ++j) planes[j][i] = first[i * channels + j];
        Quad y;
        for (int j = 0; j < 4; ++j) y.v[j] = j < kLive ? Simd::fload(planes[j < kLive ? j : 0]) : Simd::fset(0.0f);
        return y;
    }
};

struct BytePixels {
    const uint8_t* values;
    int64_t channels, pixels;
    const int32_t* offsets;  // to the pixels of a vector
    LBS_INLINE Quad operator()(int channel, int live, int64_t pixel, int count) const {
        const uint8_t* first = values + pixel * channels + channel;
        Simd::I words;
        // Four bytes of every pixel; where fewer are left they reach into the next one, which the last pixel has not.
        if (live == 4 ? count == Simd::L : pixel + Simd::L < pixels) {
            words = Simd::igather(first, offsets);
        } else {
            int32_t lanes[Simd::L] = {};
            for (int i = 0; i < count; ++i)
                __builtin_memcpy(&lanes[i], first + i * channels, static_cast<size_t>(live));
            words = Simd::iload(lanes);
        }
        return {{Simd::fcvt(Simd::ibyte(words, 0)), Simd::fcvt(Simd::ibyte(words, 1)),
                 Simd::fcvt(Simd::ibyte(words, 2)), Simd::fcvt(Simd::ibyte(words, 3))}};
    }
};

template <class Reader>
void quantpack_from(const Reader& reader, const lbs::ReadPlan& read, const lbs::EmitPlan& e, const lbs::RunContext& run,
                    int first_vector, int last_vector) {
    for (int channel = 0; channel < e.channels; channel += 4) {
        const int live = e.channels - channel < 4 ? e.channels - channel : 4;
        for (int vector = first_vector; vector < last_vector; ++vector) {
            const int64_t pixel = static_cast<int64_t>(vector) * Simd::L;
            const int count = e.pixels - pixel < Simd::L ? static_cast<int>(e.pixels - pixel) : Simd::L;
            Quad y = reader(channel, live, pixel, count);
            if (read.gain)
                y = each(y, [&](Simd::F x, int j) {
                    return Simd::ffma(x, Simd::fset(read.gain[channel + j]), Simd::fset(read.offset[channel + j]));
                });
            emit4_any(e, run, channel, vector, y);
        }
    }
}

void quantpack_kernel(const lbs::ReadPlan& read, const lbs::EmitPlan& e, const lbs::RunContext& run, const void* values,
                      bool channels_last, int first_vector, int last_vector) {
    const auto* floats = static_cast<const float*>(values);
    const auto* bytes = static_cast<const uint8_t*>(values);
    if (!channels_last) {
        if (read.bytes) return quantpack_from(BytePlanes{bytes, e.pixels}, read, e, run, first_vector, last_vector);
        if (read.gain) return quantpack_from(FloatPlanes{floats, e.pixels}, read, e, run, first_vector, last_vector);
        return emit_planes_kernel(e, run, floats, 0, 0, (e.channels + 3) / 4, first_vector, last_vector);
    }
    if (!read.bytes) return quantpack_from(FloatPixels{floats, e.channels}, read, e, run, first_vector, last_vector);
    int32_t offsets[lbs::kMaxLanes];
    for (int i = 0; i < Simd::L; ++i)
        offsets[i] = static_cast<int32_t>(i * int64_t{e.channels});  // fits where L pixels exist
    quantpack_from(BytePixels{bytes, e.channels, e.pixels, offsets}, read, e, run, first_vector, last_vector);
}

}  // namespace
