// Line kernels for any processor: groups of four lanes as the compiler's own vector type.
#include "line_kernels.h"
#include "vector.h"

namespace sparsebilevel {
namespace {

using Vector = ScalarVector;
constexpr int kMaxTile = 12;

#include "line_kernels_inc.h"

}  // namespace

const LineKernels& line_kernels_scalar() {
  static const LineKernels table = make_table();
  return table;
}

}  // namespace sparsebilevel
