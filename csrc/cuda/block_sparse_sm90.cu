// Products with weights that are zero in whole tiles of 64 or 128, on Hopper's tensor cores: the copy engine (TMA) brings
// the kept tiles to shared memory, where warpgroups multiply them (wgmma). kernels/triton_block_sparse.py has the same for
// other devices, types and tiles; what is gained here is that fewer bytes come out of the L2 cache, which is what limits
// these products: 256 rows of x share a tile of weights, and two rows of tiles those of x that both need.
#include <algorithm>

#include "hopper.h"

namespace sparsebilevel {
namespace {

constexpr int kPairThreads = 2 * kGroup + 32;  // two that multiply, and a warp that loads
constexpr int kGroupRows = 1024;               // of 4096 features 8 MiB of an L2 cache of 50

// -- output, and gradient of the input ------------------------------------------------------------------------------

// What a stage of the ring is for.
struct Step {
  enum : int { kLast = 4, kStop = 8 };
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
        // A lane has the address of eight elements that lie in 16 bytes of the 128 that are swizzled as the copy engine
        // does.
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = part * (kOutRows / 2) + 4 * (j + i / 2) + 2 * (i % 2);
          const float low = add ? sums[at] : 0, high = add ? sums[at + 1] : 0;
          packed[i] = pack<Element>(low + bias[i % 2], high + bias[i % 2]);
        }
        const int line = 8 * (j + lane / 16) + lane % 8, chunk = warp % 4 * 2 + lane / 8 % 2;
        store_transposed(staging, line * 128 + ((chunk ^ line % 8) << 4), packed);
      }
      fence_stores();
      sync_group(group);
      if (thread == 0) store_box(out, row + part * kOutRows, col, staging);
    }
  }
  if (thread == 0) wait_until_stores_have_read();
#endif
}

// -- launch ----------------------------------------------------------------------------------------------------------

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
