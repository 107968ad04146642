// The gradient of a dense weight, G = dy.T @ x, on Hopper's tensor cores, of which m * G, theta * G and G itself are
// written without G in between. kernels/triton_matmul.py has the same for other devices and types. Two blocks share a
// multiprocessor: while one writes, which takes about as long as multiplying a thousand rows, the other multiplies.
#include <algorithm>

#include "hopper.h"

namespace sparsebilevel {
namespace {

constexpr int kTile = 2 * kSide;               // of the result, in both directions: those of a block
constexpr int kGradThreads = 2 * kGroup + 32;  // two that multiply, half of the rows each, and a warp that loads
constexpr int kGradBlocks = 2;                 // of a multiprocessor
[[maybe_unused]] constexpr int kTall = 8;      // tiles one above the other before the next ones beside them
constexpr int kGradStages = 3;

struct GradShared {
  uint8_t dy[kGradStages][2][kTileBytes], x[kGradStages][2][kTileBytes];
  Barrier full[kGradStages], empty[kGradStages];
};
static_assert(kGradBlocks * (sizeof(GradShared) + 1024 + 1024) <= kSharedLimit + 1024);  // 1 KiB is the system's

template <class Weight>
struct GradArguments {
  const Weight* weight;
  const uint8_t* mask;
  Weight* grad_weight;           // each of the three null if it is not wanted
  float *grad_scores, *sink;
  int t, n, k;

  __host__ __device__ int tiles_down() const { return (n + kTile - 1) / kTile; }
  __host__ __device__ int tiles_across() const { return (k + kTile - 1) / kTile; }
};

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
  return {(begin + within % height) * kTile, within / height * kTile};
}

template <class Element, class Weight>
__global__ void __launch_bounds__(kGradThreads, kGradBlocks)
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
    if (lane != 0) return;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      const int2 at = corner(arguments, unit);
      for (int step = 0; step < steps; ++step) {
        shared.empty[place.stage].wait(place.phase ^ 1);
        Barrier& full = shared.full[place.stage];
        full.arrive_and_expect(4 * kTileBytes);
        for (int half = 0; half < 2; ++half) {
          load_box(shared.dy[place.stage][half], dy, step * kSide, at.x + half * kSide, full);
          load_box(shared.x[place.stage][half], x, step * kSide, at.y + half * kSide, full);
        }
        place.advance(kGradStages);
      }
    }
    return;
  }

  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    float sums[kTile / 2];
    int step = 0, add = 0;
    do {
      shared.full[place.stage].wait(place.phase);
      const uint64_t left = operand(shared.dy[place.stage][warp / 4]), right = operand(shared.x[place.stage]);
      begin_multiplying();
#pragma unroll
      for (int i = 0; i < kSide / 16; ++i) {
        multiply<Element, kTile, true, true>(sums, left + i * kNext16<true>, right + i * kNext16<true>, add);
        add = 1;
      }
      end_multiplying();
      wait_for_products();  // other warpgroups' keep the tensor cores busy
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
#pragma unroll
    for (int j = 0; j < kTile / 16; ++j, from += 16) {
      forget(from);  // else all addresses are computed first, and sums go to memory
      float4 theta[2];
      uint32_t keep[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool is_inside = row + 8 * i < arguments.n && col + 16 * j < arguments.k;
        const int64_t place_of = from + (i ? 8 * static_cast<int64_t>(arguments.k) : 0);
        theta[i] = is_inside && arguments.grad_scores ? load_four(arguments.weight + place_of) : float4{0, 0, 0, 0};
        keep[i] = is_inside && arguments.grad_weight
                      ? *reinterpret_cast<const uint32_t*>(arguments.mask + place_of)
                      : 0;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* const one = sums + 8 * j + 2 * i;
        const float* const two = one + 4;
        const float low = __shfl_xor_sync(kAll, is_odd ? one[0] : two[0], 1);
        const float high = __shfl_xor_sync(kAll, is_odd ? one[1] : two[1], 1);
        const float4 g = is_odd ? float4{low, high, two[0], two[1]} : float4{one[0], one[1], low, high};
        if (row + 8 * i >= arguments.n || col + 16 * j >= arguments.k) continue;
        const int64_t place_of = from + (i ? 8 * static_cast<int64_t>(arguments.k) : 0);
        if (arguments.grad_weight) {
          store_four(arguments.grad_weight + place_of,
                     float4{keep[i] & 0xff ? g.x : 0, keep[i] & 0xff00 ? g.y : 0, keep[i] & 0xff0000 ? g.z : 0,
                            keep[i] & 0xff000000 ? g.w : 0});
        }
        if (arguments.grad_scores) {
          store_four(arguments.grad_scores + place_of,
                     float4{theta[i].x * g.x, theta[i].y * g.y, theta[i].z * g.z, theta[i].w * g.w});
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
  return launch(weight_grad<Element, Weight>, std::min<int64_t>(units, kGradBlocks * processors), kGradThreads,
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
