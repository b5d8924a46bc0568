// The tile instructions the convolution needs, twice: as the processor's, and as a model in plain C++ that runs
// anywhere.
//
// Eight tiles of 16 rows of 64 bytes. Tiles 0-3 hold int32 sums [16 filters][16 pixels], 4 and 5 signed weights
// [16 filters][64 of K], 6 and 7 unsigned codes [16 groups of K][16 pixels][4].
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct alignas(64) TileConfig {  // what LDTILECFG reads
    uint8_t palette = 1, start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the processor reads 64 bytes");

#if defined(LBS_NATIVE_TILES)

// By hand instead of by intrinsic: those of GCC 12 name tiles by literal and do not order loads after earlier stores.
struct Tiles {
    static void configure() {
        const TileConfig config;
        __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
    }
    static void release() { __asm__ volatile("tilerelease" : : : "memory"); }
    template <int kTile>
    static void zero() {
        __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
    }
    template <int kTile>
    static void load(const void* p, int64_t stride) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
    }
    template <int kTile>
    static void store(void* p, int64_t stride) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
    }
    // sums += signed * unsigned
    template <int kSums, int kSigned, int kUnsigned>
    static void dot() {
        __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kSigned), "i"(kUnsigned));
    }
};

#else

// The same on memory of the thread, following the definition of each instruction (Intel, volume 2). Before configure
// and after release a tile holds nothing useful, as on the processor, where using one is a fault.
struct Tiles {
    struct State {
        TileConfig config;
        uint8_t bytes[8][16][64];
        bool ready = false;
    };
    static State& state() {
        static thread_local State value;
        return value;
    }
    static void spoil() { std::memset(state().bytes, 0x5a, sizeof state().bytes); }
    static void configure() {
        state().config = TileConfig();
        state().ready = true;
        std::memset(state().bytes, 0, sizeof state().bytes);
    }
    static void release() {
        state().ready = false;
        spoil();
    }
    template <int kTile>
    static void zero() {
        std::memset(state().bytes[kTile], 0, sizeof state().bytes[kTile]);
        if (!state().ready) spoil();
    }
    template <int kTile>
    static void load(const void* p, int64_t stride) {
        State& s = state();
        for (int row = 0; row < s.config.rows[kTile]; ++row)
            std::memcpy(s.bytes[kTile][row], static_cast<const char*>(p) + row * stride, s.config.bytes_per_row[kTile]);
        if (!s.ready) spoil();
    }
    template <int kTile>
    static void store(void* p, int64_t stride) {
        const State& s = state();
        for (int row = 0; row < s.config.rows[kTile]; ++row)
            std::memcpy(static_cast<char*>(p) + row * stride, s.bytes[kTile][row], s.config.bytes_per_row[kTile]);
    }
    template <int kSums, int kSigned, int kUnsigned>
    static void dot() {
        State& s = state();
        for (int m = 0; m < s.config.rows[kSums]; ++m)
            for (int k = 0; k < s.config.bytes_per_row[kSigned] / 4; ++k)
                for (int n = 0; n < s.config.bytes_per_row[kSums] / 4; ++n) {
                    int32_t sum;
                    std::memcpy(&sum, &s.bytes[kSums][m][4 * n], 4);
                    for (int j = 0; j < 4; ++j)
                        sum += static_cast<int8_t>(s.bytes[kSigned][m][4 * k + j]) * s.bytes[kUnsigned][k][4 * n + j];
                    std::memcpy(&s.bytes[kSums][m][4 * n], &sum, 4);
                }
    }
};

#endif

}  // namespace
