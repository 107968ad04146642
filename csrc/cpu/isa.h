// Instruction sets. The extension is compiled for the baseline of its architecture, so that one binary runs everywhere;
// faster variants of a function carry a target attribute and are chosen by `isa()`.
#pragma once

#if defined(__x86_64__)
#define SPARSEBILEVEL_X86 1
#define SPARSEBILEVEL_AVX2 __attribute__((target("avx2,fma,f16c,bmi2")))
#define SPARSEBILEVEL_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")))
#endif

namespace sparsebilevel {

enum class Isa { scalar, avx2, avx512 };

// What the processor and the operating system allow.
inline Isa cpu_isa() {
#ifdef SPARSEBILEVEL_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

// What the kernels use: `cpu_isa()`, or less after set_isa().
Isa isa();
void set_isa(Isa wanted);

}  // namespace sparsebilevel
