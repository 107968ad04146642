// Line kernels for AVX2 with FMA: half a line in a register.
#include "line_kernels.h"
#include "vector.h"

#ifdef SPARSEBILEVEL_X86
SPARSEBILEVEL_BEGIN_AVX2
namespace sparsebilevel {
namespace {

using Vector = Avx2Vector;
constexpr int kMaxTile = 14;

#include "line_kernels_inc.h"

}  // namespace

const LineKernels& line_kernels_avx2() {
  static const LineKernels table = make_table();
  return table;
}

}  // namespace sparsebilevel
SPARSEBILEVEL_END_ISA
#endif
