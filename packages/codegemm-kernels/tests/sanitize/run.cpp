// Random calls of the CPU kernels, for a build with sanitizers (CODEGEMM_SANITIZE in CMakeLists.txt): every buffer is
// an allocation of its own that ends with its last element, so that a read or write beside it stops the program.
//
//   codegemm_sanitize CASES SEED INSTRUCTION_SET
//
// Prints the number of cases. Exit status 1 for a wrong number, 2 for an instruction set that is not there.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "codegemm.h"
#include "cpu/features.h"
#include "cpu/floats.h"
#include "cpu/step.h"

using namespace codegemm;

namespace {

// A buffer whose elements begin `offset` elements into an allocation; the bytes before them are checked at the end.
template <class T>
class Guarded {
 public:
  Guarded(size_t count, size_t offset)
      : before_(offset * sizeof(T)), bytes_(new unsigned char[before_ + count * sizeof(T)]) {
    std::memset(bytes_.get(), kPoison, before_ + count * sizeof(T));
  }
  ~Guarded() {
    for (size_t i = 0; i < before_; ++i) {
      if (bytes_[i] != kPoison) std::fprintf(stderr, "wrote before a buffer\n"), std::abort();
    }
  }
  T* data() { return reinterpret_cast<T*>(bytes_.get() + before_); }

 private:
  static constexpr unsigned char kPoison = 0xff;  // NaN in every dtype
  size_t before_;
  std::unique_ptr<unsigned char[]> bytes_;
};

using Random = std::mt19937_64;

int64_t draw(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// fp32 values and the same rounded to a dtype, in a guarded buffer.
struct Numbers {
  std::vector<float> exact;
  std::unique_ptr<Guarded<uint16_t>> narrow;
  std::unique_ptr<Guarded<float>> wide;
  const void* data;

  // Rows of `width` values that start `stride` elements apart; what lies between them is NaN.
  Numbers(Random& random, DType dtype, int64_t rows, int64_t width, int64_t stride, float size) : exact(rows * width) {
    const size_t count = rows == 0 ? 0 : (rows - 1) * stride + width, offset = draw(random, 0, 3);
    std::normal_distribution<float> normal(0, size);
    if (dtype == DType::kFloat32) {
      wide = std::make_unique<Guarded<float>>(count, offset);
      fill(random, normal, rows, width, stride, wide->data(), [](float value) { return value; });
      data = wide->data();
      return;
    }
    narrow = std::make_unique<Guarded<uint16_t>>(count, offset);
    const bool half = dtype == DType::kFloat16;
    fill(random, normal, rows, width, stride, narrow->data(), [half](float value) {
      return half ? cpu::narrow<cpu::Half>(value).bits : cpu::narrow<cpu::BFloat16>(value).bits;
    });
    for (auto& value : exact) {
      value = half ? cpu::widen(cpu::narrow<cpu::Half>(value)) : cpu::widen(cpu::narrow<cpu::BFloat16>(value));
    }
    data = narrow->data();
  }

 private:
  template <class T, class F>
  void fill(Random& random, std::normal_distribution<float>& normal, int64_t rows, int64_t width, int64_t stride, T* to,
            F&& rounded) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        exact[i * width + j] = normal(random);
        to[i * stride + j] = rounded(exact[i * width + j]);
      }
    }
  }
};

double widened(const void* y, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(y)[i];
  if (dtype == DType::kFloat16) return cpu::widen(static_cast<const cpu::Half*>(y)[i]);
  return cpu::widen(static_cast<const cpu::BFloat16*>(y)[i]);
}

void expect(bool right, const char* what, const Weight& w, int64_t rows) {
  if (right) return;
  std::fprintf(stderr, "%s is wrong: m%d v%d G%lld N%lld K%lld dtype %d rows %lld\n", what, w.num_codebooks,
               w.vector_length, (long long)w.num_groups, (long long)w.out_features, (long long)w.in_features,
               int(w.dtype), (long long)rows);
  std::exit(1);
}

// W [N, K] in double.
std::vector<double> exact_weight(const Weight& w, const Numbers& codebooks, const Numbers& scales) {
  const int v = w.vector_length;
  const int64_t N = w.out_features, K = w.in_features, words = K / (4 * v), per_group = K / w.num_groups;
  std::vector<double> weight(N * K);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      for (int i = 0; i < w.num_codebooks; ++i) {
        const uint32_t word = w.codes[(i * words + k / (4 * v)) * N + n];
        const int code = word >> (8 * (k / v % 4)) & 0xff;
        weight[n * K + k] += codebooks.exact[(i * 256 + code) * v + k % v];
      }
      weight[n * K + k] *= scales.exact[k / per_group * N + n];
    }
  }
  return weight;
}

void check_dequantize(Random& random, const Weight& weight, const std::vector<double>& exact, int threads) {
  const int64_t N = weight.out_features, K = weight.in_features;
  const int64_t first = draw(random, 0, N - 1), rows = draw(random, 1, N - first);
  const bool wide = weight.dtype == DType::kFloat32;
  Guarded<float> y32(wide ? rows * K : 0, draw(random, 0, 3));
  Guarded<uint16_t> y16(wide ? 0 : rows * K, draw(random, 0, 3));
  void* y = wide ? static_cast<void*>(y32.data()) : y16.data();
  cpu::dequantize({weight, y}, first, rows, threads);
  for (int64_t i = 0; i < rows * K; ++i) {
    const double wanted = exact[first * K + i], error = std::fabs(widened(y, weight.dtype, i) - wanted);
    expect(error <= 1e-2 * std::fabs(wanted) + 1e-4, "dequantize", weight, rows);
  }
}

void check_gemm(Random& random, const Weight& weight, const std::vector<double>& exact, int64_t rows, int threads) {
  const int64_t N = weight.out_features, K = weight.in_features, stride = K + draw(random, 0, 5);
  const Numbers x(random, weight.dtype, rows, K, stride, 1), bias(random, weight.dtype, 1, N, N, 1);
  const bool wide = weight.dtype == DType::kFloat32, biased = draw(random, 0, 1);
  Guarded<float> y32(wide ? rows * N : 0, draw(random, 0, 3));
  Guarded<uint16_t> y16(wide ? 0 : rows * N, draw(random, 0, 3));
  void* y = wide ? static_cast<void*>(y32.data()) : y16.data();
  cpu::gemm({weight, x.data, stride, biased ? bias.data : nullptr, y, rows}, threads);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = biased ? bias.exact[n] : 0, size = std::fabs(sum);
      for (int64_t k = 0; k < K; ++k) {
        const double term = exact[n * K + k] * x.exact[i * K + k];
        sum += term, size += std::fabs(term);
      }
      const double error = std::fabs(widened(y, weight.dtype, i * N + n) - sum);
      expect(error <= (weight.dtype == DType::kBFloat16 ? 5e-3 : 1e-3) * size + 1e-6, "gemm", weight, rows);
    }
  }
}

void one_case(Random& random) {
  const int m = int(draw(random, 1, 4)), v = 4 << draw(random, 0, 2);
  const int64_t words = draw(random, 1, 12), vectors = 4 * words, N = draw(random, 1, draw(random, 0, 3) ? 40 : 300);
  int64_t groups = 1;
  do groups = draw(random, 1, vectors);
  while (vectors % groups != 0);
  const DType dtype = DType(draw(random, 0, 2));
  const Numbers codebooks(random, dtype, 1, int64_t(m) * 256 * v, 0, 0.5f);
  const Numbers scales(random, dtype, 1, groups * N, 0, 0.3f);
  Guarded<uint32_t> codes(m * words * N, draw(random, 0, 3));
  for (int64_t i = 0; i < m * words * N; ++i) codes.data()[i] = uint32_t(random());
  const Weight weight{codes.data(), codebooks.data, scales.data, m, v, groups, N, vectors * v, dtype};
  const std::vector<double> exact = exact_weight(weight, codebooks, scales);
  const int threads = int(draw(random, 1, 3));
  const int64_t rows = draw(random, 0, 3) ? draw(random, 1, 9) : draw(random, 10, 70);
  check_dequantize(random, weight, exact, threads);
  check_gemm(random, weight, exact, rows, threads);
  Guarded<uint8_t> tiled(4 * m * words * N, 4 * draw(random, 0, 3));
  Guarded<uint32_t> again(m * words * N, draw(random, 0, 3));
  cpu::tile(weight, tiled.data(), threads);
  Weight fast = weight;
  fast.codes = reinterpret_cast<const uint32_t*>(tiled.data());
  fast.tiled = true;
  cpu::untile(fast, again.data(), threads);
  expect(std::memcmp(again.data(), codes.data(), 4 * m * words * N) == 0, "untile", weight, rows);
  check_dequantize(random, fast, exact, threads);
  check_gemm(random, fast, exact, rows, threads);
}

template <class T>
struct Integers : Guarded<T> {
  Integers(Random& random, int64_t count, int64_t low, int64_t high) : Guarded<T>(count, draw(random, 0, 3)) {
    for (int64_t i = 0; i < count; ++i) this->data()[i] = T(draw(random, low, high));
  }
};

// A recorded step of every operation, run twice: tokens in, tokens out.
void step_case(Random& random) {
  const DType dtype = DType(draw(random, 0, 2));
  const int64_t rows = draw(random, 1, 5), head_dim = draw(random, 2, 70), kv_heads = draw(random, 1, 3);
  const int64_t heads = kv_heads * draw(random, 1, 7), pairs = draw(random, 1, head_dim / 2), width = heads * head_dim;
  const int64_t inner = draw(random, 1, 300), vocabulary = draw(random, 1, 5000), capacity = draw(random, 1, 200);
  const bool int8 = draw(random, 0, 1), normed = draw(random, 0, 1);
  const auto numbers = [&](int64_t count, int64_t each, DType type) {
    return Numbers(random, type, count, each, each + (count == 1 ? 0 : draw(random, 0, 3)), 1);
  };
  const auto exact = [&](int64_t count) { return Numbers(random, dtype, 1, count, count, 1); };
  const auto to = [](const Numbers& buffer) { return const_cast<void*>(buffer.data); };
  const Numbers table = exact(vocabulary * width), residual = exact(rows * width), y = exact(rows * width);
  const Numbers weight = exact(width), head_weight = exact(head_dim), mixed = exact(rows * width);
  const Numbers up = exact(inner * width), gated = exact(rows * inner), logits = exact(rows * vocabulary);
  const Numbers head = exact(vocabulary * inner), bias = exact(vocabulary), gates = exact(rows * 2 * inner + 1);
  const Numbers keys = exact(rows * kv_heads * capacity * head_dim),
                values = exact(rows * kv_heads * capacity * head_dim);
  const Numbers k = exact(rows * kv_heads * head_dim), angles = numbers(1, capacity * pairs, DType::kFloat32);
  const Numbers scales = numbers(1, rows * kv_heads * capacity, DType::kFloat32);
  Integers<int8_t> codes(random, rows * kv_heads * capacity * head_dim, -127, 127);
  Integers<int32_t> lengths(random, rows, 0, capacity + 2);
  Integers<int64_t> tokens(random, rows, 0, vocabulary - 1);
  float* scale = int8 ? static_cast<float*>(to(scales)) : nullptr;
  const auto* turn = static_cast<const float*>(angles.data);
  const cpu::Norm norm{weight.data, 1e-5f, 1}, none{nullptr, 0, 0};
  const cpu::Norm head_norm{normed ? head_weight.data : nullptr, 1e-5f, 0};
  cpu::Step step(int(draw(random, 1, 40)));
  step.add(cpu::Embed{table.data, tokens.data(), to(residual), rows, width, vocabulary, dtype});
  step.add(cpu::AddNorm{to(residual), y.data, normed ? norm : none, norm, to(y), rows, width, dtype});
  step.add(cpu::Attention{{to(y), width},
                          {to(k), kv_heads * head_dim},
                          {to(k), kv_heads * head_dim},
                          to(mixed),
                          head_norm,
                          head_norm,
                          turn,
                          turn,
                          int8 ? codes.data() : to(keys),
                          int8 ? codes.data() : to(values),
                          scale,
                          scale,
                          lengths.data(),
                          rows,
                          heads,
                          kv_heads,
                          head_dim,
                          pairs,
                          capacity,
                          draw(random, 0, capacity),
                          0.1f,
                          float(draw(random, 0, 1)),
                          dtype});
  step.add(cpu::Dense{up.data, {to(mixed), width}, nullptr, to(gated), rows, inner, width, dtype});
  step.add(cpu::Gate{
      {to(gates), 2 * inner}, {to(gated), inner}, to(gated), rows, inner, cpu::Activation(draw(random, 0, 1)), dtype});
  step.add(cpu::Dense{head.data, {to(gated), inner}, bias.data, to(logits), rows, vocabulary, inner, dtype});
  step.add(cpu::SoftCap{to(logits), rows, vocabulary, 30, dtype});
  step.add(cpu::Choose{logits.data, tokens.data(), rows, vocabulary, dtype});
  step.prepare();
  for (int run = 0; run < 2; ++run) step.run(int(draw(random, 1, 3)));
  for (int64_t i = 0; i < rows * vocabulary; ++i) {
    const int64_t best = tokens.data()[i / vocabulary];
    const double chosen = widened(logits.data, dtype, i / vocabulary * vocabulary + best);
    if (best >= 0 && best < vocabulary && widened(logits.data, dtype, i) <= chosen) continue;
    std::fprintf(stderr, "a step chose token %lld of %lld\n", (long long)best, (long long)vocabulary);
    std::exit(1);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4 || !cpu::limit_features(arguments[3])) return 2;
  const int cases = std::atoi(arguments[1]), seed = std::atoi(arguments[2]);
  // Two callers at once, as from a server's threads: they share the pool.
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 2; ++caller) {
    callers.emplace_back([=] {
      Random random(2 * seed + caller);
      for (int i = 0; i < cases; ++i) {
        one_case(random);
        step_case(random);
      }
    });
  }
  for (auto& caller : callers) caller.join();
  std::printf("%d\n", 2 * cases);
  return 0;
}
