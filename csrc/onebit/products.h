// The multiplications of one step, 256 bits of K,, in the two instructions there are, over the primitives of a Machine.
#pragma once

#include "onebit/index.h"

namespace lbs::onebit {

// wgmma of a group of 128 threads: both operands from shared memory, a product runs on while the threads go on.
template <int kN, class Machine>
LBS_HD void wgmma_step(Machine& machine, int (&acc)[kMultiplyGroups][kN / 2], int a_byte, int b_byte, int step) {
    const uint64_t a = matrix_descriptor(machine.address(a_byte)), b = matrix_descriptor(machine.address(b_byte));
    machine.open_products();
    LBS_UNROLL for (int pair = 0; pair < 4; ++pair) {
        const int plane_w = pair / 2, plane_a = pair % 2;
        machine.template wgmma<kN>(acc[plane_w + plane_a], a + (operand_byte(plane_a, step) >> 4),
                                   b + (operand_byte(plane_w, step) >> 4));
    }
    machine.close_products();
}

// mma.sync of a warp: 16 rows by kN columns, so that fragments are those of wgmma and the rest of the kernel is shared.
template <int kN, class Machine>
LBS_HD void mma_step(Machine& machine, int (&acc)[kMultiplyGroups][kN / 2], int a_byte, int b_byte, int step) {
    const int warp = machine.thread() / 32 % 4, lane = machine.thread() % 32;
    uint32_t a[2][4];
    LBS_UNROLL for (int plane = 0; plane < 2; ++plane) {
        machine.load_matrices(a_byte + a_matrix_byte(warp, lane, plane, step), a[plane]);
    }
    LBS_UNROLL for (int two = 0; two < kN / 16; ++two) {
        LBS_UNROLL for (int plane_w = 0; plane_w < 2; ++plane_w) {
            uint32_t b[4];
            machine.load_matrices(b_byte + b_matrix_byte(two, lane, plane_w, step), b);
            LBS_UNROLL for (int one = 0; one < 2; ++one) {
                LBS_UNROLL for (int plane_a = 0; plane_a < 2; ++plane_a) {
                    machine.mma(&acc[plane_w + plane_a][(2 * two + one) * 4], a[plane_a], b[2 * one], b[2 * one + 1]);
                }
            }
        }
    }
}

}  // namespace lbs::onebit
