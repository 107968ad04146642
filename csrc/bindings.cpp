// The table of contents: every function that Python can call. Tensors arrive as addresses and sizes, checked by
// kernels/*.py; thread counts are passed in, and the GIL is released while a kernel runs. This is the only file that
// sees Python, so a new Python or pybind11 recompiles nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <variant>
#include <vector>

#include "build_info.h"
#include "cpu/batch_norm.h"
#include "cpu/binarize.h"
#include "cpu/feature_maps.h"
#include "cpu/isa.h"
#include "cpu/masked_conv2d.h"
#include "cpu/optimizer_step.h"
#include "cpu/pack.h"
#include "cpu/pool.h"
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

// Maps cross the border as (address, bfloat16, images, (stride_n, stride_c, stride_h, stride_w)), or in lines as
// (address, bfloat16, images, None) or (address, bfloat16, images, (scale, shift, relu)); bfloat16 or else float32.
using Strides = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using Affine = std::tuple<uintptr_t, uintptr_t, bool>;
using MapsArguments = std::tuple<uintptr_t, bool, int64_t, std::variant<std::monostate, Affine, Strides>>;

Element element(bool bfloat16) { return bfloat16 ? Element::bfloat16 : Element::float32; }

Maps maps(const MapsArguments& a) {
  const auto& [data, bfloat16, images, rest] = a;
  Maps maps{pointer<void>(data), images, 0, 0, 0, 0, true};
  maps.element = element(bfloat16);
  if (const auto* affine = std::get_if<Affine>(&rest)) {
    const auto [scale, shift, relu] = *affine;
    maps.scale = pointer<const float>(scale);
    maps.shift = pointer<const float>(shift);
    maps.relu = relu;
  } else if (const auto* strides = std::get_if<Strides>(&rest)) {
    std::tie(maps.stride_n, maps.stride_c, maps.stride_h, maps.stride_w) = *strides;
    maps.lines = false;
  }
  return maps;
}

// Of an optimizer: (pieces, weight, grad, first, second, size, step), see OptimizedWeight.
using WeightArguments =
    std::tuple<std::shared_ptr<ActivePieces>, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, double>;

std::vector<OptimizedWeight> optimized_weights(const std::vector<WeightArguments>& arguments) {
  std::vector<OptimizedWeight> weights;
  for (const auto& [pieces, weight, grad, first, second, size, step] : arguments)
    weights.push_back({pieces, pointer<float>(weight), pointer<const float>(grad), pointer<float>(first),
                       pointer<float>(second), size, step});
  return weights;
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

  py::enum_<ScoreType>(m, "ScoreType")
      .value("float16", ScoreType::float16)
      .value("bfloat16", ScoreType::bfloat16)
      .value("float32", ScoreType::float32);
  m.attr("BINARIZE_SHORT_ROW") = kShortRow;
  m.def(
      "binarize",
      [](const std::vector<std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t>>& arguments, ScoreType type, int64_t k,
         int threads, uintptr_t hint) {
        std::vector<ScoreTensor> tensors;
        for (const auto& [scores, size, mask, words] : arguments)
          tensors.push_back({pointer<const void>(scores), size, pointer<bool>(mask), pointer<uint64_t>(words)});
        return binarize(tensors, type, k, threads, pointer<int32_t>(hint));
      },
      py::arg("tensors"), py::arg("type"), py::arg("k"), py::arg("threads"), py::arg("hint") = 0,
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "binarize_rows",
      [](uintptr_t scores, int64_t outer, int64_t length, int64_t inner, ScoreType type, int64_t k, uintptr_t mask,
         int threads) {
        return binarize_rows(pointer<const void>(scores), outer, length, inner, type, k, pointer<bool>(mask), threads);
      },
      py::arg("scores"), py::arg("outer"), py::arg("length"), py::arg("inner"), py::arg("type"), py::arg("k"),
      py::arg("mask"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "pack_words",
      [](uintptr_t mask, int64_t size, uintptr_t words, int threads) {
        pack_words(pointer<const bool>(mask), size, pointer<uint64_t>(words), threads);
      },
      py::arg("mask"), py::arg("size"), py::arg("words"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "count_words",
      [](uintptr_t words, int64_t size, uintptr_t counts) {
        count_words(pointer<const uint64_t>(words), size, pointer<int64_t>(counts));
      },
      py::arg("words"), py::arg("size"), py::arg("counts"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "occupied_tiles",
      [](uintptr_t words, const std::array<int64_t, 4>& s, uintptr_t tiles, int threads) {
        occupied_tiles(pointer<const uint64_t>(words), s[0], s[1], s[2], s[3], pointer<bool>(tiles), threads);
      },
      py::arg("words"), py::arg("shape"), py::arg("tiles"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  py::enum_<MapsLayout>(m, "MapsLayout")
      .value("lines", MapsLayout::lines)
      .value("pixels", MapsLayout::pixels)
      .value("planes", MapsLayout::planes);
  py::class_<ConvPlan, std::shared_ptr<ConvPlan>>(m, "ConvPlan")
      .def(py::init([](const std::array<int64_t, 19>& s, bool input_gradient, uintptr_t positions, int64_t count,
                       int64_t images, MapsLayout layout, std::optional<std::array<int, 6>> tiling) {
             const ConvShape shape{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], {s[15], s[16], s[17], s[18]}};
             const auto* flat = pointer<const int64_t>(positions);
             py::gil_scoped_release release;
             if (!tiling) return std::make_shared<ConvPlan>(shape, input_gradient, flat, count, images, layout);
             const auto [rows, cols, blocks, strip, planes, images_of_block] = *tiling;
             return std::make_shared<ConvPlan>(shape, input_gradient, flat, count,
                                               Tiling{rows, cols, blocks, strip, planes, images_of_block});
           }),
           py::arg("shape"), py::arg("input_gradient"), py::arg("positions"), py::arg("count"), py::arg("images"),
           py::arg("layout") = MapsLayout::lines, py::arg("tiling") = py::none())
      .def(
          "forward",
          [](const ConvPlan& plan, uintptr_t weight, bool bfloat16, const MapsArguments& in, const MapsArguments& out,
             uintptr_t bias, bool accumulate, int threads) {
            plan.forward(pointer<const void>(weight), element(bfloat16), maps(in), maps(out),
                         pointer<const float>(bias), accumulate, threads);
          },
          py::arg("weight"), py::arg("bfloat16"), py::arg("input"), py::arg("output"), py::arg("bias"), py::arg("accumulate"),
          py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def(
          "weight_grad",
          [](const ConvPlan& plan, const MapsArguments& in, const MapsArguments& grad, uintptr_t grads, bool bfloat16,
             bool scatter, int threads) {
            plan.weight_grad(maps(in), maps(grad), pointer<void>(grads), element(bfloat16), scatter, threads);
          },
          py::arg("input"), py::arg("grad_output"), py::arg("grads"), py::arg("bfloat16"), py::arg("scatter"), py::arg("threads"),
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("non_zeros", &ConvPlan::non_zeros)
      .def_property_readonly("tiling", [](const ConvPlan& plan) {
        const Tiling& t = plan.tiling();
        return std::array<int, 6>{t.tile_rows, t.tile_cols, t.tile_blocks, t.strip_rows, t.planes_per_block, t.block_images};
      })
      .def_property_readonly("has_pixel_lanes", &ConvPlan::has_pixel_lanes);

  const auto line_maps = [](const std::array<int64_t, 4>& s) {  // images, channels, pixels, bfloat16
    return LineMaps{s[0], s[1], s[2], element(s[3] != 0)};
  };
  m.def(
      "batch_norm_terms",
      [line_maps](const std::array<int64_t, 4>& shape, uintptr_t lines, uintptr_t weight, uintptr_t bias, double epsilon,
         uintptr_t running_mean, uintptr_t running_variance, double momentum, uintptr_t terms, int threads) {
        auto* t = pointer<float>(terms);  // [4, channels]
        const int64_t n = shape[1];
        batch_norm_terms(line_maps(shape), pointer<const void>(lines), pointer<const float>(weight),
                         pointer<const float>(bias), epsilon, pointer<float>(running_mean),
                         pointer<float>(running_variance), momentum, {t, t + n, t + 2 * n, t + 3 * n}, threads);
      },
      py::arg("shape"), py::arg("lines"), py::arg("weight"), py::arg("bias"), py::arg("epsilon"),
      py::arg("running_mean"), py::arg("running_variance"), py::arg("momentum"), py::arg("terms"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "batch_norm_forward",
      [line_maps](const std::array<int64_t, 4>& shape, uintptr_t lines, uintptr_t residual, uintptr_t scale, uintptr_t shift,
         bool relu, uintptr_t out, int threads) {
        batch_norm_forward(line_maps(shape), pointer<const void>(lines), pointer<const void>(residual),
                           pointer<const float>(scale), pointer<const float>(shift), relu, pointer<void>(out), threads);
      },
      py::arg("shape"), py::arg("lines"), py::arg("residual"), py::arg("scale"), py::arg("shift"), py::arg("relu"),
      py::arg("out"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "batch_norm_backward",
      [line_maps](const std::array<int64_t, 4>& shape, uintptr_t grad, uintptr_t lines, uintptr_t activation, uintptr_t scale,
         uintptr_t shift, uintptr_t mean, uintptr_t inverse, bool relu, bool training, uintptr_t grad_lines,
         uintptr_t grad_residual, uintptr_t grad_weight, uintptr_t grad_bias, int threads) {
        batch_norm_backward(line_maps(shape), pointer<const void>(grad), pointer<const void>(lines),
                            pointer<const void>(activation), pointer<const float>(scale), pointer<const float>(shift),
                            pointer<const float>(mean), pointer<const float>(inverse), relu, training,
                            pointer<void>(grad_lines), pointer<void>(grad_residual), pointer<float>(grad_weight),
                            pointer<float>(grad_bias), threads);
      },
      py::arg("shape"), py::arg("grad"), py::arg("lines"), py::arg("activation"), py::arg("scale"), py::arg("shift"),
      py::arg("mean"), py::arg("inverse"), py::arg("relu"), py::arg("training"), py::arg("grad_lines"),
      py::arg("grad_residual"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "batch_norm_nhwc_forward",
      [](const std::tuple<int64_t, int64_t, bool>& rows, uintptr_t x, uintptr_t residual, uintptr_t weight,
         uintptr_t bias, uintptr_t running_mean, uintptr_t running_variance, double momentum, double epsilon,
         bool of_batch, bool relu, uintptr_t out, uintptr_t terms, int threads) {
        const auto [count, channels, is_bfloat16] = rows;
        const NormOperands norm{pointer<const float>(weight), pointer<const float>(bias), pointer<float>(running_mean),
                                pointer<float>(running_variance), momentum, epsilon, of_batch};
        batch_norm_nhwc_forward({count, channels, is_bfloat16}, norm, pointer<const void>(x),
                                pointer<const void>(residual), relu, pointer<void>(out), pointer<float>(terms), threads);
      },
      py::arg("rows"), py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("running_mean"),
      py::arg("running_variance"), py::arg("momentum"), py::arg("epsilon"), py::arg("of_batch"), py::arg("relu"),
      py::arg("out"), py::arg("terms"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "batch_norm_nhwc_backward",
      [](const std::tuple<int64_t, int64_t, bool>& rows, uintptr_t terms, bool of_batch, bool relu, uintptr_t grad,
         uintptr_t more, uintptr_t x, uintptr_t out, uintptr_t grad_x, uintptr_t grad_residual, uintptr_t grad_weight,
         uintptr_t grad_bias, int threads) {
        const auto [count, channels, is_bfloat16] = rows;
        batch_norm_nhwc_backward({count, channels, is_bfloat16}, pointer<const float>(terms), of_batch, relu,
                                 pointer<const void>(grad), pointer<const void>(more), pointer<const void>(x),
                                 pointer<const void>(out), pointer<void>(grad_x), pointer<void>(grad_residual),
                                 pointer<float>(grad_weight), pointer<float>(grad_bias), threads);
      },
      py::arg("rows"), py::arg("terms"), py::arg("of_batch"), py::arg("relu"), py::arg("grad"), py::arg("more"),
      py::arg("x"), py::arg("out"), py::arg("grad_x"), py::arg("grad_residual"), py::arg("grad_weight"), py::arg("grad_bias"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "to_lines",
      [](const MapsArguments& from, const std::array<int64_t, 3>& s, uintptr_t lines, bool bfloat16, int threads) {
        to_lines(maps(from), s[0], s[1], s[2], pointer<void>(lines), element(bfloat16), threads);
      },
      py::arg("maps"), py::arg("shape"), py::arg("lines"), py::arg("bfloat16"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "from_lines",
      [](uintptr_t lines, bool bfloat16, const MapsArguments& to, const std::array<int64_t, 3>& s, int threads) {
        from_lines(pointer<const void>(lines), element(bfloat16), maps(to), s[0], s[1], s[2], threads);
      },
      py::arg("lines"), py::arg("bfloat16"), py::arg("maps"), py::arg("shape"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  // A writable float32 array of `count` elements from the pool, which gets it back when the last reference is gone.
  m.def("pool_array", [](int64_t count) {
    auto* memory = static_cast<float*>(pool_allocate(count * static_cast<int64_t>(sizeof(float))));
    return py::array_t<float>(count, memory, py::capsule(memory, [](void* p) { pool_free(p); }));
  });
  m.def("pool_release", &pool_release);
  m.def("pool_in_use", &pool_in_use);
  m.def("pool_waiting", &pool_waiting);

  m.def("same_bytes", [](uintptr_t a, uintptr_t b, int64_t count) {
    return std::memcmp(pointer<const char>(a), pointer<const char>(b), count) == 0;
  });

  py::class_<ActivePieces, std::shared_ptr<ActivePieces>>(m, "ActivePieces")
      .def("__len__", [](const ActivePieces& pieces) { return pieces.list.size(); });
  m.def(
      "find_active_pieces",
      [](uintptr_t mask, int64_t size, const std::vector<uintptr_t>& tensors, int64_t most, int threads) {
        std::vector<const float*> pointers;
        for (const uintptr_t tensor : tensors) pointers.push_back(pointer<const float>(tensor));
        return find_active_pieces(pointer<const bool>(mask), size, pointers, most, threads);
      },
      py::arg("mask"), py::arg("size"), py::arg("tensors"), py::arg("most"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "sgd_step",
      [](const std::vector<WeightArguments>& weights, double rate, double momentum, double dampening,
         double weight_decay, bool nesterov, bool maximize, int threads) {
        sgd_step(optimized_weights(weights), {rate, momentum, dampening, weight_decay, nesterov, maximize}, threads);
      },
      py::arg("weights"), py::arg("rate"), py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"),
      py::arg("nesterov"), py::arg("maximize"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "adamw_step",
      [](const std::vector<WeightArguments>& weights, double rate, double beta1, double beta2, double epsilon,
         double weight_decay, bool maximize, int threads) {
        adamw_step(optimized_weights(weights), {rate, beta1, beta2, epsilon, weight_decay, maximize}, threads);
      },
      py::arg("weights"), py::arg("rate"), py::arg("beta1"), py::arg("beta2"), py::arg("epsilon"),
      py::arg("weight_decay"), py::arg("maximize"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  const auto pool_shape = [](const std::array<int64_t, 12>& s) {
    return PoolShape{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11]};
  };
  m.def(
      "max_pool_forward",
      [pool_shape](const std::array<int64_t, 12>& shape, int64_t planes, bool bfloat16, uintptr_t in, uintptr_t out,
                   int threads) {
        max_pool_forward(pool_shape(shape), planes, element(bfloat16), pointer<const void>(in), pointer<void>(out), threads);
      },
      py::arg("shape"), py::arg("planes"), py::arg("bfloat16"), py::arg("lines"), py::arg("out"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "max_pool_backward",
      [pool_shape](const std::array<int64_t, 12>& shape, int64_t planes, bool bfloat16, uintptr_t in, uintptr_t out,
                   uintptr_t grad_out, uintptr_t grad_in, int threads) {
        max_pool_backward(pool_shape(shape), planes, element(bfloat16), pointer<const void>(in),
                          pointer<const void>(out), pointer<const void>(grad_out), pointer<void>(grad_in), threads);
      },
      py::arg("shape"), py::arg("planes"), py::arg("bfloat16"), py::arg("lines"), py::arg("out"), py::arg("grad_out"), py::arg("grad_in"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  // Of pack: bits are words of 64 elements, see cpu/pack.h. Summaries are (count, hash, hierarchical size, delta8 size).
  const auto as_tuple = [](const MaskSummary& s) {
    return std::make_tuple(s.count, s.hash, s.hierarchical_size, s.delta8_size);
  };
  m.def(
      "mask_to_bits",
      [as_tuple](uintptr_t mask, int64_t n, uintptr_t bits, int threads) {
        return as_tuple(mask_to_bits(pointer<const uint8_t>(mask), n, pointer<uint64_t>(bits), threads));
      },
      py::arg("mask"), py::arg("n"), py::arg("bits"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "summarize_bits",
      [as_tuple](uintptr_t bits, int64_t n, int threads) {
        return as_tuple(summarize_bits(pointer<const uint64_t>(bits), n, threads));
      },
      py::arg("bits"), py::arg("n"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "bits_to_mask",
      [](uintptr_t bits, int64_t n, uintptr_t mask, int threads) {
        bits_to_mask(pointer<const uint64_t>(bits), n, pointer<uint8_t>(mask), threads);
      },
      py::arg("bits"), py::arg("n"), py::arg("mask"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "encode_positions",
      [](int format, uintptr_t bits, int64_t n, uintptr_t out, int threads) {
        encode_positions(static_cast<PositionFormat>(format), pointer<const uint64_t>(bits), n, pointer<uint8_t>(out), threads);
      },
      py::arg("format"), py::arg("bits"), py::arg("n"), py::arg("out"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "decode_positions",
      [](int format, uintptr_t data, int64_t size, int64_t n, uintptr_t bits, int threads) {
        return decode_positions(static_cast<PositionFormat>(format), pointer<const uint8_t>(data), size, n, pointer<uint64_t>(bits), threads);
      },
      py::arg("format"), py::arg("data"), py::arg("size"), py::arg("n"), py::arg("bits"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gather_values",
      [](uintptr_t dense, int element_size, uintptr_t bits, int64_t n, uintptr_t values, int threads) {
        gather_values(pointer<const void>(dense), element_size, pointer<const uint64_t>(bits), n, pointer<void>(values), threads);
      },
      py::arg("dense"), py::arg("element_size"), py::arg("bits"), py::arg("n"), py::arg("values"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "scatter_values",
      [](uintptr_t values, int element_size, uintptr_t bits, int64_t n, uintptr_t dense, bool keep, int threads) {
        scatter_values(pointer<const void>(values), element_size, pointer<const uint64_t>(bits), n, pointer<void>(dense), keep, threads);
      },
      py::arg("values"), py::arg("element_size"), py::arg("bits"), py::arg("n"), py::arg("dense"), py::arg("keep"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "crc32c",
      [](uintptr_t data, int64_t size, int threads) { return crc32c(pointer<const uint8_t>(data), size, threads); },
      py::arg("data"), py::arg("size"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}
