// The table of contents: every function that Python can call. Tensors arrive as addresses and sizes, checked by
// kernels/*.py; thread counts are passed in, and the GIL is released while a kernel runs. This is the only file that
// sees Python, so a new Python or pybind11 recompiles nothing else.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "build_info.h"
#include "cpu/binarize.h"
#include "cpu/isa.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;
using namespace sparsebilevel;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int openmp_max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of sparsebilevel; call them through sparsebilevel.kernels.";

  m.attr("build_info") = SPARSEBILEVEL_BUILD_INFO;
  py::enum_<Isa>(m, "Isa").value("scalar", Isa::scalar).value("avx2", Isa::avx2).value("avx512", Isa::avx512);
  m.def("cpu_isa", &cpu_isa, "The best instruction set that this processor has.");
  m.def("isa", &isa, "The instruction set that the kernels use.");
  m.def("set_isa", &set_isa, py::arg("wanted"), "Use `wanted`, or the best below it that this processor has.");
  m.def("openmp_max_threads", &openmp_max_threads);

  m.def(
      "binarize",
      [](uintptr_t scores, int64_t n, int64_t k, uintptr_t mask, int threads) {
        return binarize(pointer<const float>(scores), n, k, pointer<bool>(mask), threads);
      },
      py::arg("scores"), py::arg("n"), py::arg("k"), py::arg("mask"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
}
