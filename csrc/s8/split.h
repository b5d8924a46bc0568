// K of a tile divided over the thread blocks of a cluster, for layers whose tiles are too few for the multiprocessors.
//
// Each block multiplies its share of the chunks, by the same steps as kernel.h, and lays its sums into its own shared
// memory. When all have, each block takes an even part of the tile's runs of channels, adds up what all blocks have of
// them, by reading their shared memory, and writes it. Integers add in any order, and nothing passes through device
// memory. A cluster works off one tile.
#pragma once

#include "s8/kernel.h"

namespace lbs::s8 {

template <int kN_, int kStages_, Reads kReads>
struct ClusterTile : Tile<1, kN_, kStages_, kReads> {
    using Ring = Tile<1, kN_, kStages_, kReads>;
    static constexpr int kThreads = 2 * kWarpgroup;  // one group copies, one multiplies; both write
    static constexpr int kRun = kRunOf<Ring>;        // channels
    static constexpr int kThreadRuns = 2 * kN_ / 4 / kRun;
    static constexpr int kRuns = kThreadRuns * kWarpgroup;
    static constexpr int kSumByte = (Ring::kSharedBytes + kUnitBytes - 1) / kUnitBytes * kUnitBytes;
    static constexpr int kSharedBytes = kSumByte + kRuns * kRun * static_cast<int>(sizeof(int));
};

// Byte of four sums of a run: run `part` of thread `thread` of those that multiply. Neighbouring threads lie together.
template <class T>
LBS_HD int sum_byte(int part, int thread, int four) {
    return T::kSumByte + ((part * (T::kRun / 4) + four) * kWarpgroup + thread) * static_cast<int>(sizeof(Ints4));
}

template <class T, class Machine>
LBS_HD void keep_sums(Machine& machine, const Params& p, const Sums<T>& sums) {
    LBS_UNROLL for (int part = 0; part < T::kThreadRuns; ++part) {
        int run[T::kRun] = {};
        add_run(p, sums, part, run);
        LBS_UNROLL for (int c = 0; c < T::kRun; c += 4) {
            const int byte = sum_byte<T>(part, machine.thread() % kWarpgroup, c / 4);
            *reinterpret_cast<Ints4*>(machine.shared(byte)) = Ints4{{run[c], run[c + 1], run[c + 2], run[c + 3]}};
        }
    }
}

// Adds what the blocks of the cluster have of a run. Four of them are asked at once; where there are fewer, some are
// asked again for nothing.
template <class T, class Machine>
LBS_HD void add_kept(Machine& machine, int blocks, int part, int thread, int (&run)[T::kRun]) {
    constexpr int kAtOnce = 4;
    LBS_NO_UNROLL for (int rank = 0; rank < blocks; rank += kAtOnce) {
        LBS_UNROLL for (int c = 0; c < T::kRun; c += 4) {
            LBS_UNROLL for (int i = 0; i < kAtOnce; ++i) {
                const Ints4 kept = machine.load_from((rank + i) & (blocks - 1), sum_byte<T>(part, thread, c / 4));
                LBS_UNROLL for (int j = 0; j < 4; ++j) run[c + j] += rank + i < blocks ? kept.v[j] : 0;
            }
        }
    }
}

// This block's part of the runs of the tile, one thread for each.
template <class T, class Machine>
LBS_HD void write_part(Machine& machine, const Params& p, const TilePlace& place, int rank) {
    const int runs = T::kRuns >> p.split_log;
    LBS_NO_UNROLL for (int i = machine.thread(); i < runs; i += T::kThreads) {
        const int which = rank * runs + i, thread = which % kWarpgroup, part = which / kWarpgroup;
        constexpr int kRowRuns = T::kThreadRuns / 2;  // of a row
        const int row = place.row_block * T::kRows + fragment_row(thread / 32, thread % 32, part / kRowRuns * 2);
        const int first = place.filter_block * T::kN + column_channel<T::kN>(fragment_column(thread % 32, 0)) +
                          part % kRowRuns * T::kRun;
        int run[T::kRun];
        take_offset(p, first, run);
        add_kept<T>(machine, 1 << p.split_log, part, thread, run);
        if (row < p.rows) emit<T::kRun, T::kN>(p, run, row, first);
    }
}

template <class T, class Machine>
LBS_HD void run_split_tile(Machine& machine, const Params& p) {
    machine.launch_dependents();
    make_barriers<T>(machine);
    const int tile = machine.block() >> p.split_log, rank = machine.block() & ((1 << p.split_log) - 1);
    const TilePlace place = place_of(p, tile);
    const Share share = share_of(p, rank);
    if (machine.warpgroup() == 0) {
        Production<T> made{begin_weights<T>(machine, p, place.filter_block, share)};
        machine.wait_for_kernels_before();
        produce_tile<T>(machine, p, place, share, made);
        publish_rest<T>(machine, made);
    } else {
        machine.wait_for_kernels_before();
        Place<T> at{0};
        Sums<T> sums;
        clear(sums);
        multiply_tile(machine, share, sums, at, -1);
        keep_sums(machine, p, sums);
    }
    machine.sync_cluster();
    write_part<T>(machine, p, place, rank);
    machine.sync_cluster();  // a block's shared memory is read by others to here
}

}  // namespace lbs::s8
