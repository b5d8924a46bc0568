#include "model.h"

#include <algorithm>
#include <deque>

#include "fibers.h"
#include "onebit/products.h"

namespace lbs::onebit {
namespace {

constexpr uint32_t kBase = 5 * kSwizzleBytes;  // where shared memory begins: not at 0, so that a forgotten base shows
constexpr int kPoison = 0xA5;

// Memory that copies may read.
struct Operands {
    struct Range {
        uintptr_t first, bytes;
        bool holds(uintptr_t at, uintptr_t count) const { return at >= first && at - first + count <= bytes; }
    };
    Range x, w;
};

// What the threads of one block share.
struct Block {
    Block(int threads, int shared_bytes, int index_, int count_, const Operands& operands_, Timing timing_)
        : memory(shared_bytes, kPoison), mail(threads / 32), index(index_), count(count_), operands(operands_),
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
                "one-bit model: address " + std::to_string(address) + " of " + std::to_string(bytes) +
                    " bytes is outside shared memory or not aligned to " + std::to_string(alignment));
        return memory.data() + (address - kBase);
    }
    uint32_t word(uint32_t address) {
        uint32_t value;
        std::memcpy(&value, at(address, 4, 4), 4);
        return value;
    }

    std::vector<uint8_t> memory;
    Meeting all;
    std::vector<Mail> mail;
    int index, count;
    Operands operands;
    Timing timing;
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
        require(!inside || source % kBytes == 0, "one-bit model: unaligned source of a copy");
        require(!inside || block_.operands.x.holds(source, kBytes) || block_.operands.w.holds(source, kBytes),
                "one-bit model: a copy from outside the operands");
        const Copy copy{to, inside ? from : nullptr, kBytes};
        if (block_.timing == Timing::kEarly) finish(copy);
        else std::memset(to, kPoison, kBytes);
        copies_.add(copy);
    }
    void commit_copies() { copies_.commit(); }
    template <int kPending>
    void wait_copies() {
        const bool late = block_.timing == Timing::kLate;
        unpublished_ |= copies_.wait(kPending, [&](const Copy& copy) {
            if (late) finish(copy);
        });
    }
    void sync() { Fibers::meet(block_.all); }
    void sync_warp() { Fibers::meet(block_.mail[thread_ / 32].meeting); }

protected:
    struct Copy {
        uint8_t* to;
        const void* from;
        int bytes;
    };
    static void finish(const Copy& copy) {
        if (copy.from) std::memcpy(copy.to, copy.from, copy.bytes);
        else std::memset(copy.to, 0, copy.bytes);
    }

    Block& block_;
    Groups<Copy> copies_;
    int thread_;
    bool unpublished_ = false;
};

class MmaModel : public BlockModel {
public:
    using BlockModel::BlockModel;
    static constexpr int kInFlight = 0;

    void publish() {}
    // Lane l gives the address of row l % 8 of matrix l / 8 and gets word l % 4 of row l / 4 of every matrix.
    void load_matrices(int byte, uint32_t (&r)[4]) {
        const Block::Letter* letters = exchange({{address(byte)}});
        for (int matrix = 0; matrix < 4; ++matrix) {
            const uint32_t row = letters[8 * matrix + lane() / 4].words[0];
            block_.at(row, 16, 16);
            r[matrix] = block_.word(row + lane() % 4 * 4);
        }
    }
    // m16n8k256. A: words k of row g are a0 (k < 4) and a2 of lanes 4 g + k % 4, those of row g + 8 are a1 and a3.
    // B: words k of column g are b0 and b1 of lanes 4 g + k % 4. D: d0, d1 are row g, columns 2 t and 2 t + 1; d2, d3
    // row g + 8.
    void mma(int* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        const Block::Letter* letters = exchange({{a[0], a[1], a[2], a[3], b0, b1}});
        for (int i = 0; i < 4; ++i) {
            const int row = lane() / 4, column = lane() % 4 * 2 + i % 2;
            for (int k = 0; k < 8; ++k) {
                const uint32_t a_word = letters[4 * row + k % 4].words[k / 4 * 2 + i / 2];
                const uint32_t b_word = letters[4 * column + k % 4].words[4 + k / 4];
                d[i] += popcount(a_word & b_word);
            }
        }
    }
    template <int kN>
    void multiply(int (&acc)[kMultiplyGroups][kN / 2], int a_byte, int b_byte, int step) {
        mma_step<kN>(*this, acc, a_byte, b_byte, step);
    }
    template <int kPending>
    void wait_products() {}
    template <int kRegisters>
    void finish_products(int (&)[kMultiplyGroups][kRegisters]) {}

private:
    int lane() const { return thread_ % 32; }
    const Block::Letter* exchange(const Block::Letter& letter) {
        Block::Mail& mail = block_.mail[thread_ / 32];
        Block::Letter* letters = mail.letters[exchanges_++ % 2];
        letters[lane()] = letter;
        Fibers::meet(mail.meeting);
        return letters;
    }

    unsigned exchanges_ = 0;
};

class WgmmaModel : public BlockModel {
public:
    using BlockModel::BlockModel;
    static constexpr int kInFlight = 1;

    void publish() { unpublished_ = false; }
    void sync() {
        require(!unpublished_, "one-bit model: copies reached a barrier without a fence for the tensor core");
        BlockModel::sync();
    }
    void open_products() { fenced_ = true; }
    void close_products() { products_.commit(); }
    template <int kN>
    void wgmma(int (&d)[kN / 2], uint64_t a, uint64_t b) {
        require(fenced_, "one-bit model: a product without a fence for its registers");
        const Product product{d, a, b, kN};
        if (block_.timing == Timing::kEarly) finish(product);
        products_.add(product);
    }
    template <int kN>
    void multiply(int (&acc)[kMultiplyGroups][kN / 2], int a_byte, int b_byte, int step) {
        wgmma_step<kN>(*this, acc, a_byte, b_byte, step);
    }
    template <int kPending>
    void wait_products() {
        const bool late = block_.timing == Timing::kLate;
        products_.wait(kPending, [&](const Product& product) {
            if (late) finish(product);
        });
    }
    template <int kRegisters>
    void finish_products(int (&)[kMultiplyGroups][kRegisters]) {
        wait_products<0>();
        require(products_.idle(), "one-bit model: registers are read before their product was committed");
        fenced_ = false;
    }

private:
    struct Product {
        int* d;
        uint64_t a, b;
        int columns;
    };

    // Row `row` of a matrix by its descriptor: groups of eight rows, 128 bytes from row to row, and bits 4-6 of the
    // address turned over by bits 7-9.
    void load_row(uint64_t descriptor, int row, uint64_t (&words)[4]) {
        require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0,
                "one-bit model: a descriptor of another layout than 128-byte swizzle at offset 0");
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
        for (int half = 0; half < 2; ++half) load_row(product.a, 16 * warp + lane / 4 + 8 * half, a[half]);
        for (int i = 0; i < product.columns / 2; ++i) {
            if (i % 4 >= 2) continue;
            load_row(product.b, i / 4 * 8 + lane % 4 * 2 + i % 2, b);
            for (int half = 0; half < 2; ++half) {
                for (int k = 0; k < 4; ++k) product.d[i + 2 * half] += __builtin_popcountll(a[half][k] & b[k]);
            }
        }
    }

    Groups<Product> products_;
    bool fenced_ = false;
    using BlockModel::finish;
};

template <class Machine, class T>
void run_blocks(const Params& params, int blocks, const Operands& operands, Timing timing, unsigned seed) {
    for (int index = 0; index < blocks; ++index) {
        Block block(T::kThreads, T::kSharedBytes, index, blocks, operands, timing);
        Fibers::run(T::kThreads, seed, [&](int thread) {
            Machine machine(block, thread);
            run_tiles<T>(machine, params);
        });
    }
}

}  // namespace

void run_model(const Task& task, const TileRow& row, int blocks, Timing timing, unsigned seed) {
    const Params params = make_params(task, row);
    const int64_t pixels = task.batch * task.height * task.width;
    const int64_t weight_rows = int64_t{task.w_bits / 2} * params.filter_blocks * params.chunks * row.filters;
    const Operands operands{
        {reinterpret_cast<uintptr_t>(task.x), static_cast<uintptr_t>(pixels * params.pixel_words * 4)},
        {reinterpret_cast<uintptr_t>(task.w), static_cast<uintptr_t>(weight_rows * kRowBytes)}};
    const int used = std::min(std::max(blocks, 1), std::max(params.tiles, 1));
#define LBS_MODEL_wgmma WgmmaModel
#define LBS_MODEL_mma MmaModel
#define LBS_RUN(machine, groups, filters, stages)                 \
    if (same_row(row, {#machine, groups, filters, stages, 0}))    \
        return run_blocks<LBS_MODEL_##machine, Tile<groups, filters, stages>>(params, used, operands, timing, seed);
    LBS_ONEBIT_TILES(LBS_RUN)
#undef LBS_RUN
#undef LBS_MODEL_wgmma
#undef LBS_MODEL_mma
}

}  // namespace lbs::onebit
