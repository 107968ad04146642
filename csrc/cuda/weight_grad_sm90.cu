// The gradient of a dense weight, G = dy.T @ x, on Hopper's tensor cores, of which m * G, theta * G and G itself are
// written without G in between. kernels/triton_matmul.py has the same for other devices and types. What the writing reads
// is brought to the L2 cache while the tile is multiplied. Nothing is multiplied while a tile is written.
#include <algorithm>

#include "hopper.h"

namespace sparsebilevel {
namespace {

constexpr int kRows = 2 * kSide, kCols = 4 * kSide;  // of a tile of the result, which a block has
constexpr int kGradThreads = 2 * kGroup + 32;        // two that multiply, half of the rows each, and a warp that loads
[[maybe_unused]] constexpr int kTall = 8;            // tiles one above the other before the next ones beside them
// Steps up to which what the writing reads is prefetched. With 1024 rows it takes 1.16 times as long without, with 8192
// rows 1.02 times as long with it (H200).
[[maybe_unused]] constexpr int kFew = 64;
constexpr int kGradStages = 4;
[[maybe_unused]] constexpr int kLine = 128;          // bytes of a line of the cache

struct GradShared {
  uint8_t dy[kGradStages][kRows / kSide][kTileBytes], x[kGradStages][kCols / kSide][kTileBytes];
  Barrier full[kGradStages], empty[kGradStages];
};
static_assert(sizeof(GradShared) + 1024 <= kSharedLimit);

template <class Weight>
struct GradArguments {
  const Weight* weight;
  const uint8_t* mask;
  Weight* grad_weight;           // each of the three null if it is not wanted
  float *grad_scores, *sink;
  int t, n, k;

  __host__ __device__ int tiles_down() const { return (n + kRows - 1) / kRows; }
  __host__ __device__ int tiles_across() const { return (k + kCols - 1) / kCols; }
};

// Has a warp bring rows of weight and mask, from `row` on, to the L2 cache: of the tile that begins at column `col`.
template <class Weight>
__device__ inline void prefetch_rows(const GradArguments<Weight>& a, int row, int end, int col, int lane) {
  constexpr int kInLine = kLine / sizeof(Weight), kLines = 8;  // at most, of a row
  const int from = lane % kLines * kInLine, of_mask = lane % kLines * kLine;
  for (row += lane / kLines; row < min(end, a.n); row += 32 / kLines) {
    const int64_t at = static_cast<int64_t>(row) * a.k + col;
    if (a.grad_scores && from < min(kCols, a.k - col)) prefetch(a.weight + at + from);
    if (a.grad_weight && of_mask < min(kCols, a.k - col)) prefetch(a.mask + at + of_mask);
  }
}

// Four elements in a row, read or written once.
template <class Element>
__device__ inline float4 load_four(const Element* from) {
  if constexpr (std::is_same_v<Element, float>) {
    return __ldcs(reinterpret_cast<const float4*>(from));
  } else {
    const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(from));
    const int type = std::is_same_v<Element, __half> ? 0 : 1;
    return {value_of(&bits, type, 0), value_of(&bits, type, 1), value_of(&bits, type, 2), value_of(&bits, type, 3)};
  }
}
template <class Element>
__device__ inline void store_four(Element* to, float4 values) {
  if constexpr (std::is_same_v<Element, float>) {
    __stcs(reinterpret_cast<float4*>(to), values);
  } else {
    __stcs(reinterpret_cast<uint2*>(to),
           make_uint2(pack<Element>(values.x, values.y), pack<Element>(values.z, values.w)));
  }
}

// First row and column of a tile of the result: groups of kTall rows of tiles, in which columns of them come in turn, so
// that blocks which run at the same time load much the same.
template <class Weight>
__device__ inline int2 corner(const GradArguments<Weight>& a, int unit) {
  const int begin = unit / (kTall * a.tiles_across()) * kTall, height = min(a.tiles_down() - begin, kTall);
  const int within = unit - begin * a.tiles_across();
  return {(begin + within % height) * kRows, within / height * kCols};
}

template <class Element, class Weight>
__global__ void __launch_bounds__(kGradThreads, 1)
    weight_grad(const __grid_constant__ CUtensorMap dy, const __grid_constant__ CUtensorMap x,
                const GradArguments<Weight> arguments) {
#ifdef SPARSEBILEVEL_SM90
  GradShared& shared = shared_memory<GradShared>();
  const int warp = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kGradStages; ++i) shared.full[i].init(1), shared.empty[i].init(8);
    fence_barriers();
  }
  __syncthreads();
  const int units = arguments.tiles_down() * arguments.tiles_across(), steps = (arguments.t + kSide - 1) / kSide;
  Place place;

  if (warp == 8) {
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      const int2 at = corner(arguments, unit);
      for (int step = 0; step < steps; ++step) {
        if (lane == 0) {
          shared.empty[place.stage].wait(place.phase ^ 1);
          Barrier& full = shared.full[place.stage];
          full.arrive_and_expect((kRows + kCols) / kSide * kTileBytes);
          for (int i = 0; i < kRows / kSide; ++i) {
            load_box(shared.dy[place.stage][i], dy, step * kSide, at.x + i * kSide, full);
          }
          for (int i = 0; i < kCols / kSide; ++i) {
            load_box(shared.x[place.stage][i], x, step * kSide, at.y + i * kSide, full);
          }
        }
        __syncwarp();
        if (steps <= kFew) {
          prefetch_rows(arguments, at.x + kRows * step / steps, at.x + kRows * (step + 1) / steps, at.y, lane);
        }
        place.advance(kGradStages);
      }
    }
    return;
  }

  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    float sums[kCols / 2];
    int step = 0, add = 0;
    do {
      shared.full[place.stage].wait(place.phase);
      const uint64_t left = operand(shared.dy[place.stage][warp / 4]), right = operand(shared.x[place.stage]);
      begin_multiplying();
#pragma unroll
      for (int i = 0; i < kSide / 16; ++i) {
        multiply<Element, kCols, true, true>(sums, left + i * kNext16<true>, right + i * kNext16<true>, add);
        add = 1;
      }
      end_multiplying();
      wait_for_products();  // the other warpgroup's keep the tensor cores busy
      if (lane == 0) shared.empty[place.stage].arrive();
      place.advance(kGradStages);
    } while (++step < steps);
    take(sums);

    // A lane has two columns of each eight, of a row and of the eighth after it. It gives its neighbour those of every
    // other eight, and so has four side by side: of columns 0 to 3 or 4 to 7 of the first, or of the second eight.
    const int2 at = corner(arguments, unit);
    const bool is_odd = lane & 1;
    const int row = at.x + warp * 16 + lane / 4, col = at.y + 8 * is_odd + 4 * (lane % 4 / 2);
    int64_t from = static_cast<int64_t>(row) * arguments.k + col;
    const int64_t below = 8 * static_cast<int64_t>(arguments.k);
    // Those of the next sixteen are on their way before the stores of these, behind which the compiler leaves loads.
    constexpr int kAhead = 1;
    float4 theta[kAhead + 1][2];
    uint32_t keep[kAhead + 1][2];
    auto is_inside = [&](int i, int j) { return row + 8 * i < arguments.n && col + 16 * j < arguments.k; };
    auto fetch = [&](int j, int64_t place_of) {
#pragma unroll
      for (int i = 0; i < 2; ++i, place_of += below) {
        const bool is_there = is_inside(i, j);
        theta[j % (kAhead + 1)][i] =
            is_there && arguments.grad_scores ? load_four(arguments.weight + place_of) : float4{0, 0, 0, 0};
        keep[j % (kAhead + 1)][i] =
            is_there && arguments.grad_weight ? *reinterpret_cast<const uint32_t*>(arguments.mask + place_of) : 0;
      }
    };
#pragma unroll
    for (int j = 0; j < kAhead; ++j) fetch(j, from + 16 * j);
#pragma unroll
    for (int j = 0; j < kCols / 16; ++j, from += 16) {
      forget(from);  // else all addresses are computed first, and sums go to memory
      if (j + kAhead < kCols / 16) fetch(j + kAhead, from + 16 * kAhead);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* const one = sums + 8 * j + 2 * i;
        const float* const two = one + 4;
        const float low = __shfl_xor_sync(kAll, is_odd ? one[0] : two[0], 1);
        const float high = __shfl_xor_sync(kAll, is_odd ? one[1] : two[1], 1);
        const float4 g = is_odd ? float4{low, high, two[0], two[1]} : float4{one[0], one[1], low, high};
        if (!is_inside(i, j)) continue;
        const int64_t place_of = from + (i ? below : 0);
        const uint32_t kept = keep[j % (kAhead + 1)][i];
        const float4 values = theta[j % (kAhead + 1)][i];
        if (arguments.grad_weight) {
          store_four(arguments.grad_weight + place_of,
                     float4{kept & 0xff ? g.x : 0, kept & 0xff00 ? g.y : 0, kept & 0xff0000 ? g.z : 0,
                            kept & 0xff000000 ? g.w : 0});
        }
        if (arguments.grad_scores) {
          store_four(arguments.grad_scores + place_of,
                     float4{values.x * g.x, values.y * g.y, values.z * g.z, values.w * g.w});
        }
        if (arguments.sink) store_four(arguments.sink + place_of, g);
      }
    }
  }
#endif
}

// -- launch ----------------------------------------------------------------------------------------------------------

template <class Element, class Weight>
cudaError_t run(const void* dy, const void* x, const GradArguments<Weight>& a, int processors, void* stream) {
  const int type = std::is_same_v<Element, __half> ? 0 : 1;
  CUtensorMap of_dy, of_x;
  if (!describe(of_dy, dy, type, a.t, a.n, kSide) || !describe(of_x, x, type, a.t, a.k, kSide)) {
    return cudaErrorInvalidValue;
  }
  const int64_t units = static_cast<int64_t>(a.tiles_down()) * a.tiles_across();
  return launch(weight_grad<Element, Weight>, std::min<int64_t>(units, processors), kGradThreads,
                sizeof(GradShared) + 1024, stream, of_dy, of_x, a);
}

}  // namespace
}  // namespace sparsebilevel

using namespace sparsebilevel;

// Of G = dy [t, n].T @ x [t, k], both of 16 bits (type 0: float16, 1: bfloat16): mask * G in grad_weight, weight * G in
// grad_scores, float32, and G in sink, float32; each unless it is null. weight and grad_weight are float32 if
// weight_type is 2, else of `type`. All at multiples of 16 bytes, n and k multiples of 8, t at least 1.
SPARSEBILEVEL_API sparsebilevel_weight_grad(const void* dy, const void* x, const void* weight, const uint8_t* mask,
                                            void* grad_weight, float* grad_scores, float* sink, int t, int n, int k,
                                            int type, int weight_type, int processors, void* stream) {
  auto run_as = [&](auto element, auto of_weight) {
    using Weight = decltype(of_weight);
    const GradArguments<Weight> arguments{static_cast<const Weight*>(weight), mask, static_cast<Weight*>(grad_weight),
                                          grad_scores, sink, t, n, k};
    return run<decltype(element)>(dy, x, arguments, processors, stream);
  };
  if (type == 0) return weight_type == 2 ? run_as(__half{}, float{}) : run_as(__half{}, __half{});
  return weight_type == 2 ? run_as(__nv_bfloat16{}, float{}) : run_as(__nv_bfloat16{}, __nv_bfloat16{});
}
