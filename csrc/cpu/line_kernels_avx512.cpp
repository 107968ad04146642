// Line kernels for AVX-512: a line is a register.
#include "line_kernels.h"
#include "vector.h"

#ifdef SPARSEBILEVEL_X86
SPARSEBILEVEL_BEGIN_AVX512
namespace sparsebilevel {
namespace {

using Vector = Avx512Vector;
constexpr int kMaxTile = 28;

#include "line_kernels_inc.h"

}  // namespace

const LineKernels& line_kernels_avx512() {
  static const LineKernels table = make_table();
  return table;
}

}  // namespace sparsebilevel
SPARSEBILEVEL_END_ISA
#endif
