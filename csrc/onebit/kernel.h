// The one-bit implicit GEMM, written once against a Machine: the GPU's tensor cores, or a model of them on a processor.
//
//     acc[m][o] = dot_scale * sum_{p,r} 2^(p+r) popc(W_p[o] & X_r[m]) + sum_scale * sum_k x[m][k] + offset[o]
//
// A block of threads works off tiles of kRows pixels by kN filters, in the order of place_of(). Copies run some chunks
// ahead of the multiplications, across tiles: the next tile's operands arrive while this one is written.
//
// Products of equal weight p + r share an accumulator: three for two planes against two. More planes take several
// passes over K; between passes the three are folded into the first, times 4: no further register is needed.
//
// The window's sum of codes is counted from the activations in shared memory while the tensor cores multiply: 16
// popcounts per thread and chunk on idle units, and no spare column, which whole blocks of filters do not have.
#pragma once

#include "cuda/epilogue.h"
#include "onebit/index.h"

namespace lbs::onebit {

template <int kGroups_, int kN_, int kStages_>
struct Tile {
    static constexpr int kGroups = kGroups_;  // of 128 threads, 64 pixels each
    static constexpr int kN = kN_;
    static constexpr int kStages = kStages_;
    static constexpr int kThreads = kGroups * kWarpgroup;
    static constexpr int kRows = kGroups * kWarpgroupRows;
    static constexpr int kWeightByte = kRows * kRowBytes;  // in a stage
    static constexpr int kStageBytes = (kRows + kN) * kRowBytes;
    static constexpr int kSumByte = kStages * kStageBytes;
    static constexpr int kWindowByte = kSumByte + kRows * 2 * static_cast<int>(sizeof(int));
    static constexpr int kSharedBytes = kWindowByte + kRows * static_cast<int>(sizeof(Window));
};

// Which chunk is copied next.
struct Cursor {
    int tile, pass, chunk, stage;
};

// Chunks copied before they are multiplied: stages still being multiplied are not overwritten.
template <class T, class Machine>
LBS_HD constexpr int copies_ahead() {
    static_assert(T::kStages - 1 - Machine::kInFlight >= 1, "more stages than multiplications in flight");
    return T::kStages - 1 - Machine::kInFlight;
}

template <class T>
LBS_HD void advance(const Params& p, int blocks, Cursor& at) {
    at.stage = at.stage + 1 == T::kStages ? 0 : at.stage + 1;
    if (++at.chunk < p.chunks) return;
    at.chunk = 0;
    if (++at.pass < p.passes) return;
    at.pass = 0;
    at.tile += blocks;
}

// The windows of the rows that this thread's warp copies.
template <class T, class Machine>
LBS_HD Window* warp_windows(Machine& machine) {
    return reinterpret_cast<Window*>(machine.shared(T::kWindowByte)) + machine.thread() / 32 * kWarpRows;
}

// Output pixels are divided into rows and columns once per tile.
template <class T, class Machine>
LBS_HD void find_windows(Machine& machine, const Params& p, int first_row) {
    static_assert(T::kThreads / 32 * kWarpRows == T::kRows, "every row is copied by one warp");
    const int warp = machine.thread() / 32, lane = machine.thread() % 32;
    machine.sync_warp();  // nobody copies by the windows of the tile before any more
    if (lane < kWarpRows) {
        const int row = copied_row<T::kThreads>(p.copy_words, warp, lane);
        warp_windows<T>(machine)[lane] = window_of(p, first_row + row);
    }
    machine.sync_warp();
}

template <class T, int kWords, class Machine>
LBS_HD void copy_activations(Machine& machine, const Params& p, int a_pair, int chunk, int byte) {
    constexpr int kPieces = 2 * kChunkWords / kWords;  // of a row: neighbouring threads fetch whole sectors
    static_assert(kPieces * kWords == 32, "a warp copies kWords rows at once");
    const int warp = machine.thread() / 32, lane = machine.thread() % 32;
    const int piece = lane % kPieces, plane = piece / (kPieces / 2), word = piece % (kPieces / 2) * kWords;
    const Tap tap = tap_of(p, chunk * kChunkWords + word);
    const Window* windows = warp_windows<T>(machine);
    LBS_UNROLL_2 for (int turn = 0; turn < kWarpRows / kWords; ++turn) {
        const int i = turn * kWords + lane / kPieces;
        const int row = copied_row<T::kThreads>(kWords, warp, i);
        const bool inside = enters(p, windows[i], tap);
        const uint32_t* from = p.x + (inside ? word_of(p, windows[i], tap, 2 * a_pair + plane) : 0);
        machine.template copy<4 * kWords>(byte + swizzled_byte(row, plane * kChunkWords + word), from, inside);
    }
}

template <class T, class Machine>
LBS_HD void copy_chunk_activations(Machine& machine, const Params& p, const Cursor& at) {
    if (at.tile >= p.tiles) return;
    if (at.pass == 0 && at.chunk == 0) find_windows<T>(machine, p, place_of(p, at.tile).row_block * T::kRows);
    const int byte = at.stage * T::kStageBytes, a_pair = p.pass[at.pass].a_pair;
    if (p.copy_words == 4) copy_activations<T, 4>(machine, p, a_pair, at.chunk, byte);
    else if (p.copy_words == 2) copy_activations<T, 2>(machine, p, a_pair, at.chunk, byte);
    else copy_activations<T, 1>(machine, p, a_pair, at.chunk, byte);
}

template <class T, class Machine>
LBS_HD void copy_chunk_weights(Machine& machine, const Params& p, const Cursor& at) {
    if (at.tile >= p.tiles) return;
    const int byte = at.stage * T::kStageBytes + T::kWeightByte, filter_block = place_of(p, at.tile).filter_block;
    const uint32_t* w = p.w + weight_block<T::kN>(p, p.pass[at.pass].w_pair, filter_block, at.chunk);
    LBS_UNROLL for (int i = 0; i < T::kN * kRowBytes / kUnitBytes / T::kThreads; ++i) {
        const int unit = machine.thread() + i * T::kThreads;
        machine.template copy<kUnitBytes>(byte + unit * kUnitBytes, w + unit * 4, true);
    }
}

// The first copies. No kernel writes weights: theirs, which arrive with the first group, do not wait for the kernels
// before; everything else does.
template <class T, class Machine>
LBS_HD void begin_copies(Machine& machine, const Params& p, Cursor& at) {
    Cursor weights = at;
    LBS_NO_UNROLL for (int i = 0; i < copies_ahead<T, Machine>(); ++i) {
        copy_chunk_weights<T>(machine, p, weights);
        advance<T>(p, machine.blocks(), weights);
    }
    machine.wait_for_kernels_before();
    LBS_NO_UNROLL for (int i = 0; i < copies_ahead<T, Machine>(); ++i) {
        copy_chunk_activations<T>(machine, p, at);
        machine.commit_copies();
        advance<T>(p, machine.blocks(), at);
    }
}

// Set bits of one step of one plane of one row, the plane and the row of this thread.
template <class Machine>
LBS_HD int count_codes(Machine& machine, int stage_byte, int step) {
    const int thread = machine.thread();
    const int row = thread / kWarpgroup * kWarpgroupRows + thread % kWarpgroupRows;
    const int plane = thread / kWarpgroupRows % 2;
    int count = 0;
    LBS_UNROLL for (int word = 0; word < kStepWords; word += 4) {
        const int byte = stage_byte + swizzled_byte(row, plane * kChunkWords + step * kStepWords + word);
        const Words4 words = *reinterpret_cast<const Words4*>(machine.shared(byte));
        LBS_UNROLL for (int i = 0; i < 4; ++i) count += popcount(words.v[i]);
    }
    return count << plane;
}

template <int kRegisters>
LBS_HD void fold(int (&acc)[kMultiplyGroups][kRegisters], int shift) {
    LBS_UNROLL for (int i = 0; i < kRegisters; ++i) {
        acc[0][i] = (acc[0][i] + 2 * acc[1][i] + 4 * acc[2][i]) * (1 << shift);
        acc[1][i] = acc[2][i] = 0;
    }
}

// Sums of codes of both rows of this thread's fragment, from what all threads counted.
template <class T, class Machine>
LBS_HD void share_sums(Machine& machine, int counted, int (&sums)[2]) {
    const int thread = machine.thread(), group = thread / kWarpgroup;
    int* table = reinterpret_cast<int*>(machine.shared(T::kSumByte)) + group * kWarpgroup;  // [plane][row]
    table[thread % kWarpgroup] = counted;
    machine.sync();
    LBS_UNROLL for (int half = 0; half < 2; ++half) {
        const int row = fragment_row(thread / 32 % 4, thread % 32, 2 * half);
        sums[half] = table[row] + table[kWarpgroupRows + row];
    }
}

template <class T>
LBS_HD void write_tile(const Params& p, int thread, int tile, const int (&acc)[T::kN / 2], const int (&sums)[2]) {
    constexpr int kRun = T::kN / 4;
    const auto [row_block, filter_block] = place_of(p, tile);
    const int first = filter_block * T::kN + column_channel<T::kN>(fragment_column(thread % 32, 0));
    LBS_UNROLL for (int half = 0; half < 2; ++half) {
        const int row = row_block * T::kRows + thread / kWarpgroup * kWarpgroupRows +
                        fragment_row(thread / 32 % 4, thread % 32, 2 * half);
        if (row >= p.rows) continue;
        int run[kRun];
        LBS_UNROLL for (int c = 0; c < kRun; c += 4) {
            const Ints4 offset = *reinterpret_cast<const Ints4*>(p.offset + first + c);
            LBS_UNROLL for (int i = 0; i < 4; ++i) {
                const int dot = acc[fragment_register(c + i, half)];
                // Terms may pass 2^31, their sum does not.
                run[c + i] = static_cast<int>(static_cast<unsigned>(p.dot_scale) * static_cast<unsigned>(dot) +
                                              static_cast<unsigned>(p.sum_scale) * static_cast<unsigned>(sums[half]) +
                                              static_cast<unsigned>(offset.v[i]));
            }
        }
        emit<kRun, T::kN>(p, run, row, first);
    }
}

// Where a thread stands: what it copies next, what it multiplies next, and what it has counted.
struct Progress {
    Cursor ahead;
    int stage, counted;
};

// One pass over K. A loop that surely begins, and no condition around its products: then they may run on from one step
// to the next; else the compiler would end each of them where it began.
template <class T, class Machine>
LBS_HD void multiply_pass(Machine& machine, const Params& p, const Pass& pass,
                          int (&acc)[kMultiplyGroups][T::kN / 2], Progress& at) {
    const int group_byte = machine.thread() / kWarpgroup * (kWarpgroupRows * kRowBytes);
    int step = 0;
    LBS_NO_UNROLL do {
        if (step % 2 == 0) {
            if (step) at.stage = at.stage + 1 == T::kStages ? 0 : at.stage + 1;
            machine.template wait_copies<copies_ahead<T, Machine>() - 1>();
            machine.publish();
            machine.sync();  // everybody's copies are there, and everybody has left the stage that is filled next
            copy_chunk_activations<T>(machine, p, at.ahead);
            copy_chunk_weights<T>(machine, p, at.ahead);
            machine.commit_copies();
            advance<T>(p, machine.blocks(), at.ahead);
        }
        const int byte = at.stage * T::kStageBytes;
        machine.template multiply<T::kN>(acc, byte + group_byte, byte + T::kWeightByte, step % 2);
        if (pass.sums) at.counted += count_codes(machine, byte, step % 2) << 2 * pass.a_pair;
        machine.template wait_products<2 * Machine::kInFlight>();  // a chunk has two steps
    } while (++step < p.steps);
    at.stage = at.stage + 1 == T::kStages ? 0 : at.stage + 1;
    machine.finish_products(acc);
}

template <class T, class Machine>
LBS_HD void run_tiles(Machine& machine, const Params& p) {
    machine.launch_dependents();
    Progress at{{machine.block(), 0, 0, 0}, 0, 0};
    begin_copies<T>(machine, p, at.ahead);
    LBS_NO_UNROLL for (int tile = machine.block(); tile < p.tiles; tile += machine.blocks()) {
        int acc[kMultiplyGroups][T::kN / 2];
        LBS_UNROLL for (int g = 0; g < kMultiplyGroups; ++g) {
            LBS_UNROLL for (int i = 0; i < T::kN / 2; ++i) acc[g][i] = 0;
        }
        at.counted = 0;
        int pass = 0;
        LBS_NO_UNROLL do {
            if (p.pass[pass].shift) fold(acc, p.pass[pass].shift);
            multiply_pass<T>(machine, p, p.pass[pass], acc, at);
        } while (++pass < p.passes);
        fold(acc, 0);
        int sums[2];
        share_sums<T>(machine, at.counted, sums);
        write_tile<T>(p, machine.thread(), tile, acc[0], sums);
    }
    machine.template wait_copies<0>();
}

}  // namespace lbs::onebit
