// Instruction sets. The extension is compiled for the baseline of its architecture, so that one binary runs everywhere;
// faster variants of a function carry a target attribute and are chosen by `isa()`.
#pragma once

#if defined(__x86_64__)
#define SPARSEBILEVEL_X86 1
#define SPARSEBILEVEL_AVX2 __attribute__((target("avx2,fma,bmi2")))
#define SPARSEBILEVEL_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")))
// The same for a whole region of a file: templates cannot carry a target attribute each. Nothing but code of our own
// may be inside, since an inline function of a library would be compiled for that instruction set everywhere.
#define SPARSEBILEVEL_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define SPARSEBILEVEL_BEGIN(features) \
  SPARSEBILEVEL_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SPARSEBILEVEL_END_ISA SPARSEBILEVEL_PRAGMA(clang attribute pop)
#else
#define SPARSEBILEVEL_BEGIN(features) SPARSEBILEVEL_PRAGMA(GCC push_options) SPARSEBILEVEL_PRAGMA(GCC target(features))
#define SPARSEBILEVEL_END_ISA SPARSEBILEVEL_PRAGMA(GCC pop_options)
#endif
#define SPARSEBILEVEL_BEGIN_AVX2 SPARSEBILEVEL_BEGIN("avx2,fma,bmi2")
#define SPARSEBILEVEL_BEGIN_AVX512 SPARSEBILEVEL_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")
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
