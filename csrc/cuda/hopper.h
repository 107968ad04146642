// What the kernels for Hopper's tensor cores share: the copy engine (TMA) brings tiles of matrices to shared memory, where
// warpgroups multiply them (wgmma). The tests have both emulated (tests/csrc/hopper_emulation.h), and what has another
// form there stands between the lines with __CUDACC__.
#pragma once

#include <type_traits>

#include "device.h"

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
#define SPARSEBILEVEL_SM90 1
#endif

namespace sparsebilevel {
namespace {

constexpr int kSide = 64;                      // of what is multiplied at a time, and of 128 bytes: a swizzled row
constexpr int kTileBytes = kSide * kSide * 2;  // one of 64 x 64
constexpr int kGroup = 128;                    // threads of a warpgroup
constexpr int kSharedLimit = 227 * 1024;       // of a block

#ifdef __CUDACC__
// -- instructions ---------------------------------------------------------------------------------------------------

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier in shared memory; it is passed once in each phase, 0 or 1, when all have arrived and all bytes are there.
struct Barrier {
  uint64_t state;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
  }
  __device__ void wait(uint32_t phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}\n" ::
            "r"(shared_address(this)),
        "r"(phase)
        : "memory");
  }
  // Arrives, and has the phase wait for so many bytes too.
  __device__ void arrive_and_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
};

// Makes barriers that were just initialized known to the copy engine.
__device__ inline void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Makes what was stored to shared memory known to the copy engine.
__device__ inline void fence_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// A barrier among the threads of one warpgroup.
__device__ inline void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// A box of a matrix at (row, col); what sticks out is zero.
__device__ inline void load_box(void* to, const CUtensorMap& matrix, int row, int col, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&matrix), "r"(col), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}
// Has the L2 cache fetch the line of an address.
__device__ inline void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
// What sticks out of the matrix is not stored.
__device__ inline void store_box(const CUtensorMap& matrix, int row, int col, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&matrix), "r"(col),
               "r"(row), "r"(shared_address(from))
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ inline void wait_until_stores_have_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Where a warpgroup finds an operand whose rows of 64 elements are swizzled in 128 bytes, eight rows in 1024. Rows hold
// what is summed over; or, transposed, there is a row for each summand, and the next 64 columns are a tile further on.
__device__ inline uint64_t operand(const void* start) {
  constexpr uint64_t kEightRows = 1024 >> 4, kNextTile = kTileBytes >> 4, kSwizzle128 = 1;
  return (shared_address(start) & 0x3ffff) >> 4 | kNextTile << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

#define SPARSEBILEVEL_16(f, i)                                                                                       \
  f(i), f(i + 1), f(i + 2), f(i + 3), f(i + 4), f(i + 5), f(i + 6), f(i + 7), f(i + 8), f(i + 9), f(i + 10),          \
      f(i + 11), f(i + 12), f(i + 13), f(i + 14), f(i + 15)
#define SPARSEBILEVEL_32(f, i) SPARSEBILEVEL_16(f, i), SPARSEBILEVEL_16(f, i + 16)
#define SPARSEBILEVEL_64(f) SPARSEBILEVEL_32(f, 0), SPARSEBILEVEL_32(f, 32)
#define SPARSEBILEVEL_128(f) SPARSEBILEVEL_64(f), SPARSEBILEVEL_32(f, 64), SPARSEBILEVEL_32(f, 96)
#define SPARSEBILEVEL_SUM(i) "+f"(sums[i])
#define SPARSEBILEVEL_NAMES_64                                                                                        \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"     \
  "%30,%31"                                                                                                           \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,"  \
  "%60,%61,%62,%63"
#define SPARSEBILEVEL_NAMES_128                                                                                       \
  SPARSEBILEVEL_NAMES_64                                                                                              \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,"  \
  "%92,%93,%94,%95"                                                                                                   \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,"   \
  "%119,%120,%121,%122,%123,%124,%125,%126,%127"
// count: registers of sums; n: columns; a to tb: numbers of what follows the sums.
#define SPARSEBILEVEL_WGMMA(count, n, type, a, b, p, ta, tb)                                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type     \
               "." type " {" SPARSEBILEVEL_NAMES_##count "}, %" a ", %" b ", p, 1, 1, %" ta ", %" tb ";\n}\n"           \
               : SPARSEBILEVEL_##count(SPARSEBILEVEL_SUM)                                                             \
               : "l"(left), "l"(right), "r"(add), "n"(static_cast<int>(kLeft)), "n"(static_cast<int>(kRight)))
#define SPARSEBILEVEL_WGMMA_OF(type)                                                            \
  if constexpr (kColumns == 128) {                                                              \
    SPARSEBILEVEL_WGMMA(64, "128", type, "64", "65", "66", "67", "68");                         \
  } else {                                                                                      \
    static_assert(kColumns == 256);                                                             \
    SPARSEBILEVEL_WGMMA(128, "256", type, "128", "129", "130", "131", "132");                   \
  }

// sums [64, kColumns] += left [64, 16] @ right [16, kColumns], in the background; without `add` they begin with it.
template <class Element, int kColumns, bool kLeft, bool kRight, int kSums>
__device__ inline void multiply(float (&sums)[kSums], uint64_t left, uint64_t right, int add) {
  static_assert(2 * kSums == kColumns);
  if constexpr (std::is_same_v<Element, __half>) {
    SPARSEBILEVEL_WGMMA_OF("f16")
  } else {
    SPARSEBILEVEL_WGMMA_OF("bf16")
  }
}
__device__ inline void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_multiplying() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all that were ended are done.
__device__ inline void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// After it the compiler knows that the sums have changed.
template <int kSums>
__device__ inline void take(float (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Four matrices of 8 x 8, transposed: a lane has two elements of each, and says where eight in a row of one go.
__device__ inline void store_transposed(void* to, int offset, const uint32_t (&packed)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to) + offset),
               "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
               : "memory");
}
// After it the compiler does not know the value.
__device__ inline void forget(int64_t& value) { asm volatile("" : "+l"(value)); }

template <class Shared>
__device__ inline Shared& shared_memory() {
  extern __shared__ uint8_t bytes[];
  return *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(bytes) + 1023) & ~uintptr_t{1023});
}

template <class Element>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  }
}
#endif

// A place in a ring of stages, and the phase of its barriers.
struct Place {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

// From one 16 summands of an operand to the next, in units of 16 bytes.
template <bool kTransposed>
constexpr uint64_t kNext16 = kTransposed ? 16 * 128 >> 4 : 16 * 2 >> 4;

__device__ inline float value_of(const void* values, int type, int i) {
  if (type == 0) return half_to_float(static_cast<const uint16_t*>(values)[i]);
  if (type == 1) return __uint_as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(values)[i]) << 16);
  return static_cast<const float*>(values)[i];
}
#ifdef __CUDACC__
// -- launches -------------------------------------------------------------------------------------------------------

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver, without which the library must load.
inline Encode encoder() {
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  return encode;
}

// A row-major matrix of 16-bit elements, in boxes of 64 columns; false if the driver refuses it.
inline bool describe(CUtensorMap& map, const void* data, int type, int64_t rows, int64_t cols, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(cols) * 2};
  const cuuint32_t box[2] = {kSide, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  return encoder() && encoder()(&map, type == 0 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                                const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, void* stream,
                   const Arguments&... arguments) {
  auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  // Room for as many blocks as fit.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}
#endif

}  // namespace
}  // namespace sparsebilevel
