// The Python module `_C`: integers in, structs of codegemm.h out. Every check is done by ops.py, its only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "codegemm.h"
#include "cpu/features.h"

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

#ifdef CODEGEMM_WITH_CUDA
void check(const char* failure) {
  if (failure != nullptr) throw std::runtime_error(failure);
}

void gemm_cuda(Address codes, Address codebooks, Address scales, int num_codebooks, int vector_length,
               int64_t num_groups, int64_t out_features, int64_t in_features, int dtype, Address x,
               int64_t x_row_stride, Address bias, Address y, int64_t rows, int device, Address stream) {
  check(codegemm::cuda::gemm(gemm_call(weight(codes, codebooks, scales, num_codebooks, vector_length, num_groups,
                                              out_features, in_features, dtype),
                                       x, x_row_stride, bias, y, rows),
                             device, reinterpret_cast<void*>(stream)));
}

void dequantize_cuda(Address codes, Address codebooks, Address scales, int num_codebooks, int vector_length,
                     int64_t num_groups, int64_t out_features, int64_t in_features, int dtype, Address y,
                     int64_t first_row, int64_t rows, int device, Address stream) {
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
  check(codegemm::cuda::gemm_grouped(calls.data(), static_cast<int>(calls.size()), device,
                                     reinterpret_cast<void*>(stream)));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  using py::arg;
  m.doc() = "Compiled kernels on raw addresses; called by codegemm_kernels.ops after full checks.";
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
