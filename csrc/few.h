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
         p.d > 0 && factors_in<T>(p, p.d) % W<T> == 0 && p.e % W<T> == 0;
}

// Row r takes in row r + HALF: its lanes are then sums of either, and at last lane k is that of row k.
template <class T, int HALF, int... K>
INLINE void merge_rows(Vec<T> (&rows)[W<T>], std::integer_sequence<int, K...> lanes) {
  constexpr int N = W<T>;
#pragma GCC unroll 8
  for (int r = 0; r < HALF; ++r) {
    const Vec<T> a = rows[r], b = rows[r + HALF];
    rows[r] = __builtin_shufflevector(a, b, (K & HALF ? N + K : K)...) +
              __builtin_shufflevector(a, b, (K & HALF ? N + K - HALF : K + HALF)...);
  }
  if constexpr (HALF > 1) merge_rows<T, HALF / 2>(rows, lanes);
}

// Lane k of the result is the sum of row k.
template <class T>
INLINE Vec<T> sums_of_rows(Vec<T> (&rows)[W<T>]) {
  merge_rows<T, W<T> / 2>(rows, std::make_integer_sequence<int, W<T>>());
  return rows[0];
}

// Scores of `count` keys, W / R at most, with R queries: as many sums as a vector has lanes.
template <int R, class Step, class T>
INLINE void few_scores_of(const Step& step, const Tile<T>& query, Matrix<T> keys, int count, T* out) {
  constexpr int N = W<T> / R;
  Vec<T> sums[W<T>] = {};
  for (int64_t c = 0; c < query.width; c += W<T>) {
    const T* q = query.rows + c / GROUP<T> * ROWS * GROUP<T> + c % GROUP<T>;
    Vec<T> queries[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) queries[r] = load(q + r * GROUP<T>);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      const int64_t at = j < count ? j : count - 1;
      const Vec<T> key = load(keys.at + at * keys.row + c);
      bring(keys.at + (at + KEYS) * keys.row + c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[j * R + r] = step.template add<T>(sums[j * R + r], key, queries[r]);
    }
  }
  T scores[W<T>];
  store(scores, finished(step, sums_of_rows<T>(sums)));
  for (int j = 0; j < N && j < count; ++j)
    __builtin_memcpy(out + j * GROUP<T>, scores + j * R, R * sizeof(T));
}

template <int R, class Step, class T>
static void few_scores(const Step& step, const Tile<T>& query, Matrix<T> keys, int count, T* out) {
  constexpr int N = W<T> / R;
  for (; count >= N; count -= N, out += N * GROUP<T>, keys.at += N * keys.row)
    few_scores_of<R>(step, query, keys, N, out);
  if (count) few_scores_of<R>(step, query, keys, count, out);
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
      bring(values.at + (j + KEYS) * values.row + c);
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

// The logits of a tile of few queries.
template <class T>
static void few_logits(const Problem& p, const Visible<T>& v, const Logits<T>& logits, Matrix<T> keys,
                       T* tile) {
  with_rows<T>(logits.count, [&](auto rows) {
    if (in_pairs<T>(p))
      few_scores<rows.value>(ScaledPairs{{}, float(p.scale)}, logits.query, keys, v.count, tile);
    else
      few_scores<rows.value>(Multiply{}, logits.query, keys, v.count, tile);
  });
  logits.shape(p, v, tile);
}

}  // namespace regard::REGARD_ISA
