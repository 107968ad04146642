// Steps of an optimizer on the active weights of a mask.
//
// Memory moves in cache lines, so a weight is cut into *pieces* of 16 elements, and a step touches the pieces in which
// the mask is True somewhere. Where it is False weight and state must be zero and the gradient is taken as zero, so that
// they stay zero, and the step is the dense one.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace sparsebilevel {

constexpr int64_t kPiece = 16;

struct ActivePiece {
  uint32_t index;  // elements [index * kPiece, (index + 1) * kPiece)
  uint32_t lanes;  // bit i: the mask is True at element index * kPiece + i
};

struct ActivePieces {
  std::vector<ActivePiece> list;
};

// The pieces of a mask of `size` elements, ascending. Null if there are more than `most`, or if one of `tensors`, each
// of `size` elements in the same order in memory, holds anything but zeros where the mask is False.
std::shared_ptr<ActivePieces> find_active_pieces(const bool* mask, int64_t size,
                                                 const std::vector<const float*>& tensors, int64_t most, int threads);

// One weight, its gradient and its state: `size` elements each, in the same order in memory.
struct OptimizedWeight {
  std::shared_ptr<const ActivePieces> pieces;
  float* weight;
  const float* grad;
  float* first;   // momentum buffer, or mean of the gradients; null for SGD without momentum
  float* second;  // mean of the squared gradients; null for SGD
  int64_t size;
  double step;  // AdamW: number of this step, counted from 1
};

struct SgdSettings {
  double rate, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

struct AdamwSettings {
  double rate, beta1, beta2, epsilon, weight_decay;
  bool maximize;
};

// One step, in place. A momentum buffer must have been through its first step, and epsilon must be positive. Results do
// not depend on `threads`.
void sgd_step(const std::vector<OptimizedWeight>& weights, const SgdSettings& settings, int threads);
void adamw_step(const std::vector<OptimizedWeight>& weights, const AdamwSettings& settings, int threads);

}  // namespace sparsebilevel
