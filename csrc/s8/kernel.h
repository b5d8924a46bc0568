// The s8 implicit GEMM, written once against a Machine: the GPU's tensor cores, or a model of them on a processor.
//
//     acc[m][o] = dot_scale * sum_k x[m][k] w[o][k] + sum_scale * sum_k x[m][k] + offset[o]
//
// A block of threads stays and works off tiles of kRows pixels by kN filters, in the order of place_of(). One group of
// 128 threads copies chunks of K into a ring of stages, two groups multiply: tiles go to them in turn, so that one
// multiplies while the other writes its sums out. The chunks of a tile follow those of the tile before in the ring.
//
// Every stage has two barriers. `full` completes when the producer's copies lie there: the activations, by
// asynchronous copies of 16 bytes that every thread publishes for the tensor core and then arrives for, and the
// weights, one run of bytes that a bulk copy counts on the barrier. `empty` completes when the four warps that
// multiply have left the stage. A barrier tells but whether a phase is even or odd, so nobody may ask for one before the
// phase in front of it is over, which may be the other consumer's: so a third kind, `turn`, completes when the other
// consumer has seen the last chunk of the tile in front arrive. It has then seen all of them.
//
// Where sum_scale is not 0, kernels of their own (kSummed) multiply the activations by eight columns of ones as well:
// of a fragment of eight columns a thread holds the sums of the very rows whose products it holds.
//
// Nibbles have kernels of their own, too (kNibbles): they are copied as they are, and each thread that multiplies reads
// those of its fragment of operand A from shared memory and expands them in registers, a step ahead of the products.
#pragma once

#include "cuda/epilogue.h"
#include "s8/index.h"

namespace lbs::s8 {

// What a kernel makes of activations.
enum class Reads : int { kBytes, kSummed, kNibbles };

template <int kGroups_, int kN_, int kStages_, Reads kReads>
struct Tile {
    using Row = PixelRow<kReads == Reads::kNibbles>;
    static constexpr int kGroups = kGroups_;  // of 64 pixels, all of one consumer
    static constexpr int kN = kN_;
    static constexpr int kStages = kStages_;
    static constexpr bool kSums = kReads == Reads::kSummed;
    static constexpr int kColumns = kN + (kSums ? kSumColumns : 0);
    static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
    static constexpr int kRows = kGroups * kWarpgroupRows;
    static constexpr int kWarpRows = kRows / kProducerWarps;  // that a warp of the producer copies
    static constexpr int kWeightByte = kRows * Row::kPitch;   // in a stage
    static constexpr int kWeightBytes = kColumns * kRowBytes;
    static constexpr int kStageBytes = kWeightByte + kWeightBytes;
    static constexpr int kWindowByte = kStages * kStageBytes;
    static constexpr int kBarrierByte = kWindowByte + kRows * static_cast<int>(sizeof(Window));
    static constexpr int kSharedBytes = kBarrierByte + (2 * kStages + kConsumers) * 8;
    // Chunks that are on their way before the first of them is waited for. The consumer leaves a stage when it has
    // begun with the next one, so that at least two must be there.
    static constexpr int kAhead = kStages / 2;
    static_assert(kAhead <= kStages - 2, "the producer would wait for a stage that is not left without the next");
    static_assert(kWarpRows <= 32, "a lane finds the window of one row");

    LBS_HD static constexpr int full(int stage) { return kBarrierByte + 8 * stage; }
    LBS_HD static constexpr int empty(int stage) { return kBarrierByte + 8 * (kStages + stage); }
    LBS_HD static constexpr int turn(int consumer) { return kBarrierByte + 8 * (2 * kStages + consumer); }
};

// A place in the ring, counted through two rounds of it: in the second the barriers wait for the other parity.
template <class T>
struct Place {
    int turn;

    LBS_HD int round() const { return turn >= T::kStages ? 1 : 0; }
    LBS_HD int stage() const { return turn - round() * T::kStages; }
    LBS_HD void advance(int chunks) { turn = (turn + chunks) % (2 * T::kStages); }
    LBS_HD void step() { turn = turn + 1 == 2 * T::kStages ? 0 : turn + 1; }
};

// The windows of the rows that this thread's warp copies.
template <class T, class Machine>
LBS_HD Window* warp_windows(Machine& machine) {
    return reinterpret_cast<Window*>(machine.shared(T::kWindowByte)) + machine.thread() / 32 * T::kWarpRows;
}

// Output pixels are divided into rows and columns once per tile.
template <class T, class Machine>
LBS_HD void find_windows(Machine& machine, const Params& p, int first_row) {
    const int warp = machine.thread() / 32, lane = machine.thread() % 32;
    machine.sync_warp();  // nobody copies by the windows of the tile before any more
    if (lane < T::kWarpRows) warp_windows<T>(machine)[lane] = byte_window(p, first_row + copied_row(warp, lane));
    machine.sync_warp();
}

template <class T, class Machine>
LBS_HD void copy_weights(Machine& machine, const Params& p, int filter_block, int chunk, int stage) {
    if (machine.thread() != 0) return;
    machine.expect(T::full(stage), T::kWeightBytes);
    machine.bulk_copy(stage * T::kStageBytes + T::kWeightByte,
                      p.w + weight_block<T::kColumns>(p, filter_block, chunk), T::kWeightBytes, T::full(stage));
}

// In pieces of kPiece bytes.
template <class T, int kPiece, class Machine>
LBS_HD void copy_activations(Machine& machine, const Params& p, int chunk, int stage) {
    using Row = typename T::Row;
    constexpr int kPieces = Row::kBytes / kPiece;  // of a row
    constexpr int kTurnRows = 32 / kPieces;        // that a warp copies at once
    constexpr int kTurnBytes = kProducerWarps * kTurnRows * Row::kPitch;  // between those of one turn and the next
    constexpr int kRowTurns = T::kWarpRows / kTurnRows, kAtOnce = kRowTurns < kTurns ? kRowTurns : kTurns;
    const int byte = stage * T::kStageBytes, warp = machine.thread() / 32, lane = machine.thread() % 32;
    // Outside the image a pixel of the code of 0 is read; behind the end of K any bytes, the weights there are 0.
    const int piece = lane % kPieces, first = lane / kPieces;
    const Tap tap = tap_of(p, chunk * kPieces + piece);
    const int8_t* outside = p.border + tap.piece * kPiece;
    const unsigned from = tap_byte<kPiece>(p, tap);
    const int to = byte + Row::byte(copied_row(warp, first), piece * kPiece);
    const Window* windows = warp_windows<T>(machine) + first;
    LBS_NO_UNROLL for (int turn = 0; turn < kRowTurns; turn += kAtOnce) {
        Window window[kAtOnce];
        LBS_UNROLL for (int i = 0; i < kAtOnce; ++i) window[i] = windows[(turn + i) * kTurnRows];
        LBS_UNROLL for (int i = 0; i < kAtOnce; ++i) {
            const int8_t* inside = p.x + (static_cast<unsigned>(window[i].pixel) + from);
            machine.template copy<kPiece>(to + (turn + i) * kTurnBytes,
                                          enters(p, window[i], tap) ? inside : outside, true);
        }
    }
    machine.commit_copies();
}

// Says of the oldest chunk on its way that this thread's share of it lies there, but for `kPending` newer ones.
template <class T, int kPending, class Machine>
LBS_HD void publish_chunk(Machine& machine, Place<T>& oldest) {
    machine.template wait_copies<kPending>();
    machine.publish();
    machine.arrive(T::full(oldest.stage()));
    oldest.step();
}

// Weights of the first chunks of the first tile, into stages that are empty: no kernel writes weights, so that they need
// not wait for the kernels before. Returns how many chunks.
template <class T, class Machine>
LBS_HD int begin_weights(Machine& machine, const Params& p, int filter_block, const Share& share) {
    const int chunks = share.chunks < T::kStages ? share.chunks : T::kStages;
    LBS_NO_UNROLL for (int chunk = 0; chunk < chunks; ++chunk) {
        copy_weights<T>(machine, p, filter_block, share.first + chunk, chunk);
    }
    return chunks;
}

// Where the producer stands: chunks whose weights are on their way already, those of which all is but that are not
// published, and the places of the next chunk and of the oldest of the latter.
template <class T>
struct Production {
    int begun, under_way = 0;
    Place<T> at{0}, oldest{0};
};

// The chunks of one tile, or of a share of it.
template <class T, class Machine>
LBS_HD void produce_tile(Machine& machine, const Params& p, const TilePlace& place, const Share& share,
                         Production<T>& made) {
    find_windows<T>(machine, p, place.row_block * T::kRows);
    LBS_NO_UNROLL for (int chunk = 0; chunk < share.chunks; ++chunk) {
        machine.wait(T::empty(made.at.stage()), 1 - made.at.round());  // the phase before the first counts as complete
        if (made.begun > 0) --made.begun;
        else copy_weights<T>(machine, p, place.filter_block, share.first + chunk, made.at.stage());
        if (T::Row::kNibbles && p.piece < kUnitBytes) {
            copy_activations<T, kUnitBytes / 2>(machine, p, share.first + chunk, made.at.stage());
        } else {
            copy_activations<T, kUnitBytes>(machine, p, share.first + chunk, made.at.stage());
        }
        made.at.step();
        if (made.under_way == T::kAhead) publish_chunk<T, T::kAhead>(machine, made.oldest);
        else ++made.under_way;
    }
}

template <class T, class Machine>
LBS_HD void publish_rest(Machine& machine, Production<T>& made) {
    LBS_NO_UNROLL for (; made.under_way > 0; --made.under_way) publish_chunk<T, 0>(machine, made.oldest);
}

template <class T, class Machine>
LBS_HD void produce(Machine& machine, const Params& p) {
    const Share all = whole(p);
    const bool any = machine.block() < p.tiles;
    Production<T> made{any ? begin_weights<T>(machine, p, place_of(p, machine.block()).filter_block, all) : 0};
    machine.wait_for_kernels_before();
    LBS_NO_UNROLL for (int tile = machine.block(); tile < p.tiles; tile += machine.blocks()) {
        produce_tile<T>(machine, p, place_of(p, tile), all, made);
    }
    publish_rest<T>(machine, made);
}

// One warp's leave of a stage: its products have read it.
template <class T, class Machine>
LBS_HD void leave(Machine& machine, int stage) {
    if (machine.thread() % 32 == 0) machine.arrive(T::empty(stage));
}

// The accumulators of a thread: fragments of products, and of sums of codes.
template <class T>
struct Sums {
    int acc[T::kGroups][T::kN / 2];
    int codes[T::kGroups][kSumColumns / 2];
};

template <class T>
LBS_HD void clear(Sums<T>& sums) {
    LBS_UNROLL for (int group = 0; group < T::kGroups; ++group) {
        LBS_UNROLL for (int i = 0; i < T::kN / 2; ++i) sums.acc[group][i] = 0;
        LBS_UNROLL for (int i = 0; i < kSumColumns / 2; ++i) sums.codes[group][i] = 0;
    }
}

// The multiplications of one step of a stage, whose descriptor is given: operands are 32 bytes of every row.
template <class T, class Machine>
LBS_HD void multiply_step(Machine& machine, Sums<T>& sums, uint64_t stage, int step) {
    const uint64_t b = stage + descriptor_step(T::kWeightByte + step * kStepBytes);
    LBS_UNROLL for (int group = 0; group < T::kGroups; ++group) {
        const uint64_t a = stage + descriptor_step(group * (kWarpgroupRows * kRowBytes) + step * kStepBytes);
        machine.template wgmma<T::kN>(sums.acc[group], a, b);
        if (T::kSums) {
            machine.template wgmma<kSumColumns>(sums.codes[group], a, b + descriptor_step(T::kN * kRowBytes));
        }
    }
}

// All products of a tile. Those of a chunk run on while the next one is waited for and begun; then its stage is left.
// No condition stands around a product, else the compiler would end each of them where it began: so the last chunk,
// which may be shorter, has a loop of its own that surely begins. `next`: the barrier of who comes next, or none, -1.
template <class T, class Machine>
LBS_HD void multiply_bytes(Machine& machine, const Share& share, Sums<T>& sums, Place<T>& at, int next) {
    int before = -1;  // the stage whose products may still run
    LBS_NO_UNROLL for (int left = share.chunks - 1; left > 0; --left) {
        const uint64_t stage = matrix_descriptor(machine.address(at.stage() * T::kStageBytes));
        machine.wait(T::full(at.stage()), at.round());
        machine.open_products();
        LBS_UNROLL for (int step = 0; step < kChunkSteps; ++step) multiply_step(machine, sums, stage, step);
        machine.close_products();
        machine.template wait_products<1>();
        if (before >= 0) leave<T>(machine, before);
        before = at.stage();
        at.step();
    }
    const uint64_t stage = matrix_descriptor(machine.address(at.stage() * T::kStageBytes));
    machine.wait(T::full(at.stage()), at.round());
    if (next >= 0 && machine.thread() % kWarpgroup == 0) machine.arrive(next);
    int step = 0;
    LBS_NO_UNROLL do {
        machine.open_products();
        multiply_step(machine, sums, stage, step);
        machine.close_products();
        machine.template wait_products<1>();
    } while (++step < share.last_steps);
    machine.finish_products(sums.acc);
    if (T::kSums) machine.finish_products(sums.codes);
    if (before >= 0) leave<T>(machine, before);
    leave<T>(machine, at.stage());
    at.step();
}

// The words of a step that a thread expands, eight nibbles each, of two rows of every group.
template <class T>
struct Words {
    uint32_t v[T::kGroups][2];
};

template <class T, class Machine>
LBS_HD void load_words(Machine& machine, int stage, int step, Words<T>& words) {
    const int warp = machine.thread() / 32 % 4, lane = machine.thread() % 32;
    const int word = step * kUnitBytes + lane % 4 * 4;
    const int byte = stage * T::kStageBytes + T::Row::byte(fragment_row(warp, lane, 0), word);
    LBS_UNROLL for (int group = 0; group < T::kGroups; ++group) {
        LBS_UNROLL for (int half = 0; half < 2; ++half) {
            const int row = group * kWarpgroupRows + fragment_row(0, 0, 2 * half);
            words.v[group][half] = machine.load_word(byte + T::Row::byte(row, 0));
        }
    }
}

// Operand A of one step: a[0] and a[2] are a row's first and last 16 bytes of K, a[1] and a[3] those eight rows below.
template <class T>
struct Expanded {
    uint32_t a[T::kGroups][4];
};

// One group of products, whose operand A must not change before the next but one is begun.
template <class T, class Machine>
LBS_HD void multiply_words(Machine& machine, Sums<T>& sums, const Words<T>& words, Expanded<T>& expanded, uint64_t b) {
    LBS_UNROLL for (int group = 0; group < T::kGroups; ++group) {
        LBS_UNROLL for (int half = 0; half < 2; ++half) {
            expanded.a[group][half] = low_nibbles(words.v[group][half]);
            expanded.a[group][2 + half] = high_nibbles(words.v[group][half]);
        }
    }
    machine.open_products();
    LBS_UNROLL for (int group = 0; group < T::kGroups; ++group) {
        machine.template wgmma<T::kN>(sums.acc[group], expanded.a[group], b);
    }
    machine.close_products();
    machine.template wait_products<1>();
}

// The same of nibbles: every step is a group of products that runs while the next step is expanded, into the
// other of two sets of registers.
template <class T, class Machine>
LBS_HD void multiply_nibbles(Machine& machine, const Share& share, Sums<T>& sums, Place<T>& at, int next) {
    int before = -1;
    Expanded<T> expanded[2];
    LBS_NO_UNROLL for (int left = share.chunks - 1; left > 0; --left) {
        const uint64_t b = matrix_descriptor(machine.address(at.stage() * T::kStageBytes + T::kWeightByte));
        machine.wait(T::full(at.stage()), at.round());
        Words<T> words[kChunkSteps];
        LBS_UNROLL for (int step = 0; step < kChunkSteps; ++step) load_words(machine, at.stage(), step, words[step]);
        LBS_UNROLL for (int step = 0; step < kChunkSteps; ++step) {
            multiply_words(machine, sums, words[step], expanded[step % 2], b + descriptor_step(step * kStepBytes));
        }
        if (before >= 0) leave<T>(machine, before);
        before = at.stage();
        at.step();
    }
    const uint64_t b = matrix_descriptor(machine.address(at.stage() * T::kStageBytes + T::kWeightByte));
    machine.wait(T::full(at.stage()), at.round());
    if (next >= 0 && machine.thread() % kWarpgroup == 0) machine.arrive(next);
    int step = 0;
    LBS_NO_UNROLL do {
        Words<T> words;
        load_words(machine, at.stage(), step, words);
        multiply_words(machine, sums, words, expanded[0], b + descriptor_step(step * kStepBytes));
        if (++step == share.last_steps) break;
        load_words(machine, at.stage(), step, words);
        multiply_words(machine, sums, words, expanded[1], b + descriptor_step(step * kStepBytes));
    } while (++step < share.last_steps);
    machine.finish_products(sums.acc);
    if (before >= 0) leave<T>(machine, before);
    leave<T>(machine, at.stage());
    at.step();
}

// A run of channels of one pixel, of those of a thread: what is written at once, 16 at most, so that little is held
// beside the sums.
template <class T>
constexpr int kRunOf = run_of(T::kN) < 16 ? run_of(T::kN) : 16;

// The run's offsets, to which its sums are added.
template <int kRun>
LBS_HD void take_offset(const Params& p, int first, int (&run)[kRun]) {
    LBS_UNROLL for (int c = 0; c < kRun; c += 4) {
        const Ints4 offset = *reinterpret_cast<const Ints4*>(p.offset + first + c);
        LBS_UNROLL for (int i = 0; i < 4; ++i) run[c + i] = offset.v[i];
    }
}

// Adds run `part` of the accumulators of a thread; runs of one row follow one another.
template <class T>
LBS_HD void add_run(const Params& p, const Sums<T>& sums, int part, int (&run)[kRunOf<T>]) {
    constexpr int kRun = kRunOf<T>, kRuns = T::kN / 4 / kRun;
    LBS_UNROLL for (int which = 0; which < 2 * T::kGroups * kRuns; ++which) {
        if (which != part) continue;
        const int group = which / kRuns / 2, half = which / kRuns % 2, from = which % kRuns * kRun;
        // Terms may pass 2^31, their sum does not.
        const unsigned codes = static_cast<unsigned>(sums.codes[group][fragment_register(0, half)]);
        const unsigned shift = T::kSums ? static_cast<unsigned>(p.sum_scale) * codes : 0u;
        LBS_UNROLL for (int c = 0; c < kRun; ++c) {
            const unsigned dot = static_cast<unsigned>(sums.acc[group][fragment_register(from + c, half)]);
            run[c] = static_cast<int>(static_cast<unsigned>(p.dot_scale) * dot + static_cast<unsigned>(run[c]) + shift);
        }
    }
}

// Writes the sums of a tile, one run after another, so that the epilogue is there once and not once for every run.
template <class T>
LBS_HD void write_tile(const Params& p, int thread, int tile, const Sums<T>& sums) {
    constexpr int kRun = kRunOf<T>, kRuns = T::kN / 4 / kRun;
    const TilePlace place = place_of(p, tile);
    const int front = place.row_block * T::kRows + fragment_row(thread / 32 % 4, thread % 32, 0);
    const int begin = place.filter_block * T::kN + column_channel<T::kN>(fragment_column(thread % 32, 0));
    LBS_NO_UNROLL for (int part = 0; part < 2 * T::kGroups * kRuns; ++part) {
        const int row = front + part / kRuns / 2 * kWarpgroupRows + part / kRuns % 2 * fragment_row(0, 0, 2);
        const int first = begin + part % kRuns * kRun;
        int run[kRun];
        take_offset(p, first, run);
        add_run(p, sums, part, run);
        if (row < p.rows) emit<kRun, T::kN>(p, run, row, first);
    }
}

template <class T, class Machine>
LBS_HD void multiply_tile(Machine& machine, const Share& share, Sums<T>& sums, Place<T>& at, int next) {
    if constexpr (T::Row::kNibbles) multiply_nibbles(machine, share, sums, at, next);
    else multiply_bytes(machine, share, sums, at, next);
}

// Tiles consumer, consumer + 2, ... of those of this block.
template <class T, class Machine>
LBS_HD void consume(Machine& machine, const Params& p, int consumer) {
    machine.wait_for_kernels_before();  // it reads residuals, and writes where they may read
    Place<T> at{0};
    at.advance(consumer * p.chunks);
    int tile = machine.block() + consumer * machine.blocks(), parity = 1 - consumer;  // nobody is in front of the first
    LBS_NO_UNROLL for (; tile < p.tiles; tile += kConsumers * machine.blocks()) {
        Sums<T> sums;
        clear(sums);
        machine.wait(T::turn(consumer), parity);
        parity = 1 - parity;
        multiply_tile(machine, whole(p), sums, at, T::turn(1 - consumer));
        at.advance((kConsumers - 1) * p.chunks);
        write_tile(p, machine.thread(), tile, sums);
    }
}

template <class T, class Machine>
LBS_HD void make_barriers(Machine& machine) {
    if (machine.thread() == 0) {
        LBS_NO_UNROLL for (int stage = 0; stage < T::kStages; ++stage) {
            machine.make_barrier(T::full(stage), kWarpgroup);
            machine.make_barrier(T::empty(stage), kWarpgroup / 32);
        }
        LBS_NO_UNROLL for (int consumer = 0; consumer < kConsumers; ++consumer) {
            machine.make_barrier(T::turn(consumer), 1);
        }
        machine.publish();
    }
    machine.sync();
}

template <class T, class Machine>
LBS_HD void run_tiles(Machine& machine, const Params& p) {
    machine.launch_dependents();
    make_barriers<T>(machine);
    const int consumer = machine.warpgroup() - 1;
    if (consumer < 0) {
        machine.give_registers();
        produce<T>(machine, p);
    } else {
        machine.take_registers();
        consume<T>(machine, p, consumer);
    }
}

}  // namespace lbs::s8
