// The file AQUABIT_EACH_LEVEL, after simd.h, once for each instruction set: compiled for it, in a namespace of its
// own. It defines ``kLevel``, a table of functions of the type ``Level``; levels() then says which this processor can
// run. Included in a kernel's .cpp, inside a namespace, after <string>, <vector> and processor.h.
//
// AVX2 and the baseline are always compiled; AQUABIT_AVX512VNNI and AQUABIT_AVX512 ask for AVX-512 with and without
// its integer dot products, AQUABIT_AVXVNNI for AVX2 with them, which laptops have; AQUABIT_TILES names the
// file of what AMX does, where AQUABIT_AMX is defined. AQUABIT_LEVEL is 4 (AVX-512), 3 (AVX2), 2 (SSE2) or
// 0 (another processor); AQUABIT_VNNI says that there are integer dot products.
//
// What is included must call no library code, and what it defines is static: the linker would keep one copy of an
// inline function for all levels, and that might be one that the processor cannot run.

#define INLINE static inline __attribute__((always_inline))
#define NOT_INLINE __attribute__((noinline))

#if defined(__clang__)
#define AQUABIT_TARGET_BEGIN(set) \
    AQUABIT_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define AQUABIT_TARGET_END _Pragma("clang attribute pop")
#else
#define AQUABIT_TARGET_BEGIN(set) _Pragma("GCC push_options") AQUABIT_PRAGMA(GCC target(set))
#define AQUABIT_TARGET_END _Pragma("GCC pop_options")
#endif
#define AQUABIT_PRAGMA(text) _Pragma(#text)

#ifdef AQUABIT_X86
#ifdef AQUABIT_AVX512VNNI
AQUABIT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi,popcnt")
namespace avx512vnni {
constexpr int kLanes = 16;
#define AQUABIT_LEVEL 4
#define AQUABIT_VNNI
#include "simd.h"
#include AQUABIT_EACH_LEVEL
#undef AQUABIT_VNNI
#undef AQUABIT_LEVEL
}  // namespace avx512vnni
AQUABIT_TARGET_END
#endif

#ifdef AQUABIT_TILES
AQUABIT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,amx-bf16,avx2,fma,bmi,popcnt")
namespace amx {
constexpr int kLanes = 16;
#define AQUABIT_LEVEL 4
#define AQUABIT_VNNI
#define AQUABIT_AMX
#include "simd.h"
#include AQUABIT_TILES
#undef AQUABIT_AMX
#undef AQUABIT_VNNI
#undef AQUABIT_LEVEL
}  // namespace amx
AQUABIT_TARGET_END
#endif

#ifdef AQUABIT_AVX512
AQUABIT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,popcnt")
namespace avx512 {
constexpr int kLanes = 16;
#define AQUABIT_LEVEL 4
#include "simd.h"
#include AQUABIT_EACH_LEVEL
#undef AQUABIT_LEVEL
}  // namespace avx512
AQUABIT_TARGET_END
#endif

#ifdef AQUABIT_AVXVNNI
AQUABIT_TARGET_BEGIN("avxvnni,avx2,fma,bmi,popcnt")
namespace avxvnni {
constexpr int kLanes = 8;
#define AQUABIT_LEVEL 3
#define AQUABIT_VNNI
#include "simd.h"
#include AQUABIT_EACH_LEVEL
#undef AQUABIT_VNNI
#undef AQUABIT_LEVEL
}  // namespace avxvnni
AQUABIT_TARGET_END
#endif

AQUABIT_TARGET_BEGIN("avx2,fma,bmi,popcnt")
namespace avx2 {
constexpr int kLanes = 8;
#define AQUABIT_LEVEL 3
#include "simd.h"
#include AQUABIT_EACH_LEVEL
#undef AQUABIT_LEVEL
}  // namespace avx2
AQUABIT_TARGET_END
#endif

namespace baseline {
constexpr int kLanes = 4;
#ifdef AQUABIT_X86
#define AQUABIT_LEVEL 2
#else
#define AQUABIT_LEVEL 0
#endif
#include "simd.h"
#include AQUABIT_EACH_LEVEL
#undef AQUABIT_LEVEL
}  // namespace baseline

#undef AQUABIT_TARGET_BEGIN
#undef AQUABIT_TARGET_END
#undef AQUABIT_PRAGMA

struct NamedLevel {
    const char* name;
    const Level* level;
};

// What this processor can run, best first.
static const std::vector<NamedLevel>& levels() {
    static const std::vector<NamedLevel> all = [] {
        std::vector<NamedLevel> found;
        [[maybe_unused]] const Processor own = processor();
#ifdef AQUABIT_X86
#ifdef AQUABIT_TILES
        if (own.amx) found.push_back({"amx", &amx::kLevel});
#endif
#ifdef AQUABIT_AVX512VNNI
        if (own.vnni) found.push_back({"avx512vnni", &avx512vnni::kLevel});
#endif
#ifdef AQUABIT_AVX512
        if (own.avx512) found.push_back({"avx512", &avx512::kLevel});
#endif
#ifdef AQUABIT_AVXVNNI
        if (own.avxvnni) found.push_back({"avxvnni", &avxvnni::kLevel});
#endif
        if (own.avx2) found.push_back({"avx2", &avx2::kLevel});
#endif
        found.push_back({"baseline", &baseline::kLevel});
        return found;
    }();
    return all;
}

static const Level& level_at(int64_t number) { return *levels().at(number).level; }

[[maybe_unused]] static std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const NamedLevel& known : levels()) names.emplace_back(known.name);
    return names;
}
