// Products with weights that are zero in whole tiles of 64 or 128, on Hopper's tensor cores: the copy engine (TMA) brings
// the kept tiles to shared memory, where warpgroups multiply them (wgmma). kernels/triton_block_sparse.py has the same for
// other devices, types and tiles; what is gained here is that fewer bytes come out of the L2 cache, which is what limits
// these products: 256 rows of x share a tile of weights, and two rows of tiles those of x that both need.
//
// Not for the emulation of tests/: see device.h for what that takes.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "device.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SPARSEBILEVEL_SM90 1
#endif

namespace sparsebilevel {
namespace {

constexpr int kSide = 64;                      // of what is multiplied at a time, and of 128 bytes: a swizzled row
constexpr int kTileBytes = kSide * kSide * 2;  // one of 64 x 64
constexpr int kGroup = 128;                    // threads of a warpgroup
constexpr int kPairThreads = 2 * kGroup + 32;  // two that multiply, and a warp that loads
constexpr int kSharedLimit = 227 * 1024;       // of a block
constexpr int kGroupRows = 1024;               // of 4096 features 8 MiB of an L2 cache of 50

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
// From one 16 summands to the next, in units of 16 bytes.
template <bool kTransposed>
constexpr uint64_t kNext16 = kTransposed ? 16 * 128 >> 4 : 16 * 2 >> 4;

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
__device__ inline void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// After it the compiler knows that the sums have changed.
template <int kSums>
__device__ inline void take(float (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// A place in a ring of stages, and the phase of its barriers.
struct Place {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

template <class Shared>
__device__ inline Shared& shared_memory() {
  extern __shared__ uint8_t bytes[];
  return *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(bytes) + 1023) & ~uintptr_t{1023});
}

__device__ inline float value_of(const void* values, int type, int i) {
  if (type == 0) return half_to_float(static_cast<const uint16_t*>(values)[i]);
  if (type == 1) return __uint_as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(values)[i]) << 16);
  return static_cast<const float*>(values)[i];
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

// -- output, and gradient of the input ------------------------------------------------------------------------------

// What a stage of the ring is for.
struct Step {
  static constexpr int kLast = 4, kStop = 8;
  int what;     // bit 0 and 1: whether the first and the second of a pair have a tile; kLast: of their sums; kStop: no more
  int row;      // of the result: first of kRows rows of x
  int tile[2];  // of the pair
};

template <int kRows>
struct PairShared {
  static constexpr int kStages = kRows == 256 ? 4 : 6, kOutRows = 128;
  uint8_t x[kStages][kRows * kSide * 2];
  uint8_t weight[kStages][2][kTileBytes];
  uint8_t out[2][kOutRows * kSide * 2];
  Barrier full[kStages], empty[kStages];
  Step steps[kStages];
};

struct PairArguments {
  const void* bias;
  int bias_type;
  const int *order, *starts, *entries, *members;
  int pairs;
  int row_tiles, group, columns;
};

// out = x @ weight.T, or x @ weight (kInputGrad), for kRows rows of x and a pair of 64 columns of the result at a time, as
// its transpose: 64 columns by all rows are a warpgroup's. The lists say which 64 summands one of the pair, or both, need.
template <class Element, bool kInputGrad, int kRows>
__global__ void __launch_bounds__(kPairThreads, 1)
    block_matmul(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
                 const __grid_constant__ CUtensorMap out, const PairArguments arguments) {
#ifdef SPARSEBILEVEL_SM90
  using Shared = PairShared<kRows>;
  constexpr int kStages = Shared::kStages, kSums = kRows / 2, kOutRows = Shared::kOutRows;
  Shared& shared = shared_memory<Shared>();
  const int warp = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / 32, 0), group = warp / 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) shared.full[i].init(1), shared.empty[i].init(8);
    fence_barriers();
  }
  __syncthreads();
  Place place;

  if (group == 2) {
    if (threadIdx.x % 32 != 0) return;
    auto next = [&](int what, int row, int first, int second) {
      shared.empty[place.stage].wait(place.phase ^ 1);
      shared.steps[place.stage] = {what, row, {first, second}};
    };
    const int lists = arguments.pairs, total = arguments.row_tiles * lists;
    for (int unit = blockIdx.x; unit < total; unit += gridDim.x) {
      // Groups of as many rows as the L2 cache holds. The longest lists come first in every other group and last in the
      // rest: so blocks, which take units in turn, have about the same to do.
      const int number = unit / (arguments.group * lists), begin_row = number * arguments.group;
      const int height = min(arguments.row_tiles - begin_row, arguments.group), within = unit - begin_row * lists;
      const int rank = within / height, pair = arguments.order[number % 2 ? lists - 1 - rank : rank];
      const int row = (begin_row + within % height) * kRows;
      const int first = arguments.members[2 * pair], second = arguments.members[2 * pair + 1];
      const int begin = arguments.starts[pair], end = arguments.starts[pair + 1];
      int entry = begin < end ? arguments.entries[begin] : 0;
      for (int i = begin; i < end; ++i) {
        const int c = entry / 4 * kSide, kept = entry & 3;
        if (i + 1 < end) entry = arguments.entries[i + 1];  // in time for the next
        next(kept | (i + 1 == end ? Step::kLast : 0), row, first, second);
        Barrier& full = shared.full[place.stage];
        full.arrive_and_expect(kRows * kSide * 2 + __popc(kept) * kTileBytes);
        load_box(shared.x[place.stage], x, row, c, full);
        for (int half = 0; half < 2; ++half) {
          const int m = (half ? second : first) * kSide;
          if (kept >> half & 1) {
            load_box(shared.weight[place.stage][half], weight, kInputGrad ? c : m, kInputGrad ? m : c, full);
          }
        }
        place.advance(kStages);
      }
      if (begin == end) {
        next(Step::kLast, row, first, second);
        shared.full[place.stage].arrive();
        place.advance(kStages);
      }
    }
    next(Step::kStop, 0, 0, 0);
    shared.full[place.stage].arrive();
    return;
  }

  const int lane = static_cast<int>(threadIdx.x) % 32, thread = static_cast<int>(threadIdx.x) % kGroup;
  for (;;) {
    float sums[kSums];
    int what, row, col, add = 0;
    do {
      shared.full[place.stage].wait(place.phase);
      const Step& step = shared.steps[place.stage];
      what = __shfl_sync(kAll, step.what, 0), row = step.row, col = step.tile[group] * kSide;
      if (what >> group & 1) {
        const uint64_t left = operand(shared.weight[place.stage][group]), right = operand(shared.x[place.stage]);
        begin_multiplying();
#pragma unroll
        for (int i = 0; i < kSide / 16; ++i) {
          multiply<Element, kRows, kInputGrad, false>(sums, left + i * kNext16<kInputGrad>, right + i * kNext16<false>,
                                                      add);
          add = 1;
        }
        end_multiplying();
        wait_for_products();  // the other warpgroup's keep the tensor cores busy
      }
      if (lane == 0) shared.empty[place.stage].arrive();
      place.advance(kStages);
    } while (!(what & (Step::kLast | Step::kStop)));
    take(sums);
    if (what & Step::kStop) break;
    const int column = col + warp % 4 * 16 + lane / 4;
    float bias[2] = {0, 0};
    for (int i = 0; i < 2; ++i) {
      if (arguments.bias && column + 8 * i < arguments.columns) {
        bias[i] = value_of(arguments.bias, arguments.bias_type, column + 8 * i);
      }
    }
    uint8_t* const staging = shared.out[group];
#pragma unroll
    for (int part = 0; part < kRows / kOutRows; ++part) {
      if (thread == 0) wait_until_stores_have_read();
      sync_group(group);
#pragma unroll
      for (int j = 0; j < kOutRows / 8; j += 2) {
        // Four matrices of 8 x 8, transposed; a lane has the address of a row of one: which lies in 16 bytes of the 128
        // that are swizzled as the copy engine does.
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = part * (kOutRows / 2) + 4 * (j + i / 2) + 2 * (i % 2);
          const float low = add ? sums[at] : 0, high = add ? sums[at + 1] : 0;
          packed[i] = pack<Element>(low + bias[i % 2], high + bias[i % 2]);
        }
        const int line = 8 * (j + lane / 16) + lane % 8, chunk = warp % 4 * 2 + lane / 8 % 2;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         shared_address(staging) + line * 128 + ((chunk ^ line % 8) << 4)),
                     "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                     : "memory");
      }
      fence_stores();
      sync_group(group);
      if (thread == 0) store_box(out, row + part * kOutRows, col, staging);
    }
  }
  if (thread == 0) wait_until_stores_have_read();
#endif
}

// -- launches -------------------------------------------------------------------------------------------------------

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver, without which the library must load.
Encode encoder() {
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
bool describe(CUtensorMap& map, const void* data, int type, int64_t rows, int64_t cols, int box_rows) {
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
  const auto error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

struct Matmul {
  const void *x, *weight;
  void* out;
  int64_t t, n, k;
  int type, processors;
  void* stream;
  PairArguments arguments;
};

template <class Element, bool kInputGrad, int kRows>
cudaError_t run(Matmul m) {
  using Shared = PairShared<kRows>;
  constexpr size_t kShared = sizeof(Shared) + 1024;
  static_assert(kShared <= kSharedLimit);
  const int64_t summed = kInputGrad ? m.n : m.k, columns = kInputGrad ? m.k : m.n;
  CUtensorMap x, weight, out;
  if (!describe(x, m.x, m.type, m.t, summed, kRows) || !describe(weight, m.weight, m.type, m.n, m.k, kSide) ||
      !describe(out, m.out, m.type, m.t, columns, Shared::kOutRows)) {
    return cudaErrorInvalidValue;
  }
  m.arguments.columns = static_cast<int>(columns);
  m.arguments.row_tiles = static_cast<int>(divide_up(m.t, kRows));
  m.arguments.group = kGroupRows / kRows;
  const int64_t units = static_cast<int64_t>(m.arguments.row_tiles) * m.arguments.pairs;
  return launch(block_matmul<Element, kInputGrad, kRows>, std::min<int64_t>(units, m.processors), kPairThreads, kShared,
                m.stream, x, weight, out, m.arguments);
}

template <class Element, bool kInputGrad>
cudaError_t run(const Matmul& m, int rows) {
  return rows == 128 ? run<Element, kInputGrad, 128>(m) : run<Element, kInputGrad, 256>(m);
}

}  // namespace
}  // namespace sparsebilevel

using namespace sparsebilevel;

// out [t, n] = x [t, k] @ weight [n, k].T + bias, or with input_grad out [t, k] = x [t, n] @ weight, for elements of
// 16 bits (type 0: float16, 1: bfloat16) at multiples of 16 bytes, and n and k multiples of 8.
//   pairs: of 64 columns of the result; order [pairs]: those with the longest lists first; starts [pairs + 1]: where the
//     list of each begins in entries; entries: 4 * the number of the 64 summands, plus 1 if the weight has a tile there
//     for the first of the pair, plus 2 if for the second; members [pairs, 2]: numbers of the 64 columns, or one that is
//     too large.
//   rows: of x at a time, 128 or 256.
SPARSEBILEVEL_API sparsebilevel_block_matmul(const void* x, const void* weight, const void* bias, int bias_type,
                                             void* out, const int* order, const int* starts, const int* entries,
                                             const int* members, int pairs, int64_t t, int64_t n, int64_t k, int input_grad, int type,
                                             int rows, int processors, void* stream) {
  Matmul m{x, weight, out, t, n, k, type, processors, stream, 
           {bias, bias_type, order, starts, entries, members, pairs, 0, 0, 0}};
  if (type == 0) return input_grad ? run<__half, true>(m, rows) : run<__half, false>(m, rows);
  return input_grad ? run<__nv_bfloat16, true>(m, rows) : run<__nv_bfloat16, false>(m, rows);
}
