// The Python module `_C`: integers in, structs of codegemm.h out. Every check is done by ops.py and step.py, its only
// callers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "codegemm.h"
#include "cpu/features.h"
#include "cpu/step.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

codegemm::Weight weight(Address codes, Address codebooks, Address scales, int num_codebooks, int vector_length,
                        int64_t num_groups, int64_t out_features, int64_t in_features, int dtype, bool tiled = false) {
  return {reinterpret_cast<const uint32_t*>(codes),
          reinterpret_cast<const void*>(codebooks),
          reinterpret_cast<const void*>(scales),
          num_codebooks,
          vector_length,
          num_groups,
          out_features,
          in_features,
          static_cast<codegemm::DType>(dtype),
          tiled};
}

codegemm::Gemm gemm_call(const codegemm::Weight& weight, Address x, int64_t x_row_stride, Address bias, Address y,
                         int64_t rows) {
  return {weight,
          reinterpret_cast<const void*>(x),
          x_row_stride,
          reinterpret_cast<const void*>(bias),
          reinterpret_cast<void*>(y),
          rows};
}

void gemm_cpu(Address codes, Address codebooks, Address scales, int num_codebooks, int vector_length,
              int64_t num_groups, int64_t out_features, int64_t in_features, int dtype, Address x, int64_t x_row_stride,
              Address bias, Address y, int64_t rows, bool tiled, int threads) {
  codegemm::cpu::gemm(gemm_call(weight(codes, codebooks, scales, num_codebooks, vector_length, num_groups, out_features,
                                       in_features, dtype, tiled),
                                x, x_row_stride, bias, y, rows),
                      threads);
}

void dequantize_cpu(Address codes, Address codebooks, Address scales, int num_codebooks, int vector_length,
                    int64_t num_groups, int64_t out_features, int64_t in_features, int dtype, Address y,
                    int64_t first_row, int64_t rows, bool tiled, int threads) {
  codegemm::cpu::dequantize({weight(codes, codebooks, scales, num_codebooks, vector_length, num_groups, out_features,
                                    in_features, dtype, tiled),
                             reinterpret_cast<void*>(y)},
                            first_row, rows, threads);
}

// The codes of a matrix without its floats.
codegemm::Weight codes_only(Address codes, int num_codebooks, int vector_length, int64_t num_groups,
                            int64_t out_features, int64_t in_features) {
  return weight(codes, 0, 0, num_codebooks, vector_length, num_groups, out_features, in_features, 0);
}

void tile(Address codes, int num_codebooks, int vector_length, int64_t num_groups, int64_t out_features,
          int64_t in_features, Address y, int threads) {
  codegemm::cpu::tile(codes_only(codes, num_codebooks, vector_length, num_groups, out_features, in_features),
                      reinterpret_cast<uint8_t*>(y), threads);
}

void untile(Address codes, int num_codebooks, int vector_length, int64_t num_groups, int64_t out_features,
            int64_t in_features, Address y, int threads) {
  codegemm::cpu::untile(codes_only(codes, num_codebooks, vector_length, num_groups, out_features, in_features),
                        reinterpret_cast<uint32_t*>(y), threads);
}

using Addresses = std::vector<Address>;

// Lists have one address a matrix; everything else is the same for all of them.
std::vector<codegemm::Gemm> gemm_calls(const Addresses& codes, const Addresses& codebooks, const Addresses& scales,
                                       const Addresses& biases, const Addresses& ys,
                                       const std::vector<int64_t>& out_features, int num_codebooks, int vector_length,
                                       int64_t num_groups, int64_t in_features, int dtype, Address x,
                                       int64_t x_row_stride, int64_t rows, bool tiled) {
  std::vector<codegemm::Gemm> calls;
  for (std::size_t i = 0; i < codes.size(); ++i)
    calls.push_back(gemm_call(weight(codes.at(i), codebooks.at(i), scales.at(i), num_codebooks, vector_length,
                                     num_groups, out_features.at(i), in_features, dtype, tiled),
                              x, x_row_stride, biases.at(i), ys.at(i), rows));
  return calls;
}

void gemm_grouped_cpu(const Addresses& codes, const Addresses& codebooks, const Addresses& scales,
                      const Addresses& biases, const Addresses& ys, const std::vector<int64_t>& out_features,
                      int num_codebooks, int vector_length, int64_t num_groups, int64_t in_features, int dtype,
                      Address x, int64_t x_row_stride, int64_t rows, bool tiled, int threads) {
  const auto calls = gemm_calls(codes, codebooks, scales, biases, ys, out_features, num_codebooks, vector_length,
                                num_groups, in_features, dtype, x, x_row_stride, rows, tiled);
  codegemm::cpu::gemm_grouped(calls.data(), static_cast<int>(calls.size()), threads);
}

using codegemm::cpu::Step;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using NormArguments = std::tuple<Address, float, float>;  // weight or 0, eps, offset
using RowsArguments = std::pair<Address, int64_t>;        // first row, elements from row to row

codegemm::cpu::Norm norm_of(const NormArguments& norm) {
  return {at(std::get<0>(norm)), std::get<1>(norm), std::get<2>(norm)};
}

codegemm::cpu::Rows rows_of(const RowsArguments& rows) { return {at(rows.first), rows.second}; }

void step_embed(Step& step, Address table, Address tokens, Address y, int64_t rows, int64_t width, int64_t vocabulary,
                int dtype) {
  step.add(codegemm::cpu::Embed{at(table), at<int64_t>(tokens), at(y), rows, width, vocabulary,
                                static_cast<codegemm::DType>(dtype)});
}

void step_add_norm(Step& step, Address residual, Address branch, NormArguments branch_norm, NormArguments norm,
                   Address y, int64_t rows, int64_t width, int dtype) {
  step.add(codegemm::cpu::AddNorm{at(residual), at(branch), norm_of(branch_norm), norm_of(norm), at(y), rows, width,
                                  static_cast<codegemm::DType>(dtype)});
}

// Lists have one entry a matrix.
void step_products(Step& step, const Addresses& codes, const Addresses& codebooks, const Addresses& scales,
                   const Addresses& biases, const Addresses& ys, const std::vector<int>& num_codebooks,
                   const std::vector<int>& vector_length, const std::vector<int64_t>& num_groups,
                   const std::vector<int64_t>& out_features, const std::vector<bool>& tiled, int64_t in_features,
                   int dtype, RowsArguments x, int64_t rows) {
  std::vector<codegemm::Gemm> calls;
  for (std::size_t i = 0; i < codes.size(); ++i)
    calls.push_back(
        gemm_call(weight(codes.at(i), codebooks.at(i), scales.at(i), num_codebooks.at(i), vector_length.at(i),
                         num_groups.at(i), out_features.at(i), in_features, dtype, tiled.at(i)),
                  x.first, x.second, biases.at(i), ys.at(i), rows));
  step.add(calls);
}

void step_dense(Step& step, Address weight, RowsArguments x, Address bias, Address y, int64_t rows,
                int64_t out_features, int64_t in_features, int dtype) {
  step.add(codegemm::cpu::Dense{at(weight), rows_of(x), at(bias), at(y), rows, out_features, in_features,
                                static_cast<codegemm::DType>(dtype)});
}

void step_attend(Step& step, RowsArguments q, RowsArguments k, RowsArguments v, Address y, NormArguments q_norm,
                 NormArguments k_norm, Address cos, Address sin, Address keys, Address values, Address key_scales,
                 Address value_scales, Address lengths, int64_t slots, int64_t heads, int64_t kv_heads,
                 int64_t head_dim, int64_t pairs, int64_t capacity, int64_t window, float scale, float softcap,
                 int dtype) {
  step.add(codegemm::cpu::Attention{rows_of(q),
                                    rows_of(k),
                                    rows_of(v),
                                    at(y),
                                    norm_of(q_norm),
                                    norm_of(k_norm),
                                    at<float>(cos),
                                    at<float>(sin),
                                    at(keys),
                                    at(values),
                                    at<float>(key_scales),
                                    at<float>(value_scales),
                                    at<int32_t>(lengths),
                                    slots,
                                    heads,
                                    kv_heads,
                                    head_dim,
                                    pairs,
                                    capacity,
                                    window,
                                    scale,
                                    softcap,
                                    static_cast<codegemm::DType>(dtype)});
}

void step_gate(Step& step, RowsArguments gate, RowsArguments up, Address y, int64_t rows, int64_t width, int activation,
               int dtype) {
  step.add(codegemm::cpu::Gate{rows_of(gate), rows_of(up), at(y), rows, width,
                               static_cast<codegemm::cpu::Activation>(activation),
                               static_cast<codegemm::DType>(dtype)});
}

void step_soft_cap(Step& step, Address x, int64_t rows, int64_t width, float softcap, int dtype) {
  step.add(codegemm::cpu::SoftCap{at(x), rows, width, softcap, static_cast<codegemm::DType>(dtype)});
}

void step_choose(Step& step, Address scores, Address tokens, int64_t rows, int64_t width, int dtype) {
  step.add(codegemm::cpu::Choose{at(scores), at<int64_t>(tokens), rows, width, static_cast<codegemm::DType>(dtype)});
}

void add_step(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  using py::arg, py::kw_only;
  py::class_<Step>(m, "Step", "A decode step as a list of operations on fixed addresses, see csrc/cpu/step.h.")
      .def(py::init<int>(), kw_only(), arg("threads"))
      .def("embed", step_embed, kw_only(), arg("table"), arg("tokens"), arg("y"), arg("rows"), arg("width"),
           arg("vocabulary"), arg("dtype"))
      .def("add_norm", step_add_norm, kw_only(), arg("residual"), arg("branch"), arg("branch_norm"), arg("norm"),
           arg("y"), arg("rows"), arg("width"), arg("dtype"))
      .def("products", step_products, kw_only(), arg("codes"), arg("codebooks"), arg("scales"), arg("biases"),
           arg("ys"), arg("num_codebooks"), arg("vector_length"), arg("num_groups"), arg("out_features"), arg("tiled"),
           arg("in_features"), arg("dtype"), arg("x"), arg("rows"))
      .def("dense", step_dense, kw_only(), arg("weight"), arg("x"), arg("bias"), arg("y"), arg("rows"),
           arg("out_features"), arg("in_features"), arg("dtype"))
      .def("attend", step_attend, kw_only(), arg("q"), arg("k"), arg("v"), arg("y"), arg("q_norm"), arg("k_norm"),
           arg("cos"), arg("sin"), arg("keys"), arg("values"), arg("key_scales"), arg("value_scales"), arg("lengths"),
           arg("slots"), arg("heads"), arg("kv_heads"), arg("head_dim"), arg("pairs"), arg("capacity"), arg("window"),
           arg("scale"), arg("softcap"), arg("dtype"))
      .def("gate", step_gate, kw_only(), arg("gate"), arg("up"), arg("y"), arg("rows"), arg("width"), arg("activation"),
           arg("dtype"))
      .def("soft_cap", step_soft_cap, kw_only(), arg("x"), arg("rows"), arg("width"), arg("softcap"), arg("dtype"))
      .def("choose", step_choose, kw_only(), arg("scores"), arg("tokens"), arg("rows"), arg("width"), arg("dtype"))
      .def("prepare", &Step::prepare, release())
      .def("run", &Step::run, release(), kw_only(), arg("threads"));
}

#ifdef CODEGEMM_WITH_CUDA
// The first launch of a kernel raises its limits and notes that it has (prepare_kernel): one thread at a time.
std::unique_lock<std::mutex> turn_to_launch() {
  static std::mutex mutex;
  return std::unique_lock<std::mutex>(mutex);
}

void check(const char* failure) {
  if (failure != nullptr) throw std::runtime_error(failure);
}

void gemm_cuda(Address codes, Address codebooks, Address scales, int num_codebooks, int vector_length,
               int64_t num_groups, int64_t out_features, int64_t in_features, int dtype, Address x,
               int64_t x_row_stride, Address bias, Address y, int64_t rows, int device, Address stream) {
  const auto turn = turn_to_launch();
  check(codegemm::cuda::gemm(gemm_call(weight(codes, codebooks, scales, num_codebooks, vector_length, num_groups,
                                              out_features, in_features, dtype),
                                       x, x_row_stride, bias, y, rows),
                             device, reinterpret_cast<void*>(stream)));
}

void dequantize_cuda(Address codes, Address codebooks, Address scales, int num_codebooks, int vector_length,
                     int64_t num_groups, int64_t out_features, int64_t in_features, int dtype, Address y,
                     int64_t first_row, int64_t rows, int device, Address stream) {
  const auto turn = turn_to_launch();
  check(codegemm::cuda::dequantize(
      {weight(codes, codebooks, scales, num_codebooks, vector_length, num_groups, out_features, in_features, dtype),
       reinterpret_cast<void*>(y)},
      first_row, rows, device, reinterpret_cast<void*>(stream)));
}

void gemm_grouped_cuda(const Addresses& codes, const Addresses& codebooks, const Addresses& scales,
                       const Addresses& biases, const Addresses& ys, const std::vector<int64_t>& out_features,
                       int num_codebooks, int vector_length, int64_t num_groups, int64_t in_features, int dtype,
                       Address x, int64_t x_row_stride, int64_t rows, int device, Address stream) {
  const auto calls = gemm_calls(codes, codebooks, scales, biases, ys, out_features, num_codebooks, vector_length,
                                num_groups, in_features, dtype, x, x_row_stride, rows, false);
  const auto turn = turn_to_launch();
  check(codegemm::cuda::gemm_grouped(calls.data(), static_cast<int>(calls.size()), device,
                                     reinterpret_cast<void*>(stream)));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  using py::arg;
  m.doc() = "Compiled kernels on raw addresses; called by codegemm_kernels.ops and .step after full checks.";
  m.def("gemm_cpu", gemm_cpu, release(), py::kw_only(), arg("codes"), arg("codebooks"), arg("scales"),
        arg("num_codebooks"), arg("vector_length"), arg("num_groups"), arg("out_features"), arg("in_features"),
        arg("dtype"), arg("x"), arg("x_row_stride"), arg("bias"), arg("y"), arg("rows"), arg("tiled"), arg("threads"));
  m.def("gemm_grouped_cpu", gemm_grouped_cpu, release(), py::kw_only(), arg("codes"), arg("codebooks"), arg("scales"),
        arg("biases"), arg("ys"), arg("out_features"), arg("num_codebooks"), arg("vector_length"), arg("num_groups"),
        arg("in_features"), arg("dtype"), arg("x"), arg("x_row_stride"), arg("rows"), arg("tiled"), arg("threads"));
  m.def("dequantize_cpu", dequantize_cpu, release(), py::kw_only(), arg("codes"), arg("codebooks"), arg("scales"),
        arg("num_codebooks"), arg("vector_length"), arg("num_groups"), arg("out_features"), arg("in_features"),
        arg("dtype"), arg("y"), arg("first_row"), arg("rows"), arg("tiled"), arg("threads"));
  m.def("tile", tile, release(), py::kw_only(), arg("codes"), arg("num_codebooks"), arg("vector_length"),
        arg("num_groups"), arg("out_features"), arg("in_features"), arg("y"), arg("threads"));
  m.def("untile", untile, release(), py::kw_only(), arg("codes"), arg("num_codebooks"), arg("vector_length"),
        arg("num_groups"), arg("out_features"), arg("in_features"), arg("y"), arg("threads"));
  add_step(m);
  m.def("max_gemm_rows", &codegemm::cpu::max_gemm_rows, "Rows of x up to which gemm_cpu is the faster way.");
  m.def("cpu_features", &codegemm::cpu::features, "The instruction set whose kernels are used.");
  m.def("limit_cpu_features", &codegemm::cpu::limit_features, py::kw_only(), arg("name"),
        "Use a lesser instruction set, for tests; false when this processor has none of this name.");
#ifdef CODEGEMM_WITH_CUDA
  m.def("gemm_cuda", gemm_cuda, release(), py::kw_only(), arg("codes"), arg("codebooks"), arg("scales"),
        arg("num_codebooks"), arg("vector_length"), arg("num_groups"), arg("out_features"), arg("in_features"),
        arg("dtype"), arg("x"), arg("x_row_stride"), arg("bias"), arg("y"), arg("rows"), arg("device"), arg("stream"));
  m.def("dequantize_cuda", dequantize_cuda, release(), py::kw_only(), arg("codes"), arg("codebooks"), arg("scales"),
        arg("num_codebooks"), arg("vector_length"), arg("num_groups"), arg("out_features"), arg("in_features"),
        arg("dtype"), arg("y"), arg("first_row"), arg("rows"), arg("device"), arg("stream"));
  m.def("gemm_grouped_cuda", gemm_grouped_cuda, release(), py::kw_only(), arg("codes"), arg("codebooks"), arg("scales"),
        arg("biases"), arg("ys"), arg("out_features"), arg("num_codebooks"), arg("vector_length"), arg("num_groups"),
        arg("in_features"), arg("dtype"), arg("x"), arg("x_row_stride"), arg("rows"), arg("device"), arg("stream"));
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
