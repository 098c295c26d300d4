// Random products by the fast CUDA kernels, emulated on the CPU, against fp64. Arguments: number of cases, seed.
#include "cuda/ptx.cuh"  // before the kernels: it defines what they take from CUDA

#include "cuda/codebook_flow.cuh"
#include "cuda/codebook_gemm.cuh"
#include "cuda/codebook_mma.cuh"
#include "cuda/codebook_wgmma.cuh"
#include "cuda/psumbook.cuh"

using namespace codegemm;
using namespace codegemm::cuda;

namespace {

std::mt19937 generator;
// Launches; those whose x does not fit at once; those whose clusters compute several ranges.
int ran_cases = 0, chunked = 0, many_ranges = 0;
int pick(std::initializer_list<int> values) { return values.begin()[generator() % values.size()]; }

template <typename T>
std::vector<T> floats(size_t n, float center, float width) {
  std::normal_distribution<float> normal(center, width);
  std::vector<T> values(n);
  for (T& v : values) v = T(normal(generator));
  return values;
}

template <typename T>
struct Matrix {
  int rows;
  std::vector<uint32_t> codes;
  std::vector<T> codebooks, scales, bias, y;
};

struct Case {
  int m, v, columns, groups, tokens;
};

// No weight has code 255, and whoever looks it up gets infinity: shared memory that nobody has written is 0xff.
template <typename T>
void hide_code_255(const Case& c, std::vector<Matrix<T>>& matrices) {
  for (Matrix<T>& w : matrices) {
    for (uint32_t& word : w.codes) word &= 0xfefefefe;
    for (int i = 0; i < c.m; ++i) std::fill_n(w.codebooks.begin() + (i * 256 + 255) * c.v, c.v, T(INFINITY));
  }
}

template <typename T>
double largest_error(const Case& c, const Matrix<T>& w, const std::vector<T>& x) {
  const int words = c.columns / (4 * c.v);
  double worst = 0;
  for (int row = 0; row < w.rows; ++row) {
    std::vector<double> weight(c.columns);
    for (int k = 0; k < c.columns; ++k) {
      for (int i = 0; i < c.m; ++i) {
        const uint32_t word = w.codes[(size_t(i) * words + k / c.v / 4) * w.rows + row];
        weight[k] += float(w.codebooks[(i * 256 + (word >> (8 * (k / c.v % 4)) & 255)) * c.v + k % c.v]);
      }
      weight[k] *= float(w.scales[size_t(k / (c.columns / c.groups)) * w.rows + row]);
    }
    for (int token = 0; token < c.tokens; ++token) {
      double exact = float(w.bias[row]), size = std::abs(exact);
      for (int k = 0; k < c.columns; ++k) {
        exact += weight[k] * float(x[size_t(token) * c.columns + k]);
        size += std::abs(weight[k] * float(x[size_t(token) * c.columns + k]));
      }
      const double error = std::abs(float(w.y[size_t(token) * w.rows + row]) - exact) / size;
      worst = error == error ? std::max(worst, error) : INFINITY;
    }
  }
  return worst;
}

template <typename T, int V, int kTokens, bool kScaleSums>
bool run_mma(Product p, unsigned seed) {
  const int cluster = CODEGEMM_HAS_CLUSTERS ? pick({1, 2, 4}) : 1, warps = pick({8, 16});
  MmaShape shape;
  if (!make_mma_shape(shape, p, {V, kTokens, kScaleSums}, warps, cluster, pick({1, 2}), pick({130, 180, 227}) * 1024))
    return false;
  shape.staged_chunks = std::min(shape.staged_chunks, pick({1, 2, 1000}));
  chunked += shape.staged_chunks < shape.chunks.each;
  many_ranges += shape.first_range[kMaxSegments] > shape.clusters;
  emulation::launch(shape.clusters * cluster, warps * 32, cluster, shape.bytes, seed,
                    [&] { codebook_mma_kernel<T, V, kTokens, kScaleSums>(p, shape); });
  return true;
}

template <typename T, int V>
bool run_flow(Product p, unsigned seed) {
  const int cluster = pick({1, 2, 4});
  FlowShape shape;
  if (!make_flow_shape(shape, p, V, cluster, p.segments * pick({1, 2}), pick({150, 227, 400}) * 1024)) return false;
  shape.section_tiles = std::min(shape.section_tiles, pick({1, 2, 1000}));
  many_ranges += shape.tiles > 1;
  emulation::launch(shape.first_cluster[kMaxSegments] * cluster, kFlowWarps * 32, cluster, shape.bytes, seed,
                    [&] { codebook_flow_kernel<T, V>(p, shape); });
  return true;
}

template <typename T, int V, int kTiles, int kStrips, int kBooks>
bool run_gemm(Product p, unsigned seed) {
  const int cluster = CODEGEMM_HAS_CLUSTERS ? pick({1, 2, 3, 4}) : 1;
  const GemmShape shape = make_gemm_shape(p, V, 16 * kTiles, kStrips, cluster);
  if (shape.stages.each == 0) return false;
  emulation::launch(shape.first_block[kMaxSegments] * cluster, kGemmWarps * 32, cluster, shape.bytes, seed,
                    [&] { codebook_gemm_kernel<T, V, kTiles, kStrips, kBooks>(p, shape); });
  return true;
}

template <typename T, int V, int kBooks, int kN>
bool run_wgmma(const Product& p, unsigned seed) {
  const bool pair = pick({0, 1});
  const int cluster = pair ? 2 : pick({1, 2, 3});
  const BlockKind kind = {kN == 256 ? 2 : pick({2, 4}), cluster, pair};
  const int room = pick({kN == 256 ? 227 : 90, 227}) * 1024;
  const WgmmaShape shape = make_wgmma_shape(p, V, kN, kind, room, pick({1, 2, 1000}));
  if (shape.shares.each == 0 || shape.slots < 3) return false;
  const TileMap x = {static_cast<const uint16_t*>(p.x), p.x_row_stride, p.words * 4 * V, p.tokens, kN / shape.pair};
  many_ranges += shape.clusters < shape.items;
  emulation::launch(shape.clusters * cluster, kind.groups * 128 + kProducerThreads, cluster, shape.bytes, seed,
                    [&] { codebook_wgmma_kernel<T, V, kBooks, kN>(p, shape, x); });
  return true;
}

template <typename T, int V, int kTokens, int kShare, bool kApart>
bool run_psumbook(Product p, unsigned seed) {
  const int units = (p.words + 7) / 8 * p.num_codebooks / kShare;  // every block has one, as the launcher sees to
  const int cluster = std::min(pick({1, 2, 4}), units), chunk = V == 16 ? 2 : pick({2, 4});
  const bool apart = divide_rows(p, pick({1, 2, 3}), pick({64, 8192}));
  PsumbookLayout layout = make_psumbook_layout(p, kShare, cluster, chunk, pick({2, 3}), pick({0, 1}));
  layout.ranges = make_ranges(p, apart);
  const int blocks = layout.ranges.first[layout.ranges.parts] * cluster;
  emulation::launch(blocks, kPsumbookThreads, cluster, layout.bytes, seed, [&] {
    if (chunk == 2)
      psumbook_kernel<T, V, kTokens, 2, kShare, kApart>(p, layout);
    else
      psumbook_kernel<T, V, kTokens, 4, kShare, kApart>(p, layout);
  });
  return true;
}

template <typename T, int V>
bool run(const Product& p, int kernel, unsigned seed) {
#if CODEGEMM_HAS_CLUSTERS
  if (kernel < 2 && p.tokens == 1)
    return stage_groups(p) == 8
               ? p.num_codebooks % 2 ? run_psumbook<T, V, 1, 1, true>(p, seed) : run_psumbook<T, V, 1, 2, true>(p, seed)
           : p.num_codebooks % 2 ? run_psumbook<T, V, 1, 1, false>(p, seed)
                                 : run_psumbook<T, V, 1, 2, false>(p, seed);
  if constexpr (V <= 8) {
    if (kernel < 2 && p.tokens == 2 && stage_groups(p) < 8)
      return p.num_codebooks % 2 ? run_psumbook<T, V, 2, 1, false>(p, seed) : run_psumbook<T, V, 2, 2, false>(p, seed);
  }
  if (kernel == 3 && p.tokens <= kFlowTokens && p.words_per_group.value % unit_words(V) == 0)
    return run_flow<T, V>(p, seed);
#endif
#if CODEGEMM_HAS_CLUSTERS
  if constexpr (V <= 8) {
    if ((kernel || p.tokens > 64) && fits_wgmma(p, V)) {
      if (p.tokens > 64)
        return p.num_codebooks == 1 ? run_wgmma<T, V, 1, 256>(p, seed) : run_wgmma<T, V, 2, 256>(p, seed);
      return p.num_codebooks == 1 ? run_wgmma<T, V, 1, 32>(p, seed) : run_wgmma<T, V, 2, 32>(p, seed);
    }
  }
#endif
  if (p.tokens > 64) return false;
  if (p.tokens > 32) return p.num_codebooks % 2 ? run_gemm<T, V, 4, 2, 1>(p, seed) : run_gemm<T, V, 4, 1, 2>(p, seed);
  if (p.tokens > 16) return p.num_codebooks % 2 ? run_gemm<T, V, 2, 1, 1>(p, seed) : run_gemm<T, V, 2, 2, 2>(p, seed);
  if (p.words_per_group.value % (4 * chunk_loads(V))) return run_mma<T, V, 16, false>(p, seed);
  return p.tokens > 8 ? run_mma<T, V, 16, true>(p, seed) : run_mma<T, V, 8, true>(p, seed);
}

template <typename T>
int check(int number, DType dtype, double bound) {
  Case c;
  c.m = pick({1, 1, 2, 3, 4});
  c.v = pick({4, 8, 16});
  c.tokens = pick({1, 1, 2, 2, 5, 8, 11, 16, 20, 40});
  const int group_words = pick({1, 2, 4, 8, 8}), count = pick({1, 1, 2});
  c.groups = pick({1, 2, 3, 5, 13});
  c.columns = c.groups * group_words * 4 * c.v;
  if (c.v <= 8 && c.m <= 2 && pick({0, 0, 0, 1})) c.tokens = pick({150, 300});
  const std::vector<T> x = floats<T>(size_t(c.tokens) * c.columns, 0.1f, 1.0f);
  std::vector<Matrix<T>> matrices(count);
  std::vector<Gemm> calls;
  const size_t guard = 64;
  for (Matrix<T>& w : matrices) {
    w.rows = 8 * pick({1, 3, 4, 8, 17, 40});
    w.codes.resize(size_t(c.m) * c.columns / (4 * c.v) * w.rows);
    for (uint32_t& word : w.codes) word = generator();
    w.codebooks = floats<T>(size_t(c.m) * 256 * c.v, 0, 0.5f);
    w.scales = floats<T>(size_t(c.groups) * w.rows, 0.02f, 0.005f);
    w.bias = floats<T>(w.rows, 0, 1);
    w.y.resize(size_t(c.tokens) * w.rows + guard);
    calls.push_back(
        {{w.codes.data(), w.codebooks.data(), w.scales.data(), c.m, c.v, c.groups, w.rows, c.columns, dtype},
         x.data(),
         c.columns,
         w.bias.data(),
         w.y.data(),
         c.tokens});
  }
  const Product p = make_product(calls.data(), count);
  const int kernel = pick({0, 1, 2, 3});
  if (c.v <= 8 && c.tokens > 64) hide_code_255(c, matrices);
  const unsigned plan = generator();
  std::vector<std::vector<T>> first;
  for (int repeat = 0; repeat < 2; ++repeat) {
    for (Matrix<T>& w : matrices) std::memset(static_cast<void*>(w.y.data()), 0xff, w.y.size() * sizeof(T));
    generator.seed(plan);
    const unsigned seed = 1000 * number + repeat;
    const bool ran = c.v == 4   ? run<T, 4>(p, kernel, seed)
                     : c.v == 8 ? run<T, 8>(p, kernel, seed)
                                : run<T, 16>(p, kernel, seed);
    if (!ran) return 0;  // does not fit
    ++ran_cases;
    for (size_t i = 0; i < matrices.size(); ++i) {
      Matrix<T>& w = matrices[i];
      const double error = largest_error(c, w, x);
      bool beyond = false;
      for (size_t k = w.y.size() - guard; k < w.y.size(); ++k) beyond |= float(w.y[k]) == float(w.y[k]);
      const bool differs = repeat && std::memcmp(first[i].data(), w.y.data(), w.y.size() * sizeof(T));
      if (!repeat) first.push_back(w.y);
      if (error <= bound && !beyond && !differs) continue;
      std::printf("FAIL case %d kernel %d m%dv%d groups %d of %d words N %d (%zu of %d) M %d: error %.2e%s%s\n", number,
                  kernel, c.m, c.v, c.groups, group_words, w.rows, i, count, c.tokens, error,
                  beyond ? ", wrote beyond y" : "", differs ? ", depends on the schedule" : "");
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const int cases = argc > 1 ? std::atoi(argv[1]) : 20, seed = argc > 2 ? std::atoi(argv[2]) : 1;
  int failures = 0;
  for (int i = 0; i < cases; ++i) {
    generator.seed(seed * 100000 + i);
    failures +=
        generator() % 2 ? check<__half>(i, DType::kFloat16, 1.2e-3) : check<__nv_bfloat16>(i, DType::kBFloat16, 9e-3);
  }
  std::printf("%d of %d cases failed (%d launches, %d in chunks of K, %d with several ranges a cluster)\n", failures,
              cases, ran_cases, chunked, many_ranges);
  return failures != 0 || ran_cases < cases;  // most cases run, twice each
}
