// What this processor has of the instruction sets that kernels are compiled for (foreach_level.h).
#pragma once

#if defined(__x86_64__)
#define AQUABIT_X86
#include <immintrin.h>
#endif

struct Processor {
    bool avx2 = false;    // with fma, bmi and popcnt
    bool avx512 = false;  // f, bw, dq, vl, besides avx2
    bool vnni = false;    // besides avx512
};

inline Processor processor() {
    Processor p;
#ifdef AQUABIT_X86
    __builtin_cpu_init();
    p.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
             __builtin_cpu_supports("popcnt");
    p.avx512 = p.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    p.vnni = p.avx512 && __builtin_cpu_supports("avx512vnni");
#endif
    return p;
}
