// The table of contents: every function that Python can call. Tensors arrive as addresses and sizes, checked by
// kernels/*.py; thread counts are passed in, and the GIL is released while a kernel runs. This is the only file that
// sees Python, so a new Python or pybind11 recompiles nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>

#include "build_info.h"
#include "cpu/binarize.h"
#include "cpu/isa.h"
#include "cpu/masked_conv2d.h"
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

// Maps cross the border as (address, images, stride_n, stride_c, stride_h, stride_w, lines).
using MapsArguments = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;

Maps maps(const MapsArguments& a) {
  const auto [data, images, n, c, h, w, lines] = a;
  return {pointer<float>(data), images, n, c, h, w, lines};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of sparsebilevel; call them through sparsebilevel.kernels.";

  m.attr("build_info") = SPARSEBILEVEL_BUILD_INFO;
  py::enum_<Isa>(m, "Isa", py::arithmetic()).value("scalar", Isa::scalar).value("avx2", Isa::avx2).value("avx512", Isa::avx512);
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

  py::class_<ConvPlan, std::shared_ptr<ConvPlan>>(m, "ConvPlan")
      .def(py::init([](const std::array<int64_t, 19>& s, bool input_gradient, uintptr_t positions, int64_t count,
                       int64_t images, std::optional<std::array<int, 5>> tiling) {
             const ConvShape shape{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], {s[15], s[16], s[17], s[18]}};
             const auto* flat = pointer<const int64_t>(positions);
             py::gil_scoped_release release;
             if (!tiling) return std::make_shared<ConvPlan>(shape, input_gradient, flat, count, images);
             const auto [rows, cols, blocks, strip, planes] = *tiling;
             return std::make_shared<ConvPlan>(shape, input_gradient, flat, count,
                                               Tiling{rows, cols, blocks, strip, planes});
           }),
           py::arg("shape"), py::arg("input_gradient"), py::arg("positions"), py::arg("count"), py::arg("images"),
           py::arg("tiling") = py::none())
      .def(
          "forward",
          [](const ConvPlan& plan, uintptr_t weight, const MapsArguments& in, const MapsArguments& out, uintptr_t bias,
             bool accumulate, int threads) {
            plan.forward(pointer<const float>(weight), maps(in), maps(out), pointer<const float>(bias), accumulate,
                         threads);
          },
          py::arg("weight"), py::arg("input"), py::arg("output"), py::arg("bias"), py::arg("accumulate"),
          py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def(
          "weight_grad",
          [](const ConvPlan& plan, const MapsArguments& in, const MapsArguments& grad, uintptr_t grads, bool scatter,
             int threads) {
            plan.weight_grad(maps(in), maps(grad), pointer<float>(grads), scatter, threads);
          },
          py::arg("input"), py::arg("grad_output"), py::arg("grads"), py::arg("scatter"), py::arg("threads"),
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("non_zeros", &ConvPlan::non_zeros)
      .def_property_readonly("tiling", [](const ConvPlan& plan) {
        const Tiling& t = plan.tiling();
        return std::array<int, 5>{t.tile_rows, t.tile_cols, t.tile_blocks, t.strip_rows, t.planes_per_block};
      });
}
