// A Task from a Python dict: the one argument of the native functions.
//
//     x, w, offset, border             addresses: activations in their GPU form, laid-out weights, int32 [slots], and a
//                                      pixel of what padding holds, or 0 where that is zeros
//     accumulators                     address of int32 [M, O], or 0; if not 0 nothing else is written
//     multiplier, bias                 addresses of float32 [slots]
//     thresholds, flips                addresses of int32 [blocks, levels, filters of a block] and bits, or 0
//     residual, stream, stream_type    addresses of [M, O] or 0; "float32", "float16" or "bfloat16"
//     residual_step                    None, or a float: then residual is biased bytes [M, residual_pitch] of codes
//     whose
//                                      0 is residual_zero
//     batch, height, width, channels, filters, kernel, stride, padding, dilation, w_bits, w_odd, a_bits, signed
//     split                            thread blocks of a cluster that share K of a tile, 1 where none do
//     low, high                        floats or None
//     consumers                        list of dicts: codes, pre_scale, pre_bias (addresses), scale, bits, kept
//                                      ("planes", "bytes", "nibbles"),
//                                      pitch (words or bytes from pixel to pixel), zero, signed, relu, step (None, or
//                                      a float: the codes stand for the value of the consumers behind them)
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>

#include "cuda/task.h"
#include "cuda/tile_row.h"

namespace lbs::gpu {

template <class T>
T field(const pybind11::dict& task, const char* name) {
    require(task.contains(name), std::string("CUDA task: field '") + name + "' is missing");
    return task[name].template cast<T>();
}

template <class T>
T* address(const pybind11::dict& task, const char* name) {
    return reinterpret_cast<T*>(field<uintptr_t>(task, name));
}

inline StreamType stream_type(const std::string& name) {
    if (name == "float32") return StreamType::kFloat32;
    if (name == "float16") return StreamType::kFloat16;
    require(name == "bfloat16", "CUDA task: stream_type is '" + name + "'; float32, float16 and bfloat16 exist");
    return StreamType::kBfloat16;
}

inline Kept kept(const std::string& name) {
    if (name == "planes") return Kept::kPlanes;
    if (name == "bytes") return Kept::kBytes;
    require(name == "nibbles", "CUDA task: codes are kept as '" + name + "'; planes, bytes and nibbles exist");
    return Kept::kNibbles;
}

inline bool bound(const pybind11::dict& task, const char* name, float& value) {
    const auto given = field<pybind11::object>(task, name);
    if (given.is_none()) return false;
    value = given.cast<float>();
    return true;
}

inline ConsumerTarget consumer_target(const pybind11::dict& k) {
    ConsumerTarget target{};
    target.codes = address<void>(k, "codes");
    target.pre_scale = address<const float>(k, "pre_scale");
    target.pre_bias = address<const float>(k, "pre_bias");
    target.scale = field<float>(k, "scale");
    target.bits = field<int>(k, "bits");
    target.kept = kept(field<std::string>(k, "kept"));
    target.pitch = field<int>(k, "pitch");
    target.zero = field<int>(k, "zero");
    target.is_signed = field<bool>(k, "signed");
    target.relu = field<bool>(k, "relu");
    target.stands = bound(k, "step", target.step);
    return target;
}

inline Task read_task(const pybind11::dict& task) {
    using Pair = std::pair<int, int>;
    Task t;
    t.x = address<const void>(task, "x");
    t.w = address<const void>(task, "w");
    t.border = address<const void>(task, "border");
    t.offset = address<const int>(task, "offset");
    t.accumulators = address<int>(task, "accumulators");
    t.multiplier = address<const float>(task, "multiplier");
    t.bias = address<const float>(task, "bias");
    t.thresholds = address<const int>(task, "thresholds");
    t.flips = address<const uint32_t>(task, "flips");
    t.residual = address<const void>(task, "residual");
    if (t.residual && bound(task, "residual_step", t.coded.step)) {
        t.coded.codes = static_cast<const int8_t*>(t.residual);
        t.coded.pitch = field<int>(task, "residual_pitch");
        t.coded.zero = field<int>(task, "residual_zero");
        t.residual = nullptr;
    }
    t.stream = address<void>(task, "stream");
    t.stream_type = stream_type(field<std::string>(task, "stream_type"));
    t.batch = field<int64_t>(task, "batch");
    t.height = field<int64_t>(task, "height");
    t.width = field<int64_t>(task, "width");
    t.channels = field<int64_t>(task, "channels");
    t.filters = field<int64_t>(task, "filters");
    std::tie(t.kernel_h, t.kernel_w) = field<Pair>(task, "kernel");
    std::tie(t.stride_h, t.stride_w) = field<Pair>(task, "stride");
    std::tie(t.pad_h, t.pad_w) = field<Pair>(task, "padding");
    std::tie(t.dilation_h, t.dilation_w) = field<Pair>(task, "dilation");
    t.w_bits = field<int>(task, "w_bits");
    t.w_odd = field<bool>(task, "w_odd");
    t.a_bits = field<int>(task, "a_bits");
    t.split = field<int>(task, "split");
    t.is_signed = field<bool>(task, "signed");
    t.has_low = bound(task, "low", t.low);
    t.has_high = bound(task, "high", t.high);
    for (const auto& k : field<pybind11::list>(task, "consumers"))
        t.consumers.push_back(consumer_target(k.cast<pybind11::dict>()));
    return t;
}

// [(machine, groups, filters, stages, bytes of shared memory)] of all kernels.
template <size_t kRows>
pybind11::list tile_rows(const TileRow (&rows)[kRows]) {
    pybind11::list listed;
    for (const TileRow& row : rows)
        listed.append(pybind11::make_tuple(row.machine, row.groups, row.filters, row.stages, row.shared_bytes));
    return listed;
}

}  // namespace lbs::gpu
