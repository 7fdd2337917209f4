// What this processor has of the instruction sets that kernels are compiled for (foreach_level.h).
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#define AQUABIT_X86
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

struct Processor {
    bool avx2 = false;     // with fma, bmi and popcnt
    bool avxvnni = false;  // besides avx2
    bool avx512 = false;   // f, bw, dq, vl, besides avx2
    bool vnni = false;     // besides avx512
    bool amx = false;      // tiles of 8 bits and of bfloat16, besides vnni; the kernel was asked for them
};

#ifdef AQUABIT_X86
// Whether tiles of 8 bits and of bfloat16 are there, and Linux lets this process use them (arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)).
inline bool asks_for_tiles() {
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}
#endif

// Of these no better ones than the environment's AQUABIT_INSTRUCTIONS, where that names one (extension.py says what there is).
inline Processor processor() {
    Processor p;
#ifdef AQUABIT_X86
    __builtin_cpu_init();
    p.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
             __builtin_cpu_supports("popcnt");
    p.avx512 = p.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    p.vnni = p.avx512 && __builtin_cpu_supports("avx512vnni");
    unsigned a = 0, b = 0, c = 0, d = 0;  // leaf 7.1: compilers know that name of the set since gcc 11
    p.avxvnni = p.avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    p.amx = p.vnni && asks_for_tiles();
    const char* most = std::getenv("AQUABIT_INSTRUCTIONS");
    bool* const better[] = {&p.avx2, &p.avxvnni, &p.avx512, &p.vnni, &p.amx};
    const char* const names[] = {"baseline", "avx2", "avxvnni", "avx512", "avx512vnni"};
    for (int i = 0; most && i < 5; ++i)
        if (std::strcmp(most, names[i]) == 0)
            for (int k = i; k < 5; ++k) *better[k] = false;
#endif
    return p;
}
