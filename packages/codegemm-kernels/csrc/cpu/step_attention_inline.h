// Attention of one new token, for whatever instruction set the including file is compiled for; internal linkage, see
// floats.h.
#pragma once
#include "cpu/step_rows_inline.h"

namespace codegemm::cpu {
namespace {

// One head, normed and rotated by the angles of a position, in fp32 rounded to T; what pads it is zero.
template <class T>
void place_head(const Attention& op, const T* head, const Norm& norm, int64_t position, float* to) {
  const int64_t width = op.head_dim, pairs = op.pairs;
  std::memset(to, 0, size_t(padded_head(op)) * sizeof(float));
  widen_as(head, width, to);
  if (norm.weight != nullptr) {
    const T* weight = static_cast<const T*>(norm.weight);
    const float inverse = inverse_rms(head, width, norm.eps);
    for (int64_t i = 0; i < width; i += kLanes) {
      store(rounded<T>(scaled(head + i, width - i, inverse, weight + i, norm.offset)), to + i, width - i);
    }
  }
  const float *cos = op.cos + position * pairs, *sin = op.sin + position * pairs;
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const int64_t left = pairs - i;
    const Lanes c = load(cos + i, left), s = load(sin + i, left);
    const Lanes a = load(to + i, left), b = load(to + pairs + i, left);
    store(rounded<T>(a * c - b * s), to + i, left);
    store(rounded<T>(b * c + a * s), to + pairs + i, left);
  }
}

template <class T>
void append(const Attention& op, const float* head, void* stored, float* scales, int64_t entry) {
  const int64_t width = op.head_dim;
  if (scales == nullptr) {
    T* to = static_cast<T*>(stored) + entry * width;
    for (int64_t i = 0; i < width; ++i) to[i] = narrow<T>(head[i]);
    return;
  }
  float size = 0;
  float nothing = 0;  // or NaN, once an element is not finite: the scale then carries it on
  for (int64_t i = 0; i < width; ++i) {
    size = __builtin_fmaxf(size, __builtin_fabsf(head[i]));
    nothing += head[i] * 0;
  }
  const float scale = __builtin_fmaxf(size / 127, 1e-12f) + nothing;
  int8_t* to = static_cast<int8_t*>(stored) + entry * width;
  for (int64_t i = 0; i < width; ++i) {
    const float level = __builtin_floorf(head[i] / scale + 0.5f);
    to[i] = level == level ? int8_t(level) : int8_t(1);
  }
  scales[entry] = scale;
}

// Scores of Q heads with up to kKeys keys, whose values are fetched meanwhile.
template <int Q, class C>
void score(const Attention& op, const float* q, const C* keys, const C* values, int64_t count, float* scores) {
  const int64_t width = op.head_dim, padded = padded_head(op);
  for (int64_t first = 0; first < count; first += kLanes) {
    Lanes sums[Q][kLanes];
    const int64_t some = count - first < kLanes ? count - first : kLanes;
    for (int64_t j = 0; j < some; ++j, keys += width, values += width) {
      for (int64_t at = 0; at < width; at += int64_t(64 / sizeof(C))) __builtin_prefetch(values + at);
      int64_t i = 0;
      Lanes sum[Q] = {};
      for (; i + kLanes <= width; i += kLanes) {
        const Lanes key = load(keys + i);
        for (int g = 0; g < Q; ++g) sum[g] += key * load(q + g * padded + i);
      }
      if (i < width) {
        const Lanes key = load(keys + i, width - i);
        for (int g = 0; g < Q; ++g) sum[g] += key * load(q + g * padded + i);
      }
      for (int g = 0; g < Q; ++g) sums[g][j] = sum[g];
    }
    for (int g = 0; g < Q; ++g) {
      for (int64_t j = some; j < kLanes; ++j) sums[g][j] = Lanes{};
      store(totals(sums[g]), scores + g * kKeys + first);
    }
  }
}

template <int Q, class C>
void add_values(const Attention& op, const float* weights, const C* values, int64_t count, float* sums) {
  const int64_t width = op.head_dim, padded = padded_head(op);
  for (int64_t i = 0; i < width; i += kLanes) {
    Lanes part[Q];
    for (int g = 0; g < Q; ++g) part[g] = load(sums + g * padded + i);
    for (int64_t j = 0; j < count; ++j) {
      const Lanes value = load(values + j * width + i, width - i);
      for (int g = 0; g < Q; ++g) part[g] += value * weights[g * kKeys + j];
    }
    for (int g = 0; g < Q; ++g) store(part[g], sums + g * padded + i);
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f(how many as a type, first) for all heads of a group, four at a time.
template <class F>
inline void by_heads(int64_t heads, F&& f) {
  int64_t first = 0;
  for (; first + 4 <= heads; first += 4) f(Count<4>(), first);
  for (; first + 2 <= heads; first += 2) f(Count<2>(), first);
  if (first < heads) f(Count<1>(), first);
}

// Turns the scores of one head into weights; returns by what earlier sums shrink.
inline float soften(const Attention& op, const float* key_scales, int64_t count, float* scores, float* largest_score,
                    float* weight) {
  for (int64_t j = 0; j < kKeys; j += kLanes) {
    Lanes score = load(scores + j) * op.scale;
    if (key_scales != nullptr) score *= load(key_scales + j, count > j ? count - j : 0);
    if (op.softcap != 0) score = hyperbolic_tangent(score / op.softcap) * op.softcap;
    store(score, scores + j);
  }
  for (int64_t j = count; j < kKeys; ++j) scores[j] = -__builtin_inff();
  Lanes peak = all(*largest_score);
  for (int64_t j = 0; j < kKeys; j += kLanes) peak = largest(peak, load(scores + j));
  const float top = largest(peak);
  Lanes sum = {};
  for (int64_t j = 0; j < kKeys; j += kLanes) {
    const Lanes e = exponential(load(scores + j) - top);
    sum += e;
    store(e, scores + j);
  }
  const float shrink = exponential(all(*largest_score - top))[0];
  *weight = *weight * shrink + total(sum);
  *largest_score = top;
  return shrink;
}

// Keys begin .. end - 1; C is the type of the cache.
template <class C>
void attend_keys(const Attention& op, int64_t head, int64_t begin, int64_t end, const float* q, float* scores,
                 const AttentionPart& part) {
  const int64_t width = op.head_dim, padded = padded_head(op), entry = head * op.capacity;
  for (int64_t first = begin; first < end; first += kKeys) {
    const int64_t count = end - first < kKeys ? end - first : kKeys, at = entry + first;
    const C *keys = static_cast<const C*>(op.keys) + at * width,
            *values = static_cast<const C*>(op.values) + at * width;
    by_heads(group(op), [&](auto heads, int64_t g) {
      score<decltype(heads)::value>(op, q + g * padded, keys, values, count, scores + g * kKeys);
    });
    for (int64_t g = 0; g < group(op); ++g) {
      float *weights = scores + g * kKeys, *sums = part.sums + g * padded;
      const float* key_scales = op.key_scales == nullptr ? nullptr : op.key_scales + at;
      const float shrink = soften(op, key_scales, count, weights, part.largest + g, part.weights + g);
      for (int64_t i = 0; i < padded; i += kLanes) store(load(sums + i) * shrink, sums + i);
      if (op.value_scales == nullptr) continue;
      for (int64_t j = 0; j < count; ++j) weights[j] *= op.value_scales[at + j];
    }
    by_heads(group(op), [&](auto heads, int64_t g) {
      add_values<decltype(heads)::value>(op, scores + g * kKeys, values, count, part.sums + g * padded);
    });
  }
}

template <class T>
void attend_as(const Attention& op, int64_t slot, int64_t kv_head, int64_t share, int64_t shares, float* q,
               const AttentionPart& part) {
  const int64_t width = op.head_dim, padded = padded_head(op), last = op.capacity - 1;
  const int64_t length = op.lengths[slot], position = length < 0 ? 0 : length < last ? length : last;
  const int64_t first = op.window > 0 && op.window <= position ? position - op.window + 1 : 0;
  const int64_t count = position + 1 - first, head = slot * op.kv_heads + kv_head;
  float *key = q + group(op) * padded, *scores = key + padded;
  for (int64_t g = 0; g < group(op); ++g) {
    place_head(op, row_of<T>(op.q, slot) + (kv_head * group(op) + g) * width, op.q_norm, position, q + g * padded);
    part.largest[g] = -__builtin_inff();
    part.weights[g] = 0;
  }
  std::memset(part.sums, 0, size_t(group(op) * padded) * sizeof(float));
  if (share == shares - 1) {
    place_head(op, row_of<T>(op.k, slot) + kv_head * width, op.k_norm, position, key);
    append<T>(op, key, op.keys, op.key_scales, head * op.capacity + position);
    widen_as(row_of<T>(op.v, slot) + kv_head * width, width, key);
    append<T>(op, key, op.values, op.value_scales, head * op.capacity + position);
  }
  const int64_t begin = first + count * share / shares, end = first + count * (share + 1) / shares;
  if (op.key_scales == nullptr) {
    attend_keys<T>(op, head, begin, end, q, scores, part);
  } else {
    attend_keys<int8_t>(op, head, begin, end, q, scores, part);
  }
}

void attend(const Attention& op, int64_t slot, int64_t kv_head, int64_t share, int64_t shares, float* memory,
            const AttentionPart& part) {
  with_type(op.dtype, [&](auto type) { attend_as<decltype(type)>(op, slot, kv_head, share, shares, memory, part); });
}

void combine(const Attention& op, int64_t slot, int64_t kv_head, const AttentionPart* parts, int64_t shares) {
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t padded = padded_head(op);
    for (int64_t g = 0; g < group(op); ++g) {
      float top = parts[0].largest[g], weight = 0;
      for (int64_t s = 1; s < shares; ++s) top = parts[s].largest[g] > top ? parts[s].largest[g] : top;
      float* sums = parts[0].sums + g * padded;
      for (int64_t s = 0; s < shares; ++s) {
        const float shrink = exponential(all(parts[s].largest[g] - top))[0];
        const float* more = parts[s].sums + g * padded;
        weight += shrink * parts[s].weights[g];
        for (int64_t i = 0; i < padded; i += kLanes) {
          store((s == 0 ? Lanes{} : load(sums + i)) + load(more + i) * shrink, sums + i);
        }
      }
      T* y = static_cast<T*>(op.y) + (slot * op.heads + kv_head * group(op) + g) * op.head_dim;
      const float inverse = 1 / weight;
      for (int64_t i = 0; i < op.head_dim; i += kLanes) store(load(sums + i) * inverse, y + i, op.head_dim - i);
    }
  });
}

}  // namespace
}  // namespace codegemm::cpu
