// The CUDA kernels in their emulation, in buffers of exactly the sizes they are told, so that a sanitizer sees a step
// outside; against std::sort.
#define SPARSEBILEVEL_CHUNKS_AT_A_TIME 16  // so that few scores are enough for several chunks of a warp
#include "hopper_emulation.h"

#include "../../csrc/cuda/binarize.cu"
#include "../../csrc/cuda/block_sparse_sm90.cu"
#include "../../csrc/cuda/pack.cu"
#include "../../csrc/cuda/weight_grad_sm90.cu"

#include <numeric>

namespace {

std::mt19937_64 random_bits(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

void require(bool condition, const char* what, int64_t n, int64_t k) {
  if (condition) return;
  std::fprintf(stderr, "%s: n=%lld k=%lld\n", what, static_cast<long long>(n), static_cast<long long>(k));
  std::exit(1);
}

// Memory of exactly a size, which begins at a multiple of 16 bytes.
template <class T>
struct Array {
  int64_t size;
  std::unique_ptr<char[]> memory;

  explicit Array(int64_t n) : size(n), memory(new char[n * sizeof(T)]) {
    std::memset(memory.get(), 0xa5, n * sizeof(T));
  }
  T* data() { return reinterpret_cast<T*>(memory.get()); }
  T& operator[](int64_t i) { return data()[i]; }
};

// float32 scores by their bits: any but NaN, few values, values close together, or all equal.
float drawn_score(int kind) {
  const float few[] = {0.0f, -0.0f, 1.0f, -1.0f, 1e-45f, INFINITY, -INFINITY};
  if (kind == 0) return few[draw(0, 6)];
  if (kind == 1) return 1.0f + 1e-7f * static_cast<float>(draw(0, 1000));
  if (kind == 2) return 2.5f;
  float score;
  do {
    const auto bits = static_cast<uint32_t>(random_bits());
    std::memcpy(&score, &bits, 4);
  } while (std::isnan(score));
  return score;
}

void check_lists(std::vector<int64_t> sizes, int kind) {
  const int64_t n = std::accumulate(sizes.begin(), sizes.end(), int64_t{0}), k = draw(0, n);
  std::vector<Array<float>> scores;
  std::vector<Array<uint8_t>> masks;
  std::vector<Array<uint64_t>> words;
  std::vector<Array<int64_t>> counts;
  std::vector<int64_t> table;
  std::vector<float> all;
  int64_t chunks = 0;
  for (const int64_t size : sizes) {
    scores.emplace_back(size);
    masks.emplace_back(size);
    words.emplace_back((size + 63) / 64);
    counts.emplace_back((size + 1023) / 1024 + 1);
    for (int64_t i = 0; i < size; ++i) all.push_back(scores.back()[i] = drawn_score(kind));
    for (void* address : {static_cast<void*>(scores.back().data()), static_cast<void*>(masks.back().data()),
                          static_cast<void*>(words.back().data()), static_cast<void*>(counts.back().data())})
      table.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(address)));
    table.push_back(size);
    chunks += (size + 1023) / 1024;
  }
  const auto tensors = static_cast<int64_t>(sizes.size());
  Array<char> workspace(sparsebilevel::sparsebilevel_binarize_workspace(tensors, chunks));
  Array<int32_t> errors(tensors + 2);
  Array<int64_t> on_device(1);
  on_device[0] = k;
  set_emulation_seed(random_bits());
  sparsebilevel::sparsebilevel_binarize(table.data(), tensors, 2, draw(0, 1) ? on_device.data() : nullptr, k,
                                        workspace.data(), errors.data(), nullptr);
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return all[a] > all[b]; });
  std::vector<bool> expected(n);
  for (int64_t i = 0; i < k; ++i) expected[order[i]] = true;
  int64_t at = 0;
  for (int64_t t = 0; t < tensors; ++t) {
    int64_t before = 0;
    for (int64_t i = 0; i < sizes[t]; ++i, ++at) {
      if (i % 1024 == 0) require(counts[t][i / 1024] == before, "counts", n, k);
      require(masks[t][i] == expected[at], "mask", n, k);
      require((words[t][i / 64] >> (i % 64) & 1) == expected[at], "words", n, k);
      before += expected[at];
    }
    require(counts[t][counts[t].size - 1] == before, "last count", n, k);
    if (sizes[t] % 64) require(words[t][sizes[t] / 64] >> (sizes[t] % 64) == 0, "bits beyond", n, k);
    require(errors[t] == 0, "NaNs", n, k);
  }
  require(errors[tensors] == 0 && errors[tensors + 1] == 1, "errors", n, k);
}

void check_rows(int64_t outer, int64_t length, int64_t inner, int kind) {
  const int64_t n = outer * length * inner, k = draw(0, length);
  Array<float> scores(n);
  Array<uint8_t> mask(n);
  Array<int32_t> errors(3);
  for (int64_t i = 0; i < n; ++i) scores[i] = drawn_score(kind);
  set_emulation_seed(random_bits());
  sparsebilevel::sparsebilevel_binarize_rows(scores.data(), outer, length, inner, 2, nullptr, k, mask.data(),
                                             errors.data(), nullptr);
  for (int64_t row = 0; row < outer * inner; ++row) {
    const int64_t offset = row / inner * length * inner + row % inner;
    std::vector<int64_t> order(length);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return scores[offset + a * inner] > scores[offset + b * inner]; });
    for (int64_t i = 0; i < length; ++i) require(mask[offset + order[i] * inner] == (i < k), "row", n, k);
  }
  require(errors[0] == 0 && errors[1] == 0 && errors[2] == 1, "errors of rows", n, k);
}

void check_words(int64_t n) {
  Array<uint8_t> mask(n);
  Array<uint64_t> words((n + 63) / 64);
  Array<int64_t> counts((n + 1023) / 1024 + 1);
  Array<char> workspace(8 * counts.size + 64);
  for (int64_t i = 0; i < n; ++i) mask[i] = draw(0, 2) == 0;
  sparsebilevel::sparsebilevel_mask_words(mask.data(), n, words.data(), counts.data(), workspace.data(), nullptr);
  int64_t before = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (i % 1024 == 0) require(counts[i / 1024] == before, "counts of a mask", n, 0);
    require((words[i / 64] >> (i % 64) & 1) == mask[i], "words of a mask", n, 0);
    before += mask[i];
  }
  require(counts[counts.size - 1] == before, "count of a mask", n, 0);

  Array<uint16_t> dense(n), values(before), back(n);
  for (int64_t i = 0; i < n; ++i) dense[i] = static_cast<uint16_t>(random_bits() | 1);
  sparsebilevel::sparsebilevel_gather_values(dense.data(), 2, words.data(), counts.data(), n, values.data(), nullptr);
  sparsebilevel::sparsebilevel_scatter_values(values.data(), 2, words.data(), counts.data(), n, back.data(), 0, nullptr);
  for (int64_t i = 0; i < n; ++i) require(back[i] == (mask[i] ? dense[i] : 0), "there and back", n, 0);
}

// Small integers, of which all sums are exact.
Array<uint16_t> drawn_halves(int64_t n) {
  Array<uint16_t> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = float_to_half(static_cast<float>(draw(-3, 3)));
  return values;
}

void check_weight_grad(int t, int n, int k) {
  auto dy = drawn_halves(int64_t{t} * n), x = drawn_halves(int64_t{t} * k);
  Array<float> weight(int64_t{n} * k), grad_weight(int64_t{n} * k), grad_scores(int64_t{n} * k), sink(int64_t{n} * k);
  Array<uint8_t> mask(int64_t{n} * k);
  for (int64_t i = 0; i < weight.size; ++i) weight[i] = static_cast<float>(draw(-3, 3)), mask[i] = draw(0, 1);
  set_emulation_seed(random_bits());
  sparsebilevel_weight_grad(dy.data(), x.data(), weight.data(), mask.data(), grad_weight.data(), grad_scores.data(),
                            sink.data(), t, n, k, 0, 2, static_cast<int>(draw(1, 3)), nullptr);
  for (int row = 0; row < n; ++row) {
    for (int col = 0; col < k; ++col) {
      float g = 0;
      for (int i = 0; i < t; ++i) g += half_to_float(dy[i * n + row]) * half_to_float(x[i * k + col]);
      const int64_t at = int64_t{row} * k + col;
      require(sink[at] == g, "G", n, k);
      require(grad_scores[at] == g * weight[at], "gradient of scores", n, k);
      require(grad_weight[at] == (mask[at] ? g : 0), "gradient of weights", n, k);
    }
  }
}

// Tiles of 64, of rows in pairs side by side; out = x @ weight.T.
void check_tiles(int t, int n, int k, int rows) {
  const int down = (n + 63) / 64, across = (k + 63) / 64, pairs = (down + 1) / 2;
  auto x = drawn_halves(int64_t{t} * k), weight = drawn_halves(int64_t{n} * k);
  Array<uint16_t> out(int64_t{t} * n);
  Array<float> bias(n);
  for (int i = 0; i < n; ++i) bias[i] = static_cast<float>(draw(-3, 3));
  std::vector<int> kept(int64_t{down} * across), entries;
  Array<int> order(pairs), starts(pairs + 1), members(2 * pairs);
  for (int& tile : kept) tile = static_cast<int>(draw(0, 1));
  for (int pair = 0; pair < pairs; ++pair) {
    order[pair] = pair, starts[pair] = static_cast<int>(entries.size());
    members[2 * pair] = 2 * pair, members[2 * pair + 1] = 2 * pair + 1;
    for (int c = 0; c < across; ++c) {
      const int second = 2 * pair + 1 < down ? kept[(2 * pair + 1) * across + c] : 0;
      const int what = kept[2 * pair * across + c] + 2 * second;
      if (what) entries.push_back(4 * c + what);
    }
  }
  starts[pairs] = static_cast<int>(entries.size());
  set_emulation_seed(random_bits());
  sparsebilevel_block_matmul(x.data(), weight.data(), bias.data(), 2, out.data(), order.data(), starts.data(),
                             entries.data(), members.data(), pairs, t, n, k, 0, 0, rows, static_cast<int>(draw(1, 3)),
                             nullptr);
  for (int row = 0; row < t; ++row) {
    for (int col = 0; col < n; ++col) {
      float y = bias[col];
      for (int i = 0; i < k; ++i) {
        if (kept[col / 64 * across + i / 64]) y += half_to_float(x[row * k + i]) * half_to_float(weight[col * k + i]);
      }
      require(out[int64_t{row} * n + col] == float_to_half(y), "product of tiles", n, k);
    }
  }
}

}  // namespace

int main() {
  for (int i = 0; i < 12; ++i) {
    std::vector<int64_t> sizes(draw(1, 4));
    for (int64_t& size : sizes) size = draw(1, draw(0, 1) ? 70 : 3000);
    check_lists(sizes, i % 4);
  }
  for (const int kind : {0, 3}) check_lists({40'001}, kind);
  check_lists(std::vector<int64_t>(80, 3), 3);
  for (const int64_t length : {1, 2, 3, 4, 8, 11, 16})
    for (int i = 0; i < 4; ++i) check_rows(draw(1, 9), length, draw(1, 5), i);
  for (const int64_t length : {17, 64, 65, 700, 1024, 2049, 5000})
    for (int i = 0; i < 4; ++i) check_rows(draw(1, 3), length, 1, i);
  for (const int64_t n : {1, 63, 64, 1000, 1024, 1025, 20'000}) check_words(n);
  for (const int t : {1, 200}) check_weight_grad(t, 8 * draw(1, 20), 8 * draw(1, 20));
  check_tiles(1, 8 * draw(1, 30), 8 * draw(1, 30), 256);
  check_tiles(150, 8 * draw(1, 20), 8 * draw(1, 20), 128);
  std::puts("ok");
}
