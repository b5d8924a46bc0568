// What the models of all kernels share: a block of threads as fibers, its memory, copies and barriers, and wgmma.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "cuda/task.h"
#include "cuda/tile_row.h"
#include "fibers.h"
#include "model.h"

namespace lbs::gpu {

constexpr uint32_t kBase = 5 * kSwizzleBytes;  // where shared memory begins: not at 0, so that a forgotten base shows
constexpr int kPoison = 0xA5;

// Memory that copies may read.
struct Operands {
    struct Range {
        uintptr_t first, bytes;
        bool holds(uintptr_t at, uintptr_t count) const { return at >= first && at - first + count <= bytes; }
    };
    Range x, w, padding;
    bool holds(uintptr_t at, uintptr_t count) const {
        return x.holds(at, count) || w.holds(at, count) || padding.holds(at, count);
    }
};

struct Copy {
    uint8_t* to;
    const void* from;  // null: zeros
    int bytes;
};

inline void finish(const Copy& copy) {
    if (copy.from) std::memcpy(copy.to, copy.from, copy.bytes);
    else std::memset(copy.to, 0, copy.bytes);
}

// A barrier in shared memory. A phase is over when all have arrived and all bytes that were expected are there.
struct Barrier {
    int count = 0, arrived = 0, phase = 0;
    int64_t bytes = 0;  // expected and not there; copies may be counted before they are expected
    std::vector<Copy> copies;
};

struct Cluster;

// What the threads of one block share.
struct Block {
    Block(int threads, int shared_bytes, int index_, int count_, const Operands& operands_, Timing timing_)
        : memory(shared_bytes, kPoison),
          mail(threads / 32),
          index(index_),
          count(count_),
          operands(operands_),
          timing(timing_) {
        all.count = threads;
        for (Mail& warp : mail) warp.meeting.count = 32;
    }

    // One exchange at a time per warp, in one of two sets of letters: nobody can be two exchanges ahead.
    struct Letter {
        uint32_t words[6];
    };
    struct Mail {
        Meeting meeting;
        Letter letters[2][32];
    };

    uint8_t* at(uint32_t address, int bytes, int alignment) {
        require(address % alignment == 0 && address >= kBase && address - kBase + bytes <= memory.size(),
                "model: address " + std::to_string(address) + " of " + std::to_string(bytes) +
                    " bytes is outside shared memory or not aligned to " + std::to_string(alignment));
        return memory.data() + (address - kBase);
    }
    uint32_t word(uint32_t address) {
        uint32_t value;
        std::memcpy(&value, at(address, 4, 4), 4);
        return value;
    }

    std::vector<uint8_t> memory;
    std::map<uint32_t, Barrier> barriers;  // by address
    Meeting all;
    std::vector<Mail> mail;
    int index, count;
    Operands operands;
    Timing timing;
    bool launched = false;  // the kernel behind this one
    int ended = 0;          // threads
    Cluster* cluster = nullptr;
};

// Thread blocks that run at once and read one another's shared memory.
struct Cluster {
    std::vector<Block> blocks;
    Meeting all;
};

// A queue of asynchronous operations, finished group by group in the order they were committed.
template <class Operation>
class Groups {
public:
    void add(const Operation& operation) { open_.push_back(operation); }
    void commit() {
        groups_.push_back(std::move(open_));
        open_.clear();
    }
    // Finishes all but the last `pending` groups; returns whether there was anything to finish.
    template <class Finish>
    bool wait(size_t pending, const Finish& finish) {
        bool any = false;
        for (; groups_.size() > pending; groups_.pop_front()) {
            for (const Operation& operation : groups_.front()) finish(operation), any = true;
        }
        return any;
    }
    bool idle() const { return open_.empty() && groups_.empty(); }

private:
    std::vector<Operation> open_;
    std::deque<std::vector<Operation>> groups_;
};

class BlockModel {
public:
    BlockModel(Block& block, int thread) : block_(block), thread_(thread) {}
    int thread() const { return thread_; }
    int block() const { return block_.index; }
    int blocks() const { return block_.count; }
    uint8_t* shared(int byte) { return block_.at(address(byte), 4, 4); }
    uint32_t address(int byte) const { return kBase + static_cast<uint32_t>(byte); }

    template <int kBytes>
    void copy(int byte, const void* from, bool inside) {
        uint8_t* to = block_.at(address(byte), kBytes, kBytes);
        const uintptr_t source = reinterpret_cast<uintptr_t>(from);
        require(!inside || source % kBytes == 0, "model: unaligned source of a copy");
        require(!inside || block_.operands.holds(source, kBytes), "model: a copy from outside the operands");
        if (inside) check_order(source, kBytes);
        const Copy copy{to, inside ? from : nullptr, kBytes};
        if (block_.timing == Timing::kEarly) gpu::finish(copy);
        else std::memset(to, kPoison, kBytes);
        copies_.add(copy);
    }
    void commit_copies() { copies_.commit(); }
    template <int kPending>
    void wait_copies() {
        const bool late = block_.timing == Timing::kLate;
        unpublished_ |= copies_.wait(kPending, [&](const Copy& copy) {
            if (late) gpu::finish(copy);
        });
    }
    void sync() { Fibers::meet(block_.all); }
    void sync_warp() { Fibers::meet(block_.mail[thread_ / 32].meeting); }
    void launch_dependents() { block_.launched = true; }
    void wait_for_kernels_before() { waited_ = true; }
    // What every thread must have done when it ends.
    void check_end() {
        require(block_.launched, "model: a kernel that never lets the next one begin");
        check_waited();
        ++block_.ended;
    }
    void sync_cluster() { Fibers::meet(block_.cluster->all); }
    // There is no telling whether a block has begun until all have met, and where one has ended its memory is gone.
    Ints4 load_from(int rank, int byte) {
        Block& from = block_.cluster->blocks.at(rank);
        require(block_.cluster->all.times > 0, "model: shared memory of a block that may not have begun");
        require(from.ended < static_cast<int>(from.mail.size()) * 32, "model: shared memory of a block that has ended");
        Ints4 four;
        std::memcpy(&four, from.at(address(byte), 16, 16), sizeof four);
        return four;
    }

protected:
    int lane() const { return thread_ % 32; }
    // What all lanes of the warp bring together.
    const Block::Letter* exchange(const Block::Letter& letter) {
        Block::Mail& mail = block_.mail[thread_ / 32];
        Block::Letter* letters = mail.letters[exchanges_++ % 2];
        letters[lane()] = letter;
        Fibers::meet(mail.meeting);
        return letters;
    }
    void check_waited() const {
        require(waited_, "model: a thread that did not wait for the kernels before");
    }
    // Weights are written by no kernel; everything else may be.
    void check_order(uintptr_t source, uintptr_t count) const {
        require(waited_ || block_.operands.w.holds(source, count),
                "model: a copy of what a kernel before may write, without waiting for it");
    }

    Block& block_;
    Groups<Copy> copies_;
    int thread_;
    unsigned exchanges_ = 0;
    bool unpublished_ = false, waited_ = false;
};

// The fences and products of wgmma. `kDot` is what one row and one column of 32 bytes give.
template <int (*kDot)(const uint64_t (&)[4], const uint64_t (&)[4])>
class WgmmaBlockModel : public BlockModel {
public:
    using BlockModel::BlockModel;
    void publish() { unpublished_ = false; }
    void sync() {
        check_published();
        BlockModel::sync();
    }
    void open_products() { fenced_ = true; }
    void close_products() {
        products_.commit();
        if (from_registers_) fenced_ = from_registers_ = false;  // what the next products read is written behind it
    }
    template <int kN>
    void wgmma(int (&d)[kN / 2], uint64_t a, uint64_t b) {
        begin({d, a, nullptr, b, kN});
    }
    template <int kN>
    void wgmma(int (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
        from_registers_ = true;
        begin({d, 0, a, b, kN});
    }
    uint32_t load_word(int byte) { return block_.word(address(byte)); }
    // All lanes of a warp come back together, when all its products are done.
    template <int kPending>
    void wait_products() {
        const bool late = block_.timing == Timing::kLate;
        products_.wait(kPending, [&](const Product& product) {
            if (late) finish(product);
        });
        sync_warp();
    }
    template <int kGroups, int kRegisters>
    void finish_products(int (&)[kGroups][kRegisters]) {
        wait_products<0>();
        check_waited();  // what follows is written
        require(products_.idle(), "model: registers are read before their product was committed");
        fenced_ = false;
    }

protected:
    void check_published() const {
        require(!unpublished_, "model: copies reached a barrier without a fence for the tensor core");
    }

private:
    struct Product {
        int* d;
        uint64_t a;
        const uint32_t* a_registers;  // null: by the descriptor
        uint64_t b;
        int columns;
    };

    void begin(const Product& product) {
        require(fenced_, "model: a product without a fence for its registers");
        if (block_.timing == Timing::kEarly) finish(product);
        products_.add(product);
    }
    // A row of a 64 x 32 operand A in registers: bytes 4 t to 4 t + 3 are the first register of lane 4 g + t (row g) or
    // the second (row g + 8), and those from byte 16 on the third and fourth.
    void gather_row(const Block::Letter* letters, int half, uint64_t (&words)[4]) const {
        uint32_t parts[8];
        for (int i = 0; i < 8; ++i) parts[i] = letters[lane() / 4 * 4 + i % 4].words[i / 4 * 2 + half];
        std::memcpy(words, parts, sizeof parts);
    }

    // Row `row` of a matrix by its descriptor: groups of eight rows, 128 bytes from row to row, and bits 4-6 of the
    // address turned over by bits 7-9.
    void load_row(uint64_t descriptor, int row, uint64_t (&words)[4]) {
        require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0,
                "model: a descriptor of another layout than 128-byte swizzle at offset 0");
        const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
        const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
        for (int half = 0; half < 2; ++half) {
            uint32_t address = start + row / 8 * stride + row % 8 * 128 + half * 16;
            address ^= (address >> 7 & 7) << 4;
            std::memcpy(words + 2 * half, block_.at(address, 16, 16), 16);
        }
    }
    // This thread's registers of a 64 x N product: register i is row 16 warp + lane / 4 (+ 8 for i % 4 >= 2) and column
    // 8 (i / 4) + 2 (lane % 4) + i % 2.
    void finish(const Product& product) {
        const int warp = thread_ / 32 % 4, lane = thread_ % 32;
        uint64_t a[2][4], b[4];
        const uint32_t* own = product.a_registers;
        const Block::Letter* letters = own ? exchange({{own[0], own[1], own[2], own[3]}}) : nullptr;
        for (int half = 0; half < 2; ++half) {
            if (letters) gather_row(letters, half, a[half]);
            else load_row(product.a, 16 * warp + lane / 4 + 8 * half, a[half]);
        }
        for (int i = 0; i < product.columns / 2; ++i) {
            if (i % 4 >= 2) continue;
            load_row(product.b, i / 4 * 8 + lane % 4 * 2 + i % 2, b);
            for (int half = 0; half < 2; ++half) product.d[i + 2 * half] += kDot(a[half], b);
        }
    }

    Groups<Product> products_;
    bool fenced_ = false, from_registers_ = false;
};

// Runs `run(machine)` for every thread of `blocks` blocks, one cluster of `split` blocks after another.
template <class Machine, class Run>
void run_blocks(int threads, int shared_bytes, int blocks, const Operands& operands, const Order& order, const Run& run,
                int split = 1) {
    for (int first = 0; first < blocks; first += split) {
        Cluster cluster;
        for (int i = 0; i < split; ++i)
            cluster.blocks.emplace_back(threads, shared_bytes, first + i, blocks, operands, order.timing);
        for (Block& block : cluster.blocks) block.cluster = &cluster;
        cluster.all.count = split * threads;
        Fibers::run(split * threads, order.seed, [&](int thread) {
            Machine machine(cluster.blocks[thread / threads], thread % threads);
            run(machine);
            machine.check_end();
        });
    }
}

inline int blocks_used(const Order& order, int tiles) {
    return std::min(std::max(order.blocks, 1), std::max(tiles, 1));
}

}  // namespace lbs::gpu
