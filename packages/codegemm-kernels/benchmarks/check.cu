// Random shapes, schemes, strides and offsets through the public API against the exact product in fp64. Needs nvcc and
// a GPU only; compute-sanitizer runs over it too (give it a small count, "small" for smaller shapes, and perhaps a
// number of tokens that all cases are to have):
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -Icsrc benchmarks/check.cu csrc/cuda/*.cu -o check &&
//   ./check 300
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "measure.cuh"

using namespace codegemm;
using bench::Buffer;

namespace {

std::mt19937 generator(7);
int pick(std::initializer_list<int> values) { return values.begin()[generator() % values.size()]; }

// y of a call survives only if the kernel writes all of it and nothing beyond it.
template <typename T>
struct Output {
  static constexpr size_t kGuard = 64;
  Buffer<T> memory;
  size_t count;
  explicit Output(size_t n) : memory(n + 2 * kGuard), count(n) {
    bench::require(cudaMemset(memory.data, 0xff, memory.count * sizeof(T)), "poison");  // NaN in every dtype
  }
  T* data() { return memory.data + kGuard; }
  std::vector<T> host() {
    std::vector<T> copy(memory.count);
    bench::require(cudaMemcpy(copy.data(), memory.data, copy.size() * sizeof(T), cudaMemcpyDeviceToHost), "output");
    return copy;
  }
  bool guards_intact(const std::vector<T>& copy) const {
    std::vector<unsigned char> poison(kGuard * sizeof(T), 0xff);
    return !std::memcmp(copy.data(), poison.data(), poison.size()) &&
           !std::memcmp(copy.data() + kGuard + count, poison.data(), poison.size());
  }
};

struct Case {
  int m, v, g, rows, columns, tokens, offset, count;
  int poisoned;   // a token whose x has an infinity; -1: none
  float balance;  // x is so much larger, entries are so much smaller
  bool bias;
};

Case random_case(bool small, int tokens) {
  Case c;
  c.m = pick({1, 1, 2, 2, 3, 4});
  c.v = pick({4, 8, 16});
  c.g = pick({32, 64, 128, 128, 256, -1});
  const int unit = std::max(4 * c.v, c.g);  // both are powers of two
  c.columns = unit * (1 + generator() % (small ? 600 / unit + 2 : 9000 / unit + 2));
  c.rows = pick({1, 3, 8, 16, 24, 31, 64, 100, 1000, 1001, 1028, 4096});
  if (small) c.rows = std::min(c.rows, 100);
  c.tokens = pick({1, 1, 1, 2, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 70, 130, 300, 700});
  c.offset = pick({0, 0, 0, 1});
  c.count = pick({1, 1, 2, 3});
  c.bias = pick({0, 1});
  if (tokens) c.tokens = tokens;
  c.poisoned = pick({0, 0, 1}) ? int(generator() % c.tokens) : -1;
  // Weights of 1e-5 are denormal fp16 numbers, which kernels that multiply entries by scales first may round.
  c.balance = std::ldexp(1.0f, c.tokens <= 2 ? pick({0, 0, 10, -10}) : pick({0, 0, -10}));
  return c;
}

// Of all tokens but one; of that one every result must be an infinity or a NaN.
template <typename T>
bench::Errors errors_beside(Gemm call, int poisoned) {
  if (poisoned < 0) return bench::compare<T>(call);
  bench::Errors worst = {0, 0};
  const int64_t columns = call.weight.out_features, tokens = call.rows;
  T* const result = static_cast<T*>(call.y);
  std::vector<T> y(columns);
  bench::require(cudaMemcpy(y.data(), result + poisoned * columns, columns * sizeof(T), cudaMemcpyDeviceToHost), "y");
  for (const T& value : y)
    if (std::isfinite(float(value))) worst.largest = INFINITY;
  for (const int64_t first : {int64_t(0), int64_t(poisoned + 1)}) {
    call.rows = first ? tokens - first : poisoned;
    if (call.rows == 0) continue;
    Gemm part = call;
    part.x = static_cast<const T*>(call.x) + first * call.x_row_stride;
    part.y = result + first * columns;
    const bench::Errors error = bench::compare<T>(part);
    worst = {std::max(worst.norm, error.norm), std::max(worst.largest, error.largest)};
  }
  return worst;
}

template <typename T>
bool check_products(const Case& c, DType dtype, double bound) {
  const int64_t groups = c.g < 0 ? 1 : c.columns / c.g, stride = c.columns + (c.offset ? 3 : 8);
  const size_t entries = size_t(c.m) * 256 * c.v;
  Buffer<T> x(c.tokens * stride + 1);
  bench::fill_floats<<<64, 256>>>(x.data, x.count, generator(), 0.1f * c.balance, c.balance);
  if (c.poisoned >= 0) {
    const T infinity = T(INFINITY);
    T* place = x.data + c.offset + c.poisoned * stride + generator() % c.columns;
    bench::require(cudaMemcpy(place, &infinity, sizeof(T), cudaMemcpyHostToDevice), "infinity");
  }
  std::vector<std::unique_ptr<Buffer<uint32_t>>> codes;
  std::vector<std::unique_ptr<Buffer<T>>> floats;
  std::vector<std::unique_ptr<Output<T>>> first, second;
  std::vector<Gemm> calls;
  for (int i = 0; i < c.count; ++i) {
    const int64_t rows = i == 0 ? c.rows : std::max(1, c.rows / (i + 1) / 8 * 8);
    const auto real = [&](size_t n, float center, float width) {
      floats.push_back(std::make_unique<Buffer<T>>(n + 1));
      bench::fill_floats<<<64, 256>>>(floats.back()->data, n + 1, generator(), center, width);
      return floats.back()->data + c.offset;
    };
    codes.push_back(std::make_unique<Buffer<uint32_t>>(size_t(c.m) * c.columns / (4 * c.v) * rows + 1));
    bench::fill_words<<<64, 256>>>(codes.back()->data, codes.back()->count, generator());
    const Weight weight = {codes.back()->data + c.offset,
                           real(entries, 0.0f, 0.5f / c.balance),
                           real(groups * rows, 0.02f, 0.005f),
                           c.m,
                           c.v,
                           groups,
                           rows,
                           c.columns,
                           dtype};
    first.push_back(std::make_unique<Output<T>>(c.tokens * rows));
    second.push_back(std::make_unique<Output<T>>(c.tokens * rows));
    calls.push_back(
        {weight, x.data + c.offset, stride, c.bias ? real(rows, 0.0f, 1.0f) : nullptr, first[i]->data(), c.tokens});
  }
  cudaStream_t stream;
  bench::require(cudaStreamCreate(&stream), "stream");
  bench::require(cudaDeviceSynchronize(), "random data");
  bench::require(cuda::gemm_grouped(calls.data(), c.count, 0, stream), "gemm_grouped");
  bench::require(cudaStreamSynchronize(stream), "gemm_grouped");
  std::vector<Gemm> again = calls;
  for (int i = 0; i < c.count; ++i) again[i].y = second[i]->data();
  bench::require(cuda::gemm_grouped(again.data(), c.count, 0, stream), "gemm_grouped");
  bench::require(cudaStreamSynchronize(stream), "gemm_grouped");
  cudaStreamDestroy(stream);
  bool good = true;
  for (int i = 0; i < c.count; ++i) {
    const bench::Errors error = errors_beside<T>(calls[i], c.poisoned);
    const std::vector<T> a = first[i]->host(), b = second[i]->host();
    const bool repeats = !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
    if (error.largest <= bound && repeats && first[i]->guards_intact(a)) continue;
    good = false;
    std::printf("FAIL gemm %d/%d dtype %d m%dv%dg%d N %lld K %d M %d offset %d: error %.2e (norm %.2e)%s%s\n", i,
                c.count, int(dtype), c.m, c.v, c.g, (long long)calls[i].weight.out_features, c.columns, c.tokens,
                c.offset, error.largest, error.norm, repeats ? "" : ", differs between runs",
                first[i]->guards_intact(a) ? "" : ", wrote outside y");
  }
  return good;
}

// The dequantised weight against the exact one: multiplying by the identity's rows needs no second reference.
template <typename T>
bool check_dequantize(Case c, DType dtype, double bound) {
  c.columns = std::min(c.columns, std::max(4 * c.v, c.g) * 4);
  const int64_t groups = c.g < 0 ? 1 : c.columns / c.g;
  Buffer<uint32_t> codes(size_t(c.m) * c.columns / (4 * c.v) * c.rows);
  Buffer<T> codebooks(size_t(c.m) * 256 * c.v), scales(groups * c.rows), identity(size_t(c.columns) * c.columns);
  bench::fill_words<<<64, 256>>>(codes.data, codes.count, generator());
  bench::fill_floats<<<64, 256>>>(codebooks.data, codebooks.count, generator(), 0.0f, 0.5f);
  bench::fill_floats<<<64, 256>>>(scales.data, scales.count, generator(), 0.02f, 0.005f);
  std::vector<T> one(identity.count, T(0.0f));
  for (int i = 0; i < c.columns; ++i) one[size_t(i) * c.columns + i] = T(1.0f);
  cudaMemcpy(identity.data, one.data(), one.size() * sizeof(T), cudaMemcpyHostToDevice);
  const Weight weight = {codes.data, codebooks.data, scales.data, c.m, c.v, groups, c.rows, c.columns, dtype};
  Output<T> w(size_t(c.rows) * c.columns);
  bench::require(cuda::dequantize({weight, w.data()}, 0, c.rows, 0, nullptr), "dequantize");
  const std::vector<T> rows_first = w.host();
  Output<T> transposed(w.count);  // row k of I Wᵀ is column k of W
  std::vector<T> columns_first(w.count);
  for (int64_t n = 0; n < c.rows; ++n)
    for (int64_t k = 0; k < c.columns; ++k)
      columns_first[k * c.rows + n] = rows_first[Output<T>::kGuard + n * c.columns + k];
  cudaMemcpy(transposed.data(), columns_first.data(), columns_first.size() * sizeof(T), cudaMemcpyHostToDevice);
  const bench::Errors error =
      bench::compare<T>({weight, identity.data, c.columns, nullptr, transposed.data(), c.columns});
  if (error.norm <= bound && w.guards_intact(rows_first)) return true;
  std::printf("FAIL dequantize dtype %d m%dv%dg%d N %d K %d: error %.2e\n", int(dtype), c.m, c.v, c.g, c.rows,
              c.columns, error.norm);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  const bool small = argc > 2 && !std::strcmp(argv[2], "small");
  const int tokens = argc > 3 ? std::atoi(argv[3]) : 0;
  int failures = 0;
  for (int i = 0; i < cases; ++i) {
    const Case c = random_case(small, tokens);
    bool good;
    switch (generator() % 5) {  // bounds: rounding of y and of scale*weight, in units of sum |w||x|
      case 0:
        good = check_products<float>(c, DType::kFloat32, 2e-6) && check_dequantize<float>(c, DType::kFloat32, 1e-6);
        break;
      case 1:
      case 2:
        good = check_products<__half>(c, DType::kFloat16, 1.2e-3) && check_dequantize<__half>(c, DType::kFloat16, 6e-4);
        break;
      default:
        good = check_products<__nv_bfloat16>(c, DType::kBFloat16, 9e-3) &&
               check_dequantize<__nv_bfloat16>(c, DType::kBFloat16, 5e-3);
    }
    failures += !good;
  }
  std::printf("%d of %d cases failed\n", failures, cases);
  return failures != 0;
}
