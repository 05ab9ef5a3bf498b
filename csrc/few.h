// A tile of few queries, as in decoding: there lanes are channels, and keys stream from memory once.
//
// With queries as lanes most of each vector would be empty. Here a key's channels are the lanes; the
// scores come out in the layout of all other tiles, so that everything between the two products is
// shared. Dot products only; widths are multiples of a vector.
#pragma once

#include "parts.h"

namespace regard::REGARD_ISA {

constexpr int MOST_FEW = 8;

template <class T>
static inline bool is_few(const Problem& p, int64_t count) {
  return count <= MOST_FEW && count <= W<T> && p.score == Score::dot && p.left.kind == Kind::none &&
         p.d > 0 && p.d % W<T> == 0 && p.e % W<T> == 0;
}

// Lane r of the result is the sum of row r.
template <class T, int R>
INLINE Vec<T> sums_of_rows(Vec<T> (&rows)[R]) {
  Vec<T> all[W<T>] = {};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) all[r] = rows[r];
  exchange<T, W<T> / 2>(all, std::make_integer_sequence<int, W<T>>());
  Vec<T> sum = all[0];
#pragma GCC unroll 16
  for (int k = 1; k < W<T>; ++k) sum += all[k];
  return sum;
}

// Scores of one group of N keys with R queries; the lines of `next` are on their way meanwhile.
template <int R, int N, class Step, class T>
INLINE void few_scores_of(const Step& step, const Tile<T>& query, const T* keys, int64_t row, T* out,
                          const T* next, int64_t next_row) {
  Vec<T> sums[N][R] = {};
  for (int64_t c = 0; c < query.width; c += W<T>) {
    const T* q = query.rows + c / GROUP<T> * ROWS * GROUP<T> + c % GROUP<T>;
    Vec<T> k[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      k[j] = load(keys + j * row + c);
      if (next) __builtin_prefetch(next + j * next_row + c);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> one = load(q + r * GROUP<T>);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[j][r] = step.template add<T>(sums[j][r], k[j], one);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    const Vec<T> sum = sums_of_rows<T, R>(sums[j]);
    store(out + j * GROUP<T>, finished(step, sum));
  }
}

// values: the rows of the same keys' values, which are needed next.
template <int R, class Step, class T>
static void few_scores(const Step& step, const Tile<T>& query, Matrix<T> keys, int count, T* out,
                       Matrix<T> values) {
  constexpr int N = R <= 4 ? 2 : 1;
  int j = 0;
  for (; j + N <= count; j += N)
    few_scores_of<R, N>(step, query, keys.at + j * keys.row, keys.row, out + j * GROUP<T>,
                        values.at ? values.at + j * values.row : nullptr, values.row);
  for (; j < count; ++j)
    few_scores_of<R, 1>(step, query, keys.at + j * keys.row, keys.row, out + j * GROUP<T>,
                        static_cast<const T*>(nullptr), 0);
}

// output[r][channel] += sum_j weights[j][r] values[j][channel].
template <int R, class Step, class T>
static void few_outputs(const Step& step, Tile<T>& output, Matrix<T> values, int count,
                        const T* weights) {
  for (int64_t c = 0; c < output.width; c += W<T>) {
    T* home = output.rows + c / GROUP<T> * ROWS * GROUP<T> + c % GROUP<T>;
    Vec<T> sums[2][R] = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[0][r] = load(home + r * GROUP<T>);
    const auto one = [&](int j, int part) __attribute__((always_inline)) {
      const Vec<T> value = load(values.at + j * values.row + c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        sums[part][r] = step.template call<T>(sums[part][r], weights[j * GROUP<T> + r], value, 0);
    };
    int j = 0;
    for (; j + 2 <= count; j += 2) one(j, 0), one(j + 1, R <= 4 ? 1 : 0);
    for (; j < count; ++j) one(j, 0);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(home + r * GROUP<T>, sums[0][r] + sums[1][r]);
  }
}

// The two products for 1, 2, 4 or 8 rows; rows that are not there hold zeros.
template <class T, class Each>
INLINE void with_rows(int64_t count, const Each& each) {
  if (count <= 1) return each(std::integral_constant<int, 1>());
  if (count <= 2) return each(std::integral_constant<int, 2>());
  if constexpr (W<T> >= 4)
    if (count <= 4) return each(std::integral_constant<int, 4>());
  if constexpr (W<T> >= 8) each(std::integral_constant<int, 8>());
}

// The logits of a tile of few queries; `next` are rows that are needed soon.
template <class T>
static void few_logits(const Problem& p, const Visible<T>& v, const Logits<T>& logits, Matrix<T> keys,
                       T* tile, Matrix<T> next) {
  with_rows<T>(logits.count, [&](auto rows) {
    if (in_pairs<T>(p))
      few_scores<rows.value>(ScaledPairs{{}, float(p.scale)}, logits.query, keys, v.count, tile, next);
    else
      few_scores<rows.value>(Multiply{}, logits.query, keys, v.count, tile, next);
  });
  logits.shape(p, v, tile);
}

}  // namespace regard::REGARD_ISA
