#include "common/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/check.h"
#include "isa/kernels.h"

namespace lbs {
namespace {

#if defined(__aarch64__)
constexpr bool kIsArm = true;
#else
constexpr bool kIsArm = false;
#endif

struct Flags {
    bool avx2 = false, fma = false, f16c = false, avxvnni = false;
    bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false, avx512vnni = false;
    bool amx_tile = false, amx_int8 = false, amx_permitted = false;
    bool asimddp = false, i8mm = false;
};

#if defined(__x86_64__)

uint64_t enabled_states() {  // XCR0: what the operating system saves on a context switch
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

// Tile data is off until a process asks for it (Linux 5.16 and later).
bool request_tile_data() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Flags read_flags() {
    Flags flags;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return flags;
    const bool osxsave = c >> 27 & 1;
    const bool fma = c >> 12 & 1;
    const bool f16c = c >> 29 & 1;
    if (!osxsave) return flags;
    const uint64_t states = enabled_states();
    const bool ymm = (states & 0x6) == 0x6;
    const bool zmm = (states & 0xe6) == 0xe6;
    const bool tiles = (states >> 17 & 3) == 3;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return flags;
    flags.avx2 = ymm && (b >> 5 & 1);
    flags.fma = ymm && fma;
    flags.f16c = ymm && f16c;
    flags.avx512f = zmm && (b >> 16 & 1);
    flags.avx512dq = zmm && (b >> 17 & 1);
    flags.avx512bw = zmm && (b >> 30 & 1);
    flags.avx512vl = zmm && (b >> 31 & 1);
    flags.avx512vnni = zmm && (c >> 11 & 1);
    flags.amx_tile = tiles && (d >> 24 & 1);
    flags.amx_int8 = tiles && (d >> 25 & 1);
    if (flags.amx_tile && flags.amx_int8) flags.amx_permitted = request_tile_data();
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) flags.avxvnni = ymm && (a >> 4 & 1);
    return flags;
}

#elif defined(__aarch64__) && defined(__linux__)

Flags read_flags() {
    Flags flags;
    flags.asimddp = getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
    flags.i8mm = getauxval(AT_HWCAP2) >> 13 & 1;    // HWCAP2_I8MM
    return flags;
}

#else

Flags read_flags() { return {}; }

#endif

const Flags& flags() {
    static const Flags value = read_flags();
    return value;
}

bool has_avx2() { return flags().avx2 && flags().fma && flags().f16c; }
bool has_avx512() {
    const Flags& f = flags();
    return f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq && f.avx512vnni;
}

bool amx_works() {
#if defined(LBS_BUILD_AMX)
    static const bool works = amx_self_check();
    return works;
#else
    return false;
#endif
}

bool amx_model_works() {
#if defined(LBS_BUILD_AVX512VNNI)
    static const bool works = amx_model_self_check();
    return works;
#else
    return false;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kPortable: return "portable";
        case Isa::kAvx2: return "avx2";
        case Isa::kAvxVnni: return "avxvnni";
        case Isa::kAvx512Vnni: return "avx512vnni";
        case Isa::kAmx: return "amx";
        case Isa::kAmxModel: return "amx-model";
        case Isa::kNeon: return "neon";
        case Isa::kNeonI8mm: return "neon-i8mm";
    }
    return "unknown";
}

std::string isa_reason(Isa isa) {
    const bool is_arm = isa == Isa::kNeon || isa == Isa::kNeonI8mm;
    if (isa != Isa::kPortable && is_arm != kIsArm) return "it is of another kind of processor";
    switch (isa) {
        case Isa::kPortable: return "";
        case Isa::kAvx2:
#if !defined(LBS_BUILD_AVX2)
            return "this build has no AVX2 part: the compiler did not take its flags";
#endif
            return has_avx2() ? "" : "this processor lacks AVX2, FMA or F16C";
        case Isa::kAvxVnni:
#if !defined(LBS_BUILD_AVXVNNI)
            return "this build has no AVX-VNNI part: the compiler did not take its flags";
#endif
            return has_avx2() && flags().avxvnni ? "" : "this processor lacks AVX-VNNI, or AVX2, FMA or F16C";
        case Isa::kAvx512Vnni:
#if !defined(LBS_BUILD_AVX512VNNI)
            return "this build has no AVX-512 VNNI part: the compiler did not take its flags";
#endif
            return has_avx512() ? "" : "this processor lacks AVX-512 F/BW/VL/DQ or VNNI";
        case Isa::kAmx:
#if !defined(LBS_BUILD_AMX)
            return "this build has no AMX part: the compiler did not take its flags";
#endif
            if (!has_avx512()) return "the AMX kernels also need AVX-512 VNNI, which this processor lacks";
            if (!flags().amx_tile || !flags().amx_int8) return "this processor lacks AMX-TILE or AMX-INT8";
            if (!flags().amx_permitted) return "the kernel refused permission to use tile data";
            return amx_works() ? "" : "its tile multiply failed the self-check";
        case Isa::kAmxModel:
#if !defined(LBS_BUILD_AVX512VNNI)
            return "this build has no AVX-512 VNNI part, which the tile model uses outside the tiles";
#endif
            if (!has_avx512()) return "the tile model uses AVX-512 outside the tiles, which this processor lacks";
            return amx_model_works() ? "" : "its tile multiply failed the self-check";
        case Isa::kNeon:
#if !defined(LBS_BUILD_NEON)
            return "this build has no NEON part: the compiler did not take its flags";
#endif
            return flags().asimddp ? "" : "this processor lacks the dot products of NEON (asimddp)";
        case Isa::kNeonI8mm:
#if !defined(LBS_BUILD_NEON_I8MM)
            return "this build has no NEON part with I8MM: the compiler did not take its flags";
#endif
            return flags().asimddp && flags().i8mm ? "" : "this processor lacks I8MM";
    }
    return "unknown instruction set";
}

namespace {

Isa named_by_user(const char* name) {
    try {
        return resolve_isa(name);
    } catch (const BackendError& error) {
        throw BackendError(std::string("LBS_ISA: ") + error.what());
    }
}

}  // namespace

Isa resolve_isa(const std::string& name) {
    if (name == "auto") {
        const char* const named = std::getenv("LBS_ISA");
        if (named && *named && std::strcmp(named, "auto") != 0) return named_by_user(named);
        for (Isa isa : {Isa::kAmx, Isa::kAvx512Vnni, Isa::kAvxVnni, Isa::kAvx2, Isa::kNeonI8mm, Isa::kNeon})
            if (isa_reason(isa).empty()) return isa;
        return Isa::kPortable;
    }
    std::string names;
    for (Isa isa : kIsas) {
        if (name == isa_name(isa)) {
            const std::string reason = isa_reason(isa);
            if (!reason.empty()) throw BackendError("isa '" + name + "' cannot run: " + reason + "; use isa='auto'");
            return isa;
        }
        names += std::string(isa_name(isa)) + ", ";
    }
    throw BackendError("isa '" + name + "' is unknown; it is one of " + names + "auto");
}

std::vector<std::pair<std::string, bool>> cpu_features() {
    const Flags& f = flags();
    return {{"avx2", f.avx2},
            {"fma", f.fma},
            {"f16c", f.f16c},
            {"avxvnni", f.avxvnni},
            {"avx512f", f.avx512f},
            {"avx512bw", f.avx512bw},
            {"avx512vl", f.avx512vl},
            {"avx512dq", f.avx512dq},
            {"avx512vnni", f.avx512vnni},
            {"amx_tile", f.amx_tile},
            {"amx_int8", f.amx_int8},
            {"amx_permitted", f.amx_permitted},
            {"asimddp", f.asimddp},
            {"i8mm", f.i8mm}};
}

}  // namespace lbs
