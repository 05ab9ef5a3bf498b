// C[r][lane] += sum_k step(A[r][k], B[k][lane]): the one product of attention, in every role.
//
//   scores      S^T[key][query]  = K[key][d]       * Q^T[d][query]
//   output      O^T[e][query]   += V^T[e][key]     * P^T[key][query]
//   dweights    dP^T[key][query] = V[key][e]       * dO^T[e][query]
//   dvalue      dV[key][e]      += P^T[key][query] * dO[query][e]
//   dkey        dK[key][d]      += dS^T[key][query] * Q[query][d]
//   dquery      dQ^T[d][query]  += K^T[d][key]     * dS^T[key][query]
//
// A is read one number at a time and broadcast, with any strides, so keys and values are used as
// they lie. B and tiles of weights are panels: [lanes / GROUP][k][GROUP], whose lines follow one
// another; with rows of 64 numbers instead, lines 256 bytes apart evict each other from the first
// cache. `step` is a product for dot products; other scores differ only there.
#pragma once

#include "vec.h"

namespace regard::REGARD_ISA {

// Broadcast operand. After `panel` columns the next ones are found `jump` numbers from the first.
template <class T>
struct Matrix {
  const T* at;
  int64_t row, column;
  int64_t panel = int64_t(1) << 40, jump = 0;
};

struct Multiply {
  static constexpr int ROWS_AT_ONCE = TILE_ROWS;
  template <class T>
  INLINE Vec<T> add(Vec<T> sum, Vec<T> a, Vec<T> b) {
    return sum + a * b;
  }
  template <class T>
  INLINE Vec<T> call(Vec<T> sum, T a, Vec<T> b, int64_t) {
    return sum + a * b;
  }
};

// The products are summed before they are added to what is there: one rounding of a large number instead
// of `count`. In float32 linear attention has a third of the error so, and DeltaNet half; one addition in
// `count` more.
struct MultiplyApart : Multiply {
  static constexpr bool APART = true;
};
template <class Step>
constexpr bool SUMS_APART = requires { Step::APART; };

// What a step does to whole sums, if anything.
template <class Step, class V>
INLINE V finished(const Step& step, V sum) {
  if constexpr (requires { step.finish(sum); })
    return step.finish(sum);
  else
    return sum;
}

// R rows of Q vectors, all sums in registers; count >= 1 products each.
template <int R, int Q, class T, class Step>
INLINE void register_tile(const Step& step, T* c, int64_t ldc, Matrix<T> a, const T* b,
                          int64_t count, bool add) {
  Vec<T> sums[R][Q];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q)
      sums[r][q] = add && !SUMS_APART<Step> ? load(c + r * ldc + q * W<T>) : Vec<T>{};
  int64_t k = 0;
  while (count > 0) {
    const T* from = a.at;
    const auto one = [&]() __attribute__((always_inline)) {
      Vec<T> right[Q];
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) right[q] = load(b + q * W<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const T left = from[r * a.row];
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q)
          sums[r][q] = step.template call<T>(sums[r][q], left, right[q], k);
      }
      from += a.column, b += GROUP<T>, ++k;
#if defined(__AVX512F__)
      // Or GCC makes the addresses of all 8 turns first, which no longer fit the integer registers.
      asm("" : "+r"(from));
#endif
    };
    const int64_t some = count < a.panel ? count : a.panel;
    // Eight products a turn: so few turns that the processor foresees the last one.
    for (int64_t turn = some / 8; turn > 0; --turn)
#pragma GCC unroll 8
      for (int u = 0; u < 8; ++u) one();
    for (int64_t left = some % 8; left > 0; --left) one();
    a.at += a.jump, count -= some;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      if (SUMS_APART<Step> && add) sums[r][q] += load(c + r * ldc + q * W<T>);
      store(c + r * ldc + q * W<T>, finished(step, sums[r][q]));
    }
}

// C[rows][Q vectors] from one panel of B; nothing where rows or count is 0. A step that needs
// registers of its own takes fewer rows at once.
template <int Q, class T, class Step>
static __attribute__((noinline)) void panel_product(const Step& step, int64_t rows, T* c,
                                                    int64_t ldc, Matrix<T> a, const T* b,
                                                    int64_t count, bool add) {
  if (count <= 0) return;
  constexpr int R = Step::ROWS_AT_ONCE;
  for (; rows >= R; rows -= R, c += R * ldc, a.at += R * a.row)
    register_tile<R, Q>(step, c, ldc, a, b, count, add);
#define REGARD_ROWS(LEFT)                                           \
  case LEFT:                                                        \
    if constexpr (LEFT < R)                                         \
      register_tile<LEFT, Q>(step, c, ldc, a, b, count, add);       \
    break;
  switch (rows) {
    REGARD_ROWS(1)
    REGARD_ROWS(2)
    REGARD_ROWS(3)
    REGARD_ROWS(4)
    REGARD_ROWS(5)
#if defined(__AVX512F__)
    REGARD_ROWS(6)
    REGARD_ROWS(7)
#endif
  }
#undef REGARD_ROWS
}

}  // namespace regard::REGARD_ISA
