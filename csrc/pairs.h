// Products of pairs of bfloat16 numbers: twice float32's rate, where the processor has them.
//
// A pair is one 32-bit number to everything that moves numbers. Along the width, queries and keys are
// pairs as they lie in memory; along the keys, weights and values are brought together, two keys a
// pair. Products are exact and sums are float32's, in which what is below its smallest normal number
// (1e-38) counts as 0. Weights are rounded to bfloat16.
#pragma once

#include "tile.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace regard::REGARD_ISA {

typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES)));
constexpr auto ALL_HALVES = std::make_integer_sequence<int, 2 * W<float>>();

// FIRST, FIRST + STEP, FIRST + 1, FIRST + 1 + STEP.. of the halves of a and then of b, as pairs.
template <int FIRST, int STEP, int... K>
INLINE Vec<float> in_turns(Halves a, Halves b, std::integer_sequence<int, K...>) {
  return (Vec<float>)__builtin_shufflevector(a, b, (FIRST + K / 2 + K % 2 * STEP)...);
}

#if defined(__AVX512BF16__)

constexpr bool FAST_PAIRS = true;

// sum + a.low * b.low + a.high * b.high
INLINE Vec<float> add_pairs(Vec<float> sum, Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// Numbers rounded to bfloat16, as pairs.
INLINE Vec<float> as_pairs(Vec<float> low, Vec<float> high) {
  const Halves both = (Halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return in_turns<0, W<float>>(both, both, ALL_HALVES);
}

// Numbers of two vectors rounded to bfloat16, one after the other.
INLINE Vec<float> in_line(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}

#else  // The same in other words: slower than wide numbers, and there for tests.

constexpr bool FAST_PAIRS = false;

INLINE Vec<float> low_of(Vec<float> x) {
  return as_number<float>((Bits<float>)((Words<float>)as_bits<float>(x) << 16));
}
INLINE Vec<float> high_of(Vec<float> x) { return as_number<float>(as_bits<float>(x) & ~0xffff); }

INLINE Vec<float> add_pairs(Vec<float> sum, Vec<float> a, Vec<float> b) {
  return sum + low_of(a) * low_of(b) + high_of(a) * high_of(b);
}

INLINE Words<float> rounded(Vec<float> x) {
  const Words<float> bits = (Words<float>)as_bits<float>(x);
  const Words<float> nearest = bits + 0x7fff + (bits >> 16 & 1);  // ties to even
  return (x == x ? nearest : bits | 0x400000) & ~0xffffu;
}

INLINE Vec<float> as_pairs(Vec<float> low, Vec<float> high) {
  return as_number<float>((Bits<float>)(rounded(low) >> 16 | rounded(high)));
}

INLINE Vec<float> in_line(Vec<float> a, Vec<float> b) {
  Halves halves;
  for (int u = 0; u < W<float>; ++u)
    halves[u] = uint16_t(rounded(a)[u] >> 16), halves[u + W<float>] = uint16_t(rounded(b)[u] >> 16);
  return (Vec<float>)halves;
}

#endif

template <class T>
constexpr bool PAIRS = sizeof(T) == 4;

template <class T>
INLINE bool in_pairs(const Problem& p) {
  return PAIRS<T> && p.pairs;
}

// Rows as they are multiplied: of pairs, which are numbers of 32 bits, or of numbers.
template <class T>
static Operand factors_of(const Problem& p, const Operand& x) {
  Operand view = x;
  if (!in_pairs<T>(p)) return view;
  view.kind = Kind::f32, view.row /= 2;
  for (int64_t& step : view.axis) step /= 2;
  return view;
}

template <class T>
static int64_t factors_in(const Problem& p, int64_t width) {
  return in_pairs<T>(p) ? width / 2 : width;
}

struct MultiplyPairs {
  static constexpr int ROWS_AT_ONCE = TILE_ROWS;
  template <class T>
  INLINE Vec<T> add(Vec<T> sum, Vec<T> a, Vec<T> b) {
    if constexpr (PAIRS<T>) return add_pairs(sum, a, b);
    return sum;
  }
  template <class T>
  INLINE Vec<T> call(Vec<T> sum, T a, Vec<T> b, int64_t) {
    typename Lanes<T>::integer bits;
    __builtin_memcpy(&bits, &a, sizeof bits);
    return add<T>(sum, as_number<T>(bits - Bits<T>{}), b);
  }
};

// With a scale that queries of so few digits cannot take in.
struct ScaledPairs : MultiplyPairs {
  float scale;
  template <class V>
  __attribute__((always_inline)) V finish(V sum) const {
    return sum * scale;
  }
};

// Weights [key][lane], in place: row j becomes keys 2 j and 2 j + 1; 0 where a group does not see one.
template <class T>
static void pair_weights(const Visible<T>& v, T* tile) {
  if constexpr (PAIRS<T>)
    for (int g = 0; g < v.GROUPS; ++g)
      for (int j = v.begin[g] / 2 * 2; j < v.end[g]; j += 2)
        for (int q = 0; q < v.vectors(); ++q) {
          T* panel = tile + g * PANEL<T> + q * W<T>;
          const T* from = panel + j * GROUP<T>;
          const Vec<T> one = j < v.begin[g] ? Vec<T>{} : load(from);
          const Vec<T> other = j + 1 < v.end[g] ? load(from + GROUP<T>) : Vec<T>{};
          store(panel + j / 2 * GROUP<T>, as_pairs(one, other));
        }
}

// Numbers [at, at + 2 W) of a row, 0 beyond its width and where there is no row.
INLINE Halves some_of(const uint16_t* row, int64_t at, int64_t width) {
  Halves x{};
  if (row && width - at >= 2 * W<float>)
    __builtin_memcpy(&x, row + at, sizeof x);
  else if (row)
    for (int64_t c = at; c < width; ++c) x[c - at] = row[c];
  return x;
}

static inline bool is_finite(const uint16_t* row, int64_t width) {
  const Halves exponent = Halves{} + uint16_t(0x7f80);
  Halves found{};
  for (int64_t c = 0; c < width; c += 2 * W<float>)
    found |= (Halves)((some_of(row, c, width) & exponent) == exponent);
  uint64_t words[VECTOR_BYTES / 8], any = 0;
  __builtin_memcpy(words, &found, sizeof words);
  for (uint64_t word : words) any |= word;
  return !any;
}

// Values, or keys, of a block as pairs of keys, [KEYS / 2][width]. Where pairs are hidden, 0 times NaN
// would be NaN: rows that are not finite are set to 0, and those that see one are marked, one bit each.
template <class T>
static Matrix<T> pair_keys(const Problem& p, const Operand& x, int64_t width, const Visible<T>& v,
                           int64_t lane, T* space, uint64_t& poisoned) {
  const int64_t row = packed_row<T>(width);
  if constexpr (PAIRS<T>) {
    constexpr int N = 2 * W<T>;
    const auto* rows = reinterpret_cast<const uint16_t*>(row_of(p, x, lane, 0));
    const bool hides = p.mask.present && !v.full;
    for (int j = 0; j < v.count; j += 2) {
      const uint16_t* one = rows + v.column(j) * x.row;
      const uint16_t* other = j + 1 < v.count ? rows + v.column(j + 1) * x.row : nullptr;
      const uint16_t* next = one + KEYS * x.row;
      if (hides && !is_finite(one, width)) poisoned |= v.keep[j], one = nullptr;
      if (hides && other && !is_finite(other, width)) poisoned |= v.keep[j + 1], other = nullptr;
      T* to = space + j / 2 * row;
      for (int64_t c = 0; c < width; c += N) {
        bring(next + c);
        bring(next + x.row + c);
        const Halves a = some_of(one, c, width), b = some_of(other, c, width);
        store(to + c, in_turns<0, N>(a, b, ALL_HALVES));
        if (width - c > W<T>) store(to + c + W<T>, in_turns<N / 2, N>(a, b, ALL_HALVES));
      }
    }
  }
  return {space, row, 1};
}

// Rows [first, first + count) of a tile as pairs of rows: panels [width / GROUP][ROWS / 2][GROUP].
template <class T>
static void pair_rows(const Problem& p, const Operand& x, int64_t width, int64_t lane, int64_t first,
                      int64_t count, T* panels) {
  if constexpr (PAIRS<T>) {
    constexpr int N = 2 * W<T>;
    const auto* rows = reinterpret_cast<const uint16_t*>(row_of(p, x, lane, first));
    for (int64_t c = 0; c < width; c += N)
      for (int64_t r = 0; r < ROWS; r += 2, panels += GROUP<T>) {
        const Halves a = some_of(r < count ? rows + r * x.row : nullptr, c, width);
        const Halves b = some_of(r + 1 < count ? rows + (r + 1) * x.row : nullptr, c, width);
        store(panels, in_turns<0, N>(a, b, ALL_HALVES));
        store(panels + W<T>, in_turns<N / 2, N>(a, b, ALL_HALVES));
      }
  }
}

// A tile of panels times a factor as [KEYS][pair of lanes].
template <class T>
static void pair_lanes(const Visible<T>& v, const T* tile, double factor, T* to) {
  if constexpr (PAIRS<T>)
    for (int g = 0; g < v.GROUPS; ++g)
      for (int j = 0; j < v.count; ++j) {
        const T* from = tile + g * PANEL<T> + j * GROUP<T>;
        store(to + j * (ROWS / 2) + g * W<T>,
              in_line(load(from) * T(factor), load(from + W<T>) * T(factor)));
      }
}

}  // namespace regard::REGARD_ISA
