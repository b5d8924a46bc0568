// The table of one instruction set. Included once per file of this folder, behind its Simd and its convolution.
#pragma once

#include "bitconv2d/depthwise_kernel.h"
#include "bitconv2d/lanes_kernel.h"
#include "bitconv2d/winograd_lanes_kernel.h"
#include "bitlinear/bitlinear_kernel.h"
#include "fakequant/fakequant_kernel.h"
#include "isa/kernels.h"
#include "pool/pool_kernel.h"
#include "quantpack/quantpack_kernel.h"
#include "resize/resize_kernel.h"
#include "select/select_kernel.h"

namespace lbs {
namespace {  // the same names stand for other instructions in every file

constexpr KernelTable kernel_table(decltype(KernelTable::conv) conv, bool uses_tiles) {
    return {
        Simd::L,
        Simd::kNarrowDot ? 32767 : 0,
        Simd::kDotCycles,
        uses_tiles,
        kTileShapes,
        kWinogradShapes,
        kWinogradTiles,
        LBS_LANES_VECTORS,
        LBS_LANES_PIXELS,
        conv,
        any_winograd_kernel,
        depthwise_kernel,
        lanes_kernel,
        linear_kernel,
        emit_planes_kernel,
        quantpack_kernel,
        max_plane_kernel,
        pool_codes_kernel,
        select_codes_kernel,
        select_streams_kernel,
        resize_kernel,
        fake_quant_forward_kernel,
        fake_quant_backward_kernel,
    };
}

}  // namespace
}  // namespace lbs
