// Which kernels run, and on whose threads.
#include "threads.h"

#include <cstring>
#include <initializer_list>

#include "secateur.h"

namespace secateur {
namespace {

// ---- instruction sets

const Kernels* by_name(const char* name) {
#if defined(SECATEUR_HAS_AVX512)
    if (!std::strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma") &&
                       __builtin_cpu_supports("bmi2")
                   ? &kAvx512
                   : nullptr;
#endif
#if defined(SECATEUR_HAS_AVX2)
    if (!std::strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kAvx2 : nullptr;
#endif
#if defined(SECATEUR_HAS_NEON)
    if (!std::strcmp(name, "neon")) return &kNeon;
#endif
    return std::strcmp(name, "portable") ? nullptr : &kPortable;
}

const Kernels* best() {
    const char* wanted = std::getenv("SECATEUR_ISA");
    const Kernels* found = wanted ? by_name(wanted) : nullptr;
    for (const char* name : {"avx512", "avx2", "neon", "portable"})
        if (!found) found = by_name(name);
    return found;
}

}  // namespace

const Kernels* kernels = best();
Parallel parallel = nullptr;

}  // namespace secateur

using namespace secateur;

int32_t secateur_abi(void) { return SECATEUR_ABI; }

const char* secateur_header(void) {
    return
#include "header.inc"
        ;
}

const char* secateur_isa(void) { return kernels->name; }

int32_t secateur_set_isa(const char* name) {
    const Kernels* found = by_name(name);
    if (!found) return -1;
    kernels = found;
    return 0;
}

void secateur_set_parallel(void* gomp_parallel) { parallel = reinterpret_cast<Parallel>(gomp_parallel); }
