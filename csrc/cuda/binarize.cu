// The k largest of n scores as a boolean mask, exactly: the algorithm of csrc/cpu/binarize.cpp for a GPU. Scores become
// integer keys of the same order. A sample gives a narrow window of keys, which holds the k-th largest but for a chance
// of one in thousands. One read of all scores splits them at the window, into bits: above it, inside it; the keys
// inside, two or three in a hundred, are kept beside them. The counts prove that the window was right, or say on which
// side to look. Histograms narrow it down to one key, of the keys that were kept or, where these are no small part of a
// chunk, of its scores. The mask follows from the bits.
//
// Nothing waits for the host: the launches are the same whatever the scores are, and each sees on the device whether
// anything is left to do. Every buffer has the size that it can need. Only integers are counted, and chance decides no
// more than how long it takes: the result is exact, and the same in every run. Equal scores go to the smaller index, in
// a list of tensors to the earlier one; -0 equals +0; NaNs rank below all others and are counted.
#include "device.h"

namespace sparsebilevel {
namespace {

constexpr int kBinsEach = 8, kBins = kBinsEach * kThreads, kRounds = 3;  // 2048^3 > 2^32
constexpr int kSlots = 128;                                              // keys that are kept of a chunk
constexpr int kSampleThreads = 1024, kSamplesEach = 8, kSamples = kSampleThreads * kSamplesEach;
constexpr int kShortRow = 16;  // a thread ranks a row up to that length; as SHORT_ROW in kernels/cuda.py

struct Float32 {
  using Bits = uint32_t;
  static constexpr uint32_t kInfinity = 0x7f800000;
  __device__ static float value(uint32_t bits) { return __uint_as_float(bits); }
};
struct Float16 {
  using Bits = uint16_t;
  static constexpr uint32_t kInfinity = 0x7c00;
  __device__ static float value(uint32_t bits) { return half_to_float(static_cast<uint16_t>(bits)); }
};
struct BFloat16 {
  using Bits = uint16_t;
  static constexpr uint32_t kInfinity = 0x7f80;
  __device__ static float value(uint32_t bits) { return __uint_as_float(bits << 16); }
};

template <class Type>
constexpr uint32_t kSign = 1u << (8 * sizeof(typename Type::Bits) - 1);
template <class Type>
constexpr uint32_t kGreatest = 2 * (kSign<Type> - 1) + 1;

// Greater for greater scores, equal for both zeros, and 0 for NaN, which is less than that of -inf.
template <class Type>
__device__ uint32_t to_key(uint32_t bits) {
  const uint32_t magnitude = bits & (kSign<Type> - 1);
  if (magnitude > Type::kInfinity) return 0;
  return bits & kSign<Type> ? kSign<Type> - magnitude : kSign<Type> + magnitude;
}

// The score of a key; -inf for the keys below its own, which no score has.
template <class Type>
__device__ float to_value(uint32_t key) {
  if (key >= kSign<Type>) return Type::value(key - kSign<Type>);
  const uint32_t magnitude = kSign<Type> - key;
  return Type::value(kSign<Type> | (magnitude < Type::kInfinity ? magnitude : Type::kInfinity));
}

// Keys [low, high], which hold the k-th largest: `above` scores have larger keys and `inside` have keys in between.
struct Window {
  uint32_t low, high, above, inside;
};

// Bins of equal width of a window.
struct Bins {
  uint32_t low, range;
  int shift;

  __device__ explicit Bins(const Window& w) : low(w.low), range(w.high - w.low), shift(0) {
    while (range >> shift >= static_cast<uint32_t>(kBins)) ++shift;
  }
  __device__ bool holds(uint32_t key) const { return key - low <= range; }
  __device__ uint32_t bin(uint32_t key) const { return (key - low) >> shift; }
  __device__ Window window(uint32_t bin, uint32_t above, uint32_t inside) const {
    const uint32_t first = bin << shift, last = first + ((1u << shift) - 1);
    return {low + first, low + (last < range ? last : range), above, inside};
  }
};

// The bin with the k-th largest, found by a whole block from the counts [kBins] of all.
__device__ Window holding(const Window& w, uint32_t k, const uint32_t* counts) {
  SPARSEBILEVEL_SHARED(found, Window);
  SPARSEBILEVEL_SHARED(sums, uint32_t[kWarps]);
  const int last = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsEach;  // bins in descending order
  uint32_t own[kBinsEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) own[i] = counts[last - i];
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) sum += own[i];
  uint32_t above = warp_prefix(sum);
  if (lane_id() == kLanes - 1) sums[warp_id()] = above + sum;
  __syncthreads();
  for (int i = 0; i < warp_id(); ++i) above += sums[i];
  above += w.above;
  if (above < k && k <= above + sum) {
#pragma unroll
    for (int i = 0; i < kBinsEach; ++i) {
      if (above < k && k <= above + own[i]) found = Bins(w).window(static_cast<uint32_t>(last - i), above, own[i]);
      above += own[i];
    }
  }
  __syncthreads();
  return found;  // a next call writes it after a barrier
}

// Narrows a window until it is one key, or all of its scores belong to the k largest, for a whole block. `each(f)`
// calls f(key) for this thread's part of the scores; counts [kBins] are shared memory.
template <class Each>
__device__ Window select(Window w, uint32_t k, Each each, uint32_t* counts) {
  while (w.low < w.high && w.above + w.inside != k) {
    const Bins bins(w);
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) counts[i] = 0;
    __syncthreads();
    each([&](uint32_t key) {
      if (bins.holds(key)) atomicAdd(&counts[bins.bin(key)], 1u);
    });
    __syncthreads();
    w = holding(w, k, counts);
  }
  return w;
}

// Sum over the kGroup threads that share a row: eight lanes, of at most 255 together, a warp, or a whole block.
template <int kGroup>
__device__ uint32_t group_sum(uint32_t value, [[maybe_unused]] int turn) {
  if constexpr (kGroup < kLanes) {
    static_assert(kGroup == 8, "a byte of the sum for each of the rows");
    const int shift = lane_id() / kGroup * 8;
    return __reduce_add_sync(kAll, value << shift) >> shift & 0xff;
  } else if constexpr (kGroup == kLanes) {
    return __reduce_add_sync(kAll, value);
  } else {
    SPARSEBILEVEL_SHARED(sums, uint32_t[2][kLanes]);
    value = __reduce_add_sync(kAll, value);
    if (lane_id() == 0) sums[turn % 2][warp_id()] = value;  // those of the turn before may still be read
    __syncthreads();
    return __reduce_add_sync(kAll, lane_id() < kGroup / kLanes ? sums[turn % 2][lane_id()] : 0);
  }
}

// As `select`, for keys in registers: halves the window, and counts. Of `keys` the first `used` are looked at, a
// multiple of 4; keys of 0 may fill up what is there. Not in a branch that others of the group do not take.
template <int kGroup, int kEach>
__device__ Window bisect(Window w, uint32_t k, const uint32_t (&keys)[kEach], int used) {
  for (int turn = 0;; ++turn) {
    const bool found = w.low == w.high || w.above + w.inside == k;
    if (kGroup < kLanes ? __ballot_sync(kAll, !found) == 0 : found) break;
    const uint32_t middle = w.low + (w.high - w.low) / 2;
    uint32_t larger = 0;
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      if (i >= used) break;
#pragma unroll
      for (int j = i; j < i + 4; ++j) larger += keys[j] > middle;
    }
    larger = group_sum<kGroup>(larger, turn);
    if (found) continue;
    if (larger >= k)
      w = {middle + 1, w.high, w.above, larger - w.above};
    else
      w = {w.low, middle, larger, w.above + w.inside - larger};
  }
  if (kGroup > kLanes) __syncthreads();  // a next call begins with the first turn
  return w;
}

// -- the k largest of a list ------------------------------------------------------------------------------------------

struct Tensor {
  const void* scores;
  uint8_t* mask;
  uint32_t* words;
  int64_t* counts;
  int64_t size, first_chunk, offset;  // of its first position among all
};

struct State {
  Window window[kRounds + 1];  // sampled; then what each round began with
  uint32_t k;
  uint32_t misled;             // the window sampled does not hold the k-th largest
  unsigned long long total;    // a Pair: scores above the window sampled, and inside
};

struct Problem {
  const Tensor* tensors;
  int num_tensors;
  int rounds, warp_chunks;
  int64_t size, chunks, blocks;
  const int64_t* k_pointer;  // or null: k
  int64_t k;
  int32_t* errors;             // [num_tensors + 2]: NaNs of each; whether k was out of range; whether all is well
  State* state;
  uint32_t* histograms;        // [kRounds, kBins]
  unsigned long long* totals;  // [blocks]
  uint32_t* chunk_counts;      // [chunks]: Pairs of above and inside
  uint32_t* inside;            // [chunks, kLanes]: bits
  uint32_t* keys;              // [chunks, kSlots]
};

// Walks a warp through its chunks.
struct Walk {
  const Problem& p;
  int64_t chunk, end;
  int tensor = -1;

  __device__ explicit Walk(const Problem& problem)
      : p(problem), chunk(first_chunk(problem.warp_chunks)), end(0) {
    const int64_t last = chunk + p.warp_chunks;
    end = last < p.chunks ? last : p.chunks;
    if (chunk < end) tensor = find(chunk);
  }
  __device__ int find(int64_t of) const {  // the last tensor that begins there or before, which is not empty
    int low = 0, high = p.num_tensors - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (p.tensors[middle].first_chunk <= of)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
  __device__ bool more() const { return chunk < end; }
  __device__ void next() {
    ++chunk;
    while (tensor + 1 < p.num_tensors && p.tensors[tensor + 1].first_chunk <= chunk) ++tensor;
  }
  __device__ const Tensor& in() const { return p.tensors[tensor]; }
  __device__ int64_t begin() const { return (chunk - in().first_chunk) * kChunk; }
  __device__ int size() const {
    const int64_t rest = in().size - begin();
    return rest < kChunk ? static_cast<int>(rest) : kChunk;
  }
  __device__ uint32_t* words() const { return in().words + begin() / 32; }
};

// The table of tensors travels as arguments of launches: a copy from the host would have to outlive a captured graph.
struct Piece {
  static constexpr int kSize = 480;
  int64_t values[kSize];
};

__device__ void store_piece(const Piece& piece, int64_t* to, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) to[i] = piece.values[i];
}
__global__ void upload(const __grid_constant__ Piece piece, int64_t* to, int count) { store_piece(piece, to, count); }

// Where a sample puts the k-th largest, give or take four standard deviations; and zeros for the counts to come. One
// score is drawn from each of equal stretches, at a place that is as good as random. One block. Of the table it uploads
// the last piece itself, which is all of most lists.
template <class Type>
__global__ void __launch_bounds__(kSampleThreads, 1) sample(Problem p, const __grid_constant__ Piece piece, int64_t* to,
                                                         int piece_size) {
  using Bits = typename Type::Bits;
  const int thread = static_cast<int>(threadIdx.x);
  store_piece(piece, to, piece_size);
  for (int i = thread; i < kRounds * kBins; i += kSampleThreads) p.histograms[i] = 0;
  for (int i = thread; i < p.num_tensors; i += kSampleThreads) p.errors[i] = 0;

  const int64_t asked = p.k_pointer ? *p.k_pointer : p.k;
  const int64_t k = asked < 0 ? 0 : asked > p.size ? p.size : asked;
  const int count = p.size < kSamples ? static_cast<int>(p.size) : kSamples;
  const auto stretch = [&](int64_t i) { return i * (p.size / count) + (i < p.size % count ? i : p.size % count); };
  uint32_t keys[kSamplesEach];
  __syncthreads();  // the table
#pragma unroll
  for (int i = 0; i < kSamplesEach; ++i) {
    const int64_t at = i * kSampleThreads + thread;
    keys[i] = 0;
    if (at >= count) continue;
    const int64_t first = stretch(at), length = stretch(at + 1) - first;
    const uint64_t random = static_cast<uint64_t>(at + 1) * 0x9e3779b97f4a7c15u >> 33;  // 31 bits
    const int64_t position = first + static_cast<int64_t>(random * static_cast<uint64_t>(length) >> 31);
    int low = 0, high = p.num_tensors - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (p.tensors[middle].offset <= position)
        low = middle;
      else
        high = middle - 1;
    }
    const Tensor& t = p.tensors[low];
    keys[i] = to_key<Type>(static_cast<const Bits*>(t.scores)[position - t.offset]);
  }

  Window w{0, kGreatest<Type>, 0, 0};
  const auto ranked = [&](int64_t rank) {
    const Window everything{0, kGreatest<Type>, 0, static_cast<uint32_t>(count)};
    return bisect<kSampleThreads>(everything, static_cast<uint32_t>(rank), keys, kSamplesEach);
  };
  if (k == 0) {
    w.low = w.high;  // which no score has
  } else {
    const double share = static_cast<double>(k) / static_cast<double>(p.size), expected = share * count;
    const double error = count == p.size ? 0 : 4 * sqrt(expected * (1 - share)) + 2;
    // Ranks in descending order, counted from 1.
    const int64_t first = count == p.size ? k : static_cast<int64_t>(ceil(expected - error));
    const int64_t last = count == p.size ? k : static_cast<int64_t>(ceil(expected + error));
    if (first >= 1) w.high = ranked(first).high;
    if (last <= count) w.low = ranked(last).low;
  }
  if (thread == 0) {
    p.errors[p.num_tensors] = asked != k;
    p.state->k = static_cast<uint32_t>(k);
    p.state->total = 0;
    p.state->window[0] = w;
  }
}

// Eight scores of a chunk; false for those beyond its end.
template <class Bits>
__device__ uint32_t load(const Bits* scores, int begin, int size, bool aligned, uint32_t (&bits)[8]) {
  if (aligned && begin + 8 <= size) {
    constexpr int kVectors = 8 * sizeof(Bits) / sizeof(uint4);
    const uint4* vectors = reinterpret_cast<const uint4*>(scores + begin);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint4 vector = vectors[v];
      const uint32_t parts[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (sizeof(Bits) == 4) {
          bits[(4 * v + i) % 8] = parts[i];
        } else {
          bits[2 * i] = parts[i] & 0xffff;
          bits[2 * i + 1] = parts[i] >> 16;
        }
      }
    }
    return 0xff;
  }
  uint32_t valid = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    bits[i] = begin + i < size ? scores[begin + i] : 0;
    valid |= static_cast<uint32_t>(begin + i < size) << i;
  }
  return valid;
}

struct Bytes {  // of the bits of a chunk
  uint32_t above[kLanes], inside[kLanes];
};

// Calls f(scores, valid, i) for this lane's eight scores of each quarter of a chunk.
template <class Type, class F>
__device__ void for_scores(const Walk& walk, F f) {
  using Bits = typename Type::Bits;
  const Bits* scores = static_cast<const Bits*>(walk.in().scores) + walk.begin();
  const bool aligned = reinterpret_cast<uintptr_t>(scores) % sizeof(uint4) == 0;
  const int size = walk.size();
#pragma unroll
  for (int half = 0; half < 4; half += 2) {  // four reads of 16 bytes are under way at a time
    uint32_t bits[2][8], valid[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      valid[i] = load(scores, 8 * (kLanes * (half + i) + lane_id()), size, aligned, bits[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) f(bits[i], valid[i], half + i);
  }
}

// Splits a chunk at keys [low, high], for a whole warp: each lane gets its word. Returns this lane's NaNs. Scores are
// compared as numbers, in half the instructions that their keys take; keys decide where that could differ.
template <class Type>
__device__ int split_chunk(const Walk& walk, uint32_t low, uint32_t high, Bytes& bytes, uint32_t& above,
                           uint32_t& inside) {
  using Bits = typename Type::Bits;
  const float least = to_value<Type>(low), most = to_value<Type>(high);
  bool is_special = high < kSign<Type> - Type::kInfinity;  // less than any number
  const auto store = [&](int i, uint32_t is_above, uint32_t is_inside) {
    reinterpret_cast<uint8_t*>(bytes.above)[kLanes * i + lane_id()] = static_cast<uint8_t>(is_above);
    reinterpret_cast<uint8_t*>(bytes.inside)[kLanes * i + lane_id()] = static_cast<uint8_t>(is_inside);
  };
  for_scores<Type>(walk, [&](const uint32_t(&bits)[8], uint32_t valid, int i) {
    uint32_t is_above = 0, is_inside = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float score = Type::value(bits[j]);
      is_above |= static_cast<uint32_t>(score > most) << j;
      is_inside |= static_cast<uint32_t>(score >= least) << j;
      is_special |= score != score;
    }
    store(i, is_above & valid, is_inside & ~is_above & valid);
  });
  int nans = 0;
  if (is_special) {
    const Bits* scores = static_cast<const Bits*>(walk.in().scores) + walk.begin();
    const int size = walk.size();
    for (int i = 0; i < 4; ++i) {
      uint32_t is_above = 0, is_inside = 0;
      const int begin = 8 * (kLanes * i + lane_id());
      for (int at = begin; at < begin + 8 && at < size; ++at) {
        const uint32_t key = to_key<Type>(scores[at]);
        is_above |= static_cast<uint32_t>(key > high) << (at - begin);
        is_inside |= static_cast<uint32_t>(key - low <= high - low) << (at - begin);
        nans += key == 0;
      }
      store(i, is_above, is_inside);
    }
  }
  __syncwarp();
  above = bytes.above[lane_id()];
  inside = bytes.inside[lane_id()];
  __syncwarp();  // before a next call writes
  return nans;
}

// Stores the words of a chunk, and returns their counts.
__device__ Pair store_chunk(const Problem& p, const Walk& walk, uint32_t above, uint32_t inside) {
  if (lane_id() < words_of(walk.size())) walk.words()[lane_id()] = above;
  p.inside[walk.chunk * kLanes + lane_id()] = inside;
  const Pair pair{__reduce_add_sync(kAll, static_cast<uint32_t>(__popc(above))),
                  __reduce_add_sync(kAll, static_cast<uint32_t>(__popc(inside)))};
  if (lane_id() == 0) p.chunk_counts[walk.chunk] = pack_chunk(pair);
  return pair;
}

// The read of all scores.
template <class Type>
__global__ void __launch_bounds__(kThreads, 4) split(Problem p) {
  using Bits = typename Type::Bits;
  SPARSEBILEVEL_SHARED(bytes, Bytes[kWarps]);
  SPARSEBILEVEL_SHARED(total, unsigned long long);
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  const Window w = p.state->window[0];
  Pair sum{0, 0};
  for (Walk walk(p); walk.more(); walk.next()) {
    uint32_t above, inside;
    const int nans = split_chunk<Type>(walk, w.low, w.high, bytes[warp_id()], above, inside);
    if (nans) atomicAdd(&p.errors[walk.tensor], nans);
    const Pair pair = store_chunk(p, walk, above, inside);
    sum.certain += pair.certain;
    sum.ties += pair.ties;
    if (w.low < w.high && pair.ties <= kSlots) {
      const Bits* scores = static_cast<const Bits*>(walk.in().scores) + walk.begin() + 32 * lane_id();
      uint32_t* keys = p.keys + walk.chunk * kSlots + warp_prefix(static_cast<uint32_t>(__popc(inside)));
      for (uint32_t rest = inside; rest; rest &= rest - 1) *keys++ = to_key<Type>(scores[__ffs(rest) - 1]);
    }
  }
  if (lane_id() == 0) atomicAdd(&total, pack_total(sum));
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&p.state->total, total);
}

// The window after `round` rounds, for a whole block.
template <class Type>
__device__ Window window_after(const Problem& p, int round, bool& misled) {
  const uint32_t k = p.state->k;
  if (round > 0) {
    misled = p.state->misled;
    const Window w = p.state->window[round];
    return w.low < w.high ? holding(w, k, p.histograms + (round - 1) * kBins) : w;
  }
  Window w = p.state->window[0];
  const Pair total = unpack_total(p.state->total);
  w.above = total.certain;
  w.inside = total.ties;
  const bool larger = k > 0 && k <= w.above, smaller = k > w.above + w.inside;
  if (larger) w = {w.high + 1, kGreatest<Type>, 0, w.above};
  if (smaller) w = {0, w.low - 1, w.above + w.inside, static_cast<uint32_t>(p.size) - w.above - w.inside};
  misled = larger || smaller;
  return w;
}

// A histogram of the keys inside the window, for the next round.
template <class Type>
__global__ void __launch_bounds__(kThreads, 4) count(Problem p, int round) {
  SPARSEBILEVEL_SHARED(counts, uint32_t[kBins]);
  bool misled;
  const Window w = window_after<Type>(p, round, misled);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    // Nobody reads this before the next launch.
    p.state->window[round + 1] = w;
    if (round == 0) p.state->misled = misled;
  }
  if (w.low == w.high) return;
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) counts[i] = 0;
  __syncthreads();
  const Bins bins(w);
  const auto add = [&](uint32_t key) {
    if (bins.holds(key)) atomicAdd(&counts[bins.bin(key)], 1u);
  };
  for (Walk walk(p); walk.more(); walk.next()) {
    const int inside = static_cast<int>(unpack_chunk(p.chunk_counts[walk.chunk]).ties);
    if (misled || inside > kSlots) {
      for_scores<Type>(walk, [&](const uint32_t(&bits)[8], uint32_t valid, int) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (valid >> j & 1) add(to_key<Type>(bits[j]));
      });
    } else {
      for (int i = lane_id(); i < inside; i += kLanes) add(p.keys[walk.chunk * kSlots + i]);
    }
  }
  __syncthreads();
  uint32_t* histogram = p.histograms + round * kBins;
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads)
    if (counts[i]) atomicAdd(&histogram[i], counts[i]);
}

// The bits at the threshold: those equal to it are then inside.
template <class Type>
__global__ void __launch_bounds__(kThreads, 4) settle(Problem p) {
  SPARSEBILEVEL_SHARED(bytes, Bytes[kWarps]);
  bool misled;
  const Window sampled = p.state->window[0], w = window_after<Type>(p, p.rounds, misled);
  const uint32_t threshold = w.low;
  Pair sum{0, 0};
  for (Walk walk(p); walk.more(); walk.next()) {
    Pair pair = unpack_chunk(p.chunk_counts[walk.chunk]);
    if (misled || (sampled.low < sampled.high && pair.ties > 0)) {
      uint32_t above, inside;
      if (misled || pair.ties > kSlots) {
        split_chunk<Type>(walk, threshold, threshold, bytes[warp_id()], above, inside);
      } else {
        above = lane_id() < words_of(walk.size()) ? walk.words()[lane_id()] : 0;
        inside = p.inside[walk.chunk * kLanes + lane_id()];
        const uint32_t* keys = p.keys + walk.chunk * kSlots + warp_prefix(static_cast<uint32_t>(__popc(inside)));
        uint32_t first[4];  // nearly always all of a lane: read together
        const int count = __popc(inside);
#pragma unroll
        for (int i = 0; i < 4; ++i) first[i] = i < count ? keys[i] : 0;
        uint32_t rest = inside;
        const auto settle_lowest = [&](uint32_t key) {
          const uint32_t bit = rest & (0 - rest);
          if (key > threshold) above |= bit;
          if (key != threshold) inside &= ~bit;
          rest ^= bit;
        };
#pragma unroll
        for (int i = 0; i < 4; ++i) settle_lowest(first[i]);
        for (int i = 4; rest; ++i) settle_lowest(keys[i]);
      }
      pair = store_chunk(p, walk, above, inside);
    }
    sum.certain += pair.certain;
    sum.ties += pair.ties;
  }
  sum = block_sum(lane_id() == 0 ? sum : Pair{0, 0});
  if (threadIdx.x == 0) p.totals[blockIdx.x] = pack_total(sum);
}

// Bits, bools and counts of what is kept: all above the threshold, and the first of those equal to it.
__global__ void __launch_bounds__(kThreads) write(Problem p) {
  Walk walk(p);
  const int64_t block_chunks = kWarps * p.warp_chunks, first = blockIdx.x * block_chunks;
  const auto before_chunk = [&](int64_t chunk) { return before(p.chunk_counts, p.totals, chunk, p.warp_chunks); };
  const Pair of_block = before_chunk(first), of_tensor = before_chunk(p.tensors[walk.find(first)].first_chunk);
  const uint32_t ties = p.state->k - before_chunk(p.blocks * block_chunks).certain;
  const auto within = [&](int64_t chunk) {
    const Pair sum = sum_chunks(p.chunk_counts, first, chunk);
    return Pair{of_block.certain + sum.certain, of_block.ties + sum.ties};
  };
  const auto kept = [&](Pair pair) { return pair.certain + (pair.ties < ties ? pair.ties : ties); };
  if (blockIdx.x == 0 && warp_id() == 0) {
    uint32_t errors = 0;
    for (int i = lane_id(); i <= p.num_tensors; i += kLanes) errors += p.errors[i] != 0;
    errors = __reduce_add_sync(kAll, errors);
    if (lane_id() == 0) p.errors[p.num_tensors + 1] = errors == 0;
  }
  Pair so_far = walk.more() ? within(walk.chunk) : Pair{0, 0}, begin{0, 0};
  for (int tensor = -1; walk.more(); walk.next()) {
    const Tensor& t = walk.in();
    if (tensor != walk.tensor) begin = t.first_chunk < first ? of_tensor : within(t.first_chunk);
    tensor = walk.tensor;
    const int size = walk.size();
    uint32_t word = lane_id() < words_of(size) ? walk.words()[lane_id()] : 0;
    const uint32_t inside = p.inside[walk.chunk * kLanes + lane_id()];
    const uint32_t rank = so_far.ties + warp_prefix(static_cast<uint32_t>(__popc(inside)));
    if (rank < ties) word |= lowest_bits(inside, ties - rank < 32 ? static_cast<int>(ties - rank) : 32);
    if (lane_id() < words_of(size)) walk.words()[lane_id()] = word;
    write_mask(word, t.mask + walk.begin(), size);
    int64_t* counts = t.counts + (walk.chunk - t.first_chunk);
    if (lane_id() == 0) counts[0] = kept(so_far) - kept(begin);
    const Pair pair = unpack_chunk(p.chunk_counts[walk.chunk]);
    so_far.certain += pair.certain;
    so_far.ties += pair.ties;
    if (lane_id() == 0 && walk.begin() + size == t.size) counts[1] = kept(so_far) - kept(begin);
  }
}

// -- the k largest of each row ----------------------------------------------------------------------------------------

struct Rows {
  const void* scores;  // [outer, length, inner]
  int64_t outer, length, inner;
  const int64_t* k_pointer;
  int64_t k;
  uint8_t* mask;
  int32_t* errors;  // [3]: NaNs; whether k was out of range; whether neither was so

  __device__ int64_t checked_k() const {
    const int64_t asked = k_pointer ? *k_pointer : k, used = asked < 0 ? 0 : asked > length ? length : asked;
    if (asked != used && blockIdx.x == 0 && threadIdx.x == 0) {
      errors[1] = 1;
      errors[2] = 0;
    }
    return used;
  }
  __device__ void count_nans(int nans) const {
    if (nans == 0) return;
    atomicAdd(&errors[0], nans);
    errors[2] = 0;
  }
};

__global__ void clear_errors(Rows r) {
  if (threadIdx.x < 3) r.errors[threadIdx.x] = threadIdx.x == 2;
}

// What a thread reads or writes at once.
template <class Element, int kLength>
struct alignas(sizeof(Element) * kLength < 16 ? sizeof(Element) * kLength : 16) Vector {
  Element at[kLength];

  __device__ static bool fits(const void* array) { return reinterpret_cast<uintptr_t>(array) % alignof(Vector) == 0; }
};

// A thread ranks a row of at most kLength scores, which are compared with one another.
template <class Type, int kLength>
__global__ void __launch_bounds__(kThreads) rank_rows(Rows r) {
  using Scores = Vector<typename Type::Bits, kLength>;
  using Mask = Vector<uint8_t, kLength>;
  const int k = static_cast<int>(r.checked_k());
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= r.outer * r.inner) return;
  const int length = static_cast<int>(r.length);
  const int64_t offset = row / r.inner * length * r.inner + row % r.inner;
  const auto* scores = static_cast<const typename Type::Bits*>(r.scores) + offset;
  const bool whole = length == kLength && r.inner == 1 && Scores::fits(r.scores) && Mask::fits(r.mask);
  Scores read;
  if (whole) {
    read = *reinterpret_cast<const Scores*>(scores);
  } else {
#pragma unroll
    for (int i = 0; i < kLength; ++i) read.at[i] = i < length ? scores[i * r.inner] : 0;
  }
  uint32_t keys[kLength];
  int ranks[kLength], nans = 0;
#pragma unroll
  for (int i = 0; i < kLength; ++i) {
    keys[i] = i < length ? to_key<Type>(read.at[i]) : 0;
    ranks[i] = 0;
    nans += i < length && keys[i] == 0;
  }
#pragma unroll
  for (int i = 0; i < kLength; ++i) {
#pragma unroll
    for (int j = 0; j < i; ++j) {
      const bool is_first = keys[j] >= keys[i];
      ranks[i] += is_first;
      ranks[j] += !is_first;
    }
  }
  if (whole) {
    Mask mask;
#pragma unroll
    for (int i = 0; i < kLength; ++i) mask.at[i] = ranks[i] < k;
    *reinterpret_cast<Mask*>(r.mask + offset) = mask;
  } else {
#pragma unroll
    for (int i = 0; i < kLength; ++i)
      if (i < length) r.mask[offset + i * r.inner] = ranks[i] < k;
  }
  r.count_nans(nans);
}

// A group of threads, a part of a warp, a warp or a block, has a row in its registers; inner is 1.
template <class Type, int kGroup, int kEach>
__global__ void __launch_bounds__(kThreads) bisect_rows(Rows r) {
  using Bits = typename Type::Bits;
  constexpr int kWidth = kGroup < kLanes ? kGroup : kLanes;
  SPARSEBILEVEL_SHARED(ties_of, uint32_t[kWarps]);
  const auto k = static_cast<uint32_t>(r.checked_k());
  const int length = static_cast<int>(r.length), thread = static_cast<int>(threadIdx.x);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + thread / kGroup;
  const bool has_row = row < r.outer;
  const Bits* scores = static_cast<const Bits*>(r.scores) + row * length;
  uint8_t* mask = r.mask + row * length;

  // A warp has consecutive positions, so that it counts ties in their order.
  const int used = (length + 4 * kGroup - 1) / (4 * kGroup) * 4;
  const int begin = thread % kGroup / kWidth * kWidth * used + thread % kWidth;
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      if (i >= used) break;
#pragma unroll
      for (int j = i; j < i + 4; ++j) f(j, begin + kWidth * j, has_row && begin + kWidth * j < length);
    }
  };
  uint32_t keys[kEach];
  each([&](int i, int at, bool valid) { keys[i] = valid ? scores[at] : 0; });
  int nans = 0;
  each([&](int i, int, bool valid) {
    keys[i] = valid ? to_key<Type>(keys[i]) : 0;
    nans += valid && keys[i] == 0;
  });
  r.count_nans(nans);

  Window w{kGreatest<Type>, kGreatest<Type>, 0, 0};
  if (k > 0 && has_row) w = {0, kGreatest<Type>, 0, static_cast<uint32_t>(length)};
  w = bisect<kGroup>(w, k, keys, used);
  const bool all_fit = w.above + w.inside <= k;
  if (kGroup > kLanes ? all_fit : __ballot_sync(kAll, !all_fit) == 0) {
    each([&](int i, int at, bool valid) {
      if (valid) mask[at] = keys[i] >= w.low;
    });
    return;
  }
  // More scores are equal to the k-th largest than fit: the first of them.
  const auto ties_at = [&](int i, bool valid) {
    return __ballot_sync(kAll, valid && keys[i] - w.low <= w.high - w.low) >> (lane_id() / kWidth * kWidth) &
           (kAll >> (kLanes - kWidth));
  };
  uint32_t taken = w.above;
  if (kGroup > kLanes) {
    uint32_t sum = 0;
    each([&](int i, int, bool valid) { sum += static_cast<uint32_t>(__popc(ties_at(i, valid))); });
    if (lane_id() == 0) ties_of[warp_id()] = sum;
    __syncthreads();
    for (int i = 0; i < warp_id(); ++i) taken += ties_of[i];
  }
  each([&](int i, int at, bool valid) {
    const uint32_t ties = ties_at(i, valid);
    const uint32_t rank = taken + static_cast<uint32_t>(__popc(ties & ((1u << lane_id() % kWidth) - 1)));
    taken += static_cast<uint32_t>(__popc(ties));
    if (valid) mask[at] = keys[i] > w.high || (keys[i] >= w.low && rank < k);
  });
}

// A block selects from a row of any length; inner is 1.
template <class Type>
__global__ void __launch_bounds__(kThreads) select_rows(Rows r) {
  using Bits = typename Type::Bits;
  SPARSEBILEVEL_SHARED(counts, uint32_t[kBins]);
  SPARSEBILEVEL_SHARED(ties_of, int[kWarps]);
  const auto k = static_cast<uint32_t>(r.checked_k());
  const Bits* scores = static_cast<const Bits*>(r.scores) + static_cast<int64_t>(blockIdx.x) * r.length;
  uint8_t* mask = r.mask + static_cast<int64_t>(blockIdx.x) * r.length;
  const auto each = [&](auto f) {
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < r.length; i += kThreads) f(to_key<Type>(scores[i]));
  };
  Window w{kGreatest<Type>, kGreatest<Type>, 0, 0};
  if (k > 0) w = select(Window{0, kGreatest<Type>, 0, static_cast<uint32_t>(r.length)}, k, each, counts);

  // Ties are taken in order. Steps of the whole block, also where only some of its threads have a score.
  uint32_t taken = w.above;
  int nans = 0;
  for (int64_t begin = 0; begin < r.length; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    const uint32_t key = i < r.length ? to_key<Type>(scores[i]) : 0;
    nans += i < r.length && key == 0;
    const bool tie = i < r.length && key - w.low <= w.high - w.low;
    const unsigned ties = __ballot_sync(kAll, tie);
    if (lane_id() == 0) ties_of[warp_id()] = __popc(ties);
    __syncthreads();
    uint32_t rank = taken + static_cast<uint32_t>(__popc(ties & ((1u << lane_id()) - 1)));
    for (int j = 0; j < kWarps; ++j) {
      if (j < warp_id()) rank += static_cast<uint32_t>(ties_of[j]);
      taken += static_cast<uint32_t>(ties_of[j]);
    }
    __syncthreads();
    if (i < r.length) mask[i] = key > w.high || (tie && rank < k);
  }
  r.count_nans(nans);
}

template <class Type>
void launch_rows(const Rows& r, void* stream) {
  SPARSEBILEVEL_LAUNCH(clear_errors, 1, kLanes, stream, r);
  const auto launch = [&](auto kernel, int64_t threads_of_row) {
    SPARSEBILEVEL_LAUNCH(kernel, divide_up(r.outer * r.inner * threads_of_row, kThreads), kThreads, stream, r);
  };
  if (r.length <= 2)
    launch(rank_rows<Type, 2>, 1);
  else if (r.length <= 4)
    launch(rank_rows<Type, 4>, 1);
  else if (r.length <= 8)
    launch(rank_rows<Type, 8>, 1);
  else if (r.length <= kShortRow)
    launch(rank_rows<Type, kShortRow>, 1);
  else if (r.length <= 8 * 8)
    launch(bisect_rows<Type, 8, 8>, 8);
  else if (r.length <= kLanes * 32)
    launch(bisect_rows<Type, kLanes, 32>, kLanes);
  else if (r.length <= kThreads * 16)
    launch(bisect_rows<Type, kThreads, 16>, kThreads);
  else
    launch(select_rows<Type>, kThreads);
}

// -- words of a mask --------------------------------------------------------------------------------------------------

// The word of a lane, of a chunk of the mask.
__device__ uint32_t pack_word(const uint8_t* mask, int64_t size, int64_t begin) {
  uint32_t word = 0;
  if (reinterpret_cast<uintptr_t>(mask) % sizeof(uint4) == 0 && begin + 32 <= size) {
    for (int half = 0; half < 2; ++half) {
      const uint4 bytes = reinterpret_cast<const uint4*>(mask + begin)[half];
      const uint32_t parts[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
      for (int i = 0; i < 4; ++i) {
        const uint32_t ones = (((parts[i] & 0x7f7f7f7f) + 0x7f7f7f7f) | parts[i]) >> 7 & 0x01010101;  // any byte but 0
        word |= (ones * 0x10204080u >> 28) << (16 * half + 4 * i);  // the product brings the bits together
      }
    }
  } else {
    for (int64_t i = begin; i < begin + 32 && i < size; ++i) word |= static_cast<uint32_t>(mask[i] != 0) << (i - begin);
  }
  return word;
}

// Writes the words of a mask, or without one reads them; and counts.
__global__ void __launch_bounds__(kThreads) pack_words(const uint8_t* mask, int64_t size, int warp_chunks,
                                                       uint32_t* words, uint32_t* chunk_counts,
                                                       unsigned long long* totals) {
  Pair sum{0, 0};
  const int64_t first = first_chunk(warp_chunks);
  for (int64_t chunk = first; chunk < first + warp_chunks && chunk * kChunk < size; ++chunk) {
    const int64_t rest = size - chunk * kChunk, at = chunk * kLanes + lane_id();
    const bool has_word = lane_id() < words_of(rest < kChunk ? static_cast<int>(rest) : kChunk);
    uint32_t word = 0;
    if (mask) {
      word = pack_word(mask, size, chunk * kChunk + 32 * lane_id());
      if (has_word) words[at] = word;
    } else if (has_word) {
      word = words[at];
    }
    const Pair pair{__reduce_add_sync(kAll, static_cast<uint32_t>(__popc(word))), 0};
    if (lane_id() == 0) chunk_counts[chunk] = pack_chunk(pair);
    sum.certain += pair.certain;
  }
  sum = block_sum(lane_id() == 0 ? sum : Pair{0, 0});
  if (threadIdx.x == 0) totals[blockIdx.x] = pack_total(sum);
}

// A thread has a chunk of its block, which has at most as many.
__global__ void __launch_bounds__(kThreads) sum_counts(int64_t chunks, int warp_chunks,
                                                       const uint32_t* chunk_counts,
                                                       const unsigned long long* totals, int64_t* counts) {
  SPARSEBILEVEL_SHARED(sums, uint32_t[kWarps]);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps * warp_chunks, chunk = first + threadIdx.x;
  const bool has_chunk = static_cast<int>(threadIdx.x) < kWarps * warp_chunks && chunk < chunks;
  const uint32_t count = has_chunk ? unpack_chunk(chunk_counts[chunk]).certain : 0;
  uint32_t so_far = before(chunk_counts, totals, first, warp_chunks).certain + warp_prefix(count);
  const uint32_t of_warp = __reduce_add_sync(kAll, count);
  if (lane_id() == 0) sums[warp_id()] = of_warp;
  __syncthreads();
  for (int i = 0; i < warp_id(); ++i) so_far += sums[i];
  if (has_chunk) counts[chunk] = so_far;
  if (has_chunk && chunk + 1 == chunks) counts[chunks] = static_cast<int64_t>(so_far) + count;
}

// Is anything in a tile True? A thread looks at a tile, its neighbour at the next words.
__global__ void __launch_bounds__(kThreads) find_tiles(const uint64_t* words, int64_t rows, int64_t cols,
                                                       int64_t tile_rows, int64_t tile_cols, int64_t across,
                                                       int64_t count, uint8_t* tiles) {
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tile >= count) return;
  const int64_t first_row = tile / across * tile_rows, first_col = tile % across * tile_cols;
  const int64_t last_row = first_row + tile_rows < rows ? first_row + tile_rows : rows;
  const int64_t last_col = first_col + tile_cols < cols ? first_col + tile_cols : cols;
  bool found = false;
  for (int64_t row = first_row; row < last_row && !found; ++row) {
    const int64_t end = row * cols + last_col;
    for (int64_t at = row * cols + first_col; at < end && !found; at = (at / 64 + 1) * 64) {
      uint64_t word = words[at / 64] >> (at % 64);
      if (end - at < 64) word &= (uint64_t{1} << (end - at)) - 1;
      found = word != 0;
    }
  }
  tiles[tile] = found;
}

template <class F>
int with_type(int type, F f) {
  if (type == 0)
    f(Float16{});
  else if (type == 1)
    f(BFloat16{});
  else
    f(Float32{});
  return static_cast<int>(cudaGetLastError());
}

// Places for arrays in the workspace, one after another. Without a workspace only their size is found.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* const array = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return array;
  }
};

Tensor* place(Problem& p, Arena& arena) {
  Tensor* const tensors = arena.take<Tensor>(p.num_tensors);
  p.tensors = tensors;
  p.warp_chunks = chunks_of_warp(p.chunks);
  p.blocks = divide_up(p.chunks, kWarps * p.warp_chunks);
  p.state = arena.take<State>(1);
  p.histograms = arena.take<uint32_t>(kRounds * kBins);
  p.totals = arena.take<unsigned long long>(p.blocks);
  p.chunk_counts = arena.take<uint32_t>(p.chunks);
  p.inside = arena.take<uint32_t>(p.chunks * kLanes);
  p.keys = arena.take<uint32_t>(p.chunks * kSlots);
  return tensors;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* sparsebilevel_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Bytes of workspace for `tensors` tensors of `chunks` chunks of 1024 positions, the last of each tensor begun.
extern "C" __attribute__((visibility("default"))) int64_t sparsebilevel_binarize_workspace(int64_t tensors,
                                                                                            int64_t chunks) {
  Problem p{};
  p.num_tensors = static_cast<int>(tensors);
  p.chunks = chunks;
  Arena arena{nullptr};
  place(p, arena);
  return arena.used;
}

// Masks, words and counts (kernels/binarize.py) of the k largest scores of all tensors together.
// table [tensors, 5] on the host: addresses of scores (`type` 0: float16, 1: bfloat16, 2: float32), mask, words and
// counts, and the size; of an empty tensor nothing is written. All sizes together are below 2^32 and not 0. `k_pointer`:
// k on the device, or null for `k`. errors [tensors + 2] receives the NaNs of each tensor, whether k was not in
// [0, all sizes], and whether neither was so.
SPARSEBILEVEL_API sparsebilevel_binarize(const int64_t* table, int64_t tensors, int type, const int64_t* k_pointer,
                                         int64_t k, void* workspace, int32_t* errors, void* stream) {
  Problem p{};
  p.num_tensors = static_cast<int>(tensors);
  p.rounds = type == 2 ? kRounds : kRounds - 1;
  p.k_pointer = k_pointer;
  p.k = k;
  p.errors = errors;
  for (int64_t i = 0; i < tensors; ++i) p.chunks += divide_up(table[5 * i + 4], kChunk);
  Arena arena{static_cast<char*>(workspace)};
  auto* to = reinterpret_cast<int64_t*>(place(p, arena));

  constexpr int kFields = sizeof(Tensor) / sizeof(int64_t), kPerPiece = Piece::kSize / kFields;
  static_assert(sizeof(Tensor) == 7 * sizeof(int64_t) && sizeof(void*) == sizeof(int64_t), "fields of 8 bytes");
  Piece piece;
  int filled = 0;
  for (int64_t i = 0, chunk = 0; i < tensors; ++i) {
    if (filled == kFields * kPerPiece) {
      SPARSEBILEVEL_LAUNCH(upload, 1, kThreads, stream, piece, to, filled);
      to += filled;
      filled = 0;
    }
    const int64_t* row = table + 5 * i;
    for (int field = 0; field < 5; ++field) piece.values[filled++] = row[field];
    piece.values[filled++] = chunk;
    piece.values[filled++] = p.size;
    chunk += divide_up(row[4], kChunk);
    p.size += row[4];
  }
  return with_type(type, [&](auto scores) {
    using Type = decltype(scores);
    SPARSEBILEVEL_LAUNCH(sample<Type>, 1, kSampleThreads, stream, p, piece, to, filled);
    SPARSEBILEVEL_LAUNCH(split<Type>, p.blocks, kThreads, stream, p);
    for (int round = 0; round < p.rounds; ++round)
      SPARSEBILEVEL_LAUNCH(count<Type>, p.blocks, kThreads, stream, p, round);
    SPARSEBILEVEL_LAUNCH(settle<Type>, p.blocks, kThreads, stream, p);
    SPARSEBILEVEL_LAUNCH(write, p.blocks, kThreads, stream, p);
  });
}

// scores and mask [outer, length, inner], none of them 0: the k largest along the middle dimension. inner is 1, or
// length at most 16. length is below 2^32. errors [3] receives the number of NaNs, whether k was not in
// [0, length], and whether neither was so.
SPARSEBILEVEL_API sparsebilevel_binarize_rows(const void* scores, int64_t outer, int64_t length, int64_t inner,
                                              int type, const int64_t* k_pointer, int64_t k, void* mask,
                                              int32_t* errors, void* stream) {
  const Rows r{scores, outer, length, inner, k_pointer, k, static_cast<uint8_t*>(mask), errors};
  return with_type(type, [&](auto score) { launch_rows<decltype(score)>(r, stream); });
}

// Words and counts of a mask [size], not 0 and below 2^32; of a null mask the words are read. workspace: 8 bytes for
// each chunk and 64 more.
SPARSEBILEVEL_API sparsebilevel_mask_words(const void* mask, int64_t size, void* words, int64_t* counts,
                                           void* workspace, void* stream) {
  const int64_t chunks = divide_up(size, kChunk);
  const int warp_chunks = chunks_of_warp(chunks);
  const int64_t blocks = divide_up(chunks, kWarps * warp_chunks);
  Arena arena{static_cast<char*>(workspace)};
  auto* const totals = arena.take<unsigned long long>(blocks);
  auto* const chunk_counts = arena.take<uint32_t>(chunks);
  SPARSEBILEVEL_LAUNCH(pack_words, blocks, kThreads, stream, static_cast<const uint8_t*>(mask), size,
                       warp_chunks, static_cast<uint32_t*>(words), chunk_counts, totals);
  SPARSEBILEVEL_LAUNCH(sum_counts, blocks, kThreads, stream, chunks, warp_chunks, chunk_counts, totals, counts);
  return static_cast<int>(cudaGetLastError());
}

// words of a mask [rows, cols] -> tiles [ceil(rows / tile_rows), ceil(cols / tile_cols)], of which there are some.
SPARSEBILEVEL_API sparsebilevel_occupied_tiles(const void* words, int64_t rows, int64_t cols, int64_t tile_rows,
                                               int64_t tile_cols, void* tiles, void* stream) {
  const int64_t across = divide_up(cols, tile_cols), count = divide_up(rows, tile_rows) * across;
  SPARSEBILEVEL_LAUNCH(find_tiles, divide_up(count, kThreads), kThreads, stream, static_cast<const uint64_t*>(words),
                       rows, cols, tile_rows, tile_cols, across, count, static_cast<uint8_t*>(tiles));
  return static_cast<int>(cudaGetLastError());
}

}  // namespace sparsebilevel
