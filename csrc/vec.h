// The vector type: plain operators of GCC and Clang on as many lanes as the compile flags give.
//
// No intrinsics: the compiler knows vfmadd, vmaxps and the mask registers for these expressions.
#pragma once

#include <cstdint>
#include <utility>  // integer_sequence only: a standard function here would be built for one ISA

#include "problem.h"

#define INLINE static inline __attribute__((always_inline))

namespace regard::REGARD_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
constexpr int TILE_ROWS = 8;  // with 2 vectors: 16 of 32 registers are accumulators
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
constexpr int TILE_ROWS = 6;  // 12 accumulators, 2 operands and a broadcast: 15 of 16 registers
#else
constexpr int VECTOR_BYTES = 16;
constexpr int TILE_ROWS = 6;
#endif
constexpr int TILE_VECTORS = 2;

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t word __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t integer;
};
template <>
struct Lanes<double> {
  typedef double vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint64_t word __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t integer;
};

template <class T>
using Vec = typename Lanes<T>::vector;
template <class T>
using Bits = typename Lanes<T>::mask;
template <class T>
using Words = typename Lanes<T>::word;
template <class T>
constexpr int W = VECTOR_BYTES / int(sizeof(T));
template <class T>
constexpr int GROUP = TILE_VECTORS * W<T>;  // lanes of a register tile

template <class T>
constexpr T INF = T(__builtin_huge_val());

template <class T>
INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
INLINE void store(T* to, Vec<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
}
template <class T>
INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x, also for -0 and NaN; a broadcast
}
// a > b ? a : b, so b where one is NaN. GCC 12 makes a comparison and a blend of that expression.
INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__) && !defined(__clang__)
  return __builtin_ia32_maxps512_mask(a, b, b, -1, 4);
#elif defined(__AVX512F__)
  return a > b ? a : b;
#elif defined(__AVX2__)
  return __builtin_ia32_maxps256(a, b);
#elif defined(__SSE2__)
  return __builtin_ia32_maxps(a, b);
#else
  return a > b ? a : b;
#endif
}
INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
INLINE Vec<float> min(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__) && !defined(__clang__)
  return __builtin_ia32_minps512_mask(a, b, b, -1, 4);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return __builtin_ia32_minps256(a, b);
#else
  return a < b ? a : b;
#endif
}
INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return a < b ? a : b; }
template <class T>
INLINE T sum(Vec<T> v) {
  T total = 0;
  for (int lane = 0; lane < W<T>; ++lane) total += v[lane];
  return total;
}
template <class T>
INLINE Bits<T> as_bits(Vec<T> v) {
  Bits<T> b;
  __builtin_memcpy(&b, &v, sizeof b);
  return b;
}
template <class T>
INLINE Vec<T> as_number(Bits<T> b) {
  Vec<T> v;
  __builtin_memcpy(&v, &b, sizeof v);
  return v;
}

// A mask from one bit per lane.
template <class T>
INLINE Bits<T> expand(uint64_t bits) {
  typedef typename Lanes<T>::integer I;
  Bits<T> each;
#pragma GCC unroll 16
  for (int lane = 0; lane < W<T>; ++lane) each[lane] = I(1) << lane;
  return ((I(bits) - Bits<T>{}) & each) != 0;
}

template <class T, int N>
INLINE Vec<T> polynomial(const T (&c)[N], Vec<T> x) {
  Vec<T> y = splat(c[N - 1]);
#pragma GCC unroll 16
  for (int k = N - 2; k >= 0; --k) y = y * x + c[k];
  return y;
}

// Minimax coefficients (Remez) of (e^r - 1 - r) / r^2 on |r| <= log(2) / 2 and of
// (tanh(x) / x - 1) / x^2 in x^2 on |x| <= 0.6, and 1.5 * 2^p, p the bits of a fraction, which
// rounds a number to an integer that stands in its low bits.
template <class T>
struct Constants;
template <>
struct Constants<float> {
  static constexpr float round = 12582912.0f, low = -87.0f, least = -__FLT_MAX__;
  static constexpr int fraction = 23;
  static constexpr float exp[] = {0.50000000285928514f, 0.166665733610563864f,
                                  0.0416663634021374501f, 0.00836377614291013541f,
                                  0.00139421652571232727f};
  static constexpr float coarse[] = {0.99992807f, 1.00016419f, 0.50496326f, 0.16566842f};  // e^r
  static constexpr float tanh[] = {-0.333333305270139563f, 0.133329325023264583f,
                                   -0.0538763179529915513f, 0.0211214569171073951f,
                                   -0.00628366915753533674f};
};
template <>
struct Constants<double> {
  static constexpr double round = 6755399441055744.0, low = -708.0, least = -__DBL_MAX__;
  static constexpr int fraction = 52;
  static constexpr double exp[] = {0.5,
                                   0.166666666666666714,
                                   0.0416666666666666856,
                                   0.0083333333333255442,
                                   0.00138888888888732062,
                                   0.000198412698768658018,
                                   0.000024801587350134582,
                                   2.75572528319560496e-6,
                                   2.7557250238673323e-7,
                                   2.51062752969665777e-8,
                                   2.09224843932774757e-9};
  static constexpr double tanh[] = {-0.333333333333333332,  0.133333333333332132,
                                    -0.0539682539680929375, 0.021869488527698108,
                                    -0.00886323530012370172, 0.00359212434475918795,
                                    -0.00145579665022454964, 0.000589772062842796358,
                                    -0.000237965211539811428, 0.0000933516128766281777,
                                    -0.0000321185066372483042, 6.950141892304378e-6};
};

// e^x for x <= 88: e^x = 2^n e^r with n = round(x / log 2). Below `low`, near the smallest normal
// number, it is 0, whatever the steps before made of it. NaN stays NaN. COARSE: of degree 3, within
// 7.5e-5, for what is rounded to bfloat16 (2e-3).
template <class T, bool COARSE = false>
INLINE Vec<T> exp(Vec<T> x) {
  typedef Constants<T> C;
  const Vec<T> shifted = x * T(1.4426950408889634074) + C::round;
  const Vec<T> n = shifted - C::round;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  Vec<T> r = x - n * T(0.693147180559945309417);
  if (sizeof(T) == 8) r = r - n * T(2.319046813846299558e-17);  // what log 2 lost as a double
#else  // a first part of few bits, whose product with n is exact
  Vec<T> r = x - n * T(0.693145751953125);
  r = r - n * T(1.42860682030941723212e-6);
#endif
  Vec<T> p;
  if constexpr (COARSE) {
    p = polynomial<T>(C::coarse, r);
  } else if constexpr (sizeof(T) == 4) {
    // Pairs first (Estrin): the chain of products is half as long, which is what limits it.
    const Vec<T> r2 = r * r, low = r * C::exp[1] + C::exp[0], high = r * C::exp[3] + C::exp[2];
    p = ((r2 * C::exp[4] + high) * r2 + low) * r2 + (r + 1);
  } else {
    p = (polynomial<T>(C::exp, r) * r + 1) * r + 1;
  }
  // Without a sign, so that the sum may wrap.
  const Words<T> bits = (Words<T>)as_bits<T>(p) + ((Words<T>)as_bits<T>(shifted) << C::fraction);
  return as_number<T>((Bits<T>)bits & ~(x < C::low));
}

// log x of a normal number x > 0. The bits as an integer are 2^p (log2 x + bias) within 0.086; halved by
// a shift, and with log 2, that is 0.03; a step y + 2 (x - e^y) / (x + e^y) (Halley) leaves a twelfth
// of an error's cube, and two leave the rounding of e^y.
template <class T>
INLINE Vec<T> log(Vec<T> x) {
  constexpr T LOG2 = T(0.693147180559945309417), BIAS = T(sizeof(T) == 4 ? 127 : 1023) - T(0.043);
  constexpr T STEP = 1 / T(int64_t(1) << Constants<T>::fraction);
  Vec<T> y = (__builtin_convertvector(as_bits<T>(x), Vec<T>) * STEP - BIAS) * LOG2;
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const Vec<T> e = exp<T>(y);
    y += 2 * (x - e) / (x + e);
  }
  return y;
}

// slope: where to put 1 - tanh^2, if it is wanted; near 1, 4 e / (1 + e)^2 keeps digits that the
// difference has lost.
template <class T>
INLINE Vec<T> tanh(Vec<T> x, Vec<T>* slope = nullptr) {
  const Vec<T> size = x < 0 ? -x : x;
  const Vec<T> e = exp<T>(size * T(-2));
  const Vec<T> far = (1 - e) / (1 + e);
  const Vec<T> z = x * x;
  const Vec<T> near = polynomial<T>(Constants<T>::tanh, z) * z * x + x;
  if (slope) *slope = size < T(0.6) ? 1 - near * near : e * 4 / ((1 + e) * (1 + e));
  return size < T(0.6) ? near : (x < 0 ? -far : far);
}

template <class T>
INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp<T>(x < 0 ? x : -x);
  return (x < 0 ? e : splat(T(1))) / (1 + e);
}

// Exchanges halves of pairs of rows, then quarters, and so on: a transposition in log2 W rounds.
template <class T, int HALF, int... K>
INLINE void exchange(Vec<T> (&rows)[W<T>], std::integer_sequence<int, K...> lanes) {
  constexpr int N = W<T>;
#pragma GCC unroll 16
  for (int r = 0; r < N; ++r) {
    if (r & HALF) continue;
    const Vec<T> a = rows[r], b = rows[r + HALF];
    rows[r] = __builtin_shufflevector(a, b, ((K & HALF) ? N + K - HALF : K)...);
    rows[r + HALF] = __builtin_shufflevector(a, b, ((K & HALF) ? N + K : K + HALF)...);
  }
  if constexpr (HALF > 1) exchange<T, HALF / 2>(rows, lanes);
}

// The W x W block at `from` (rows `lda` apart), transposed to `to` (rows `ldb` apart).
template <class T>
INLINE void transpose_block(T* to, int64_t ldb, const T* from, int64_t lda) {
  Vec<T> rows[W<T>];
#pragma GCC unroll 16
  for (int r = 0; r < W<T>; ++r) rows[r] = load(from + r * lda);
  exchange<T, W<T> / 2>(rows, std::make_integer_sequence<int, W<T>>());
#pragma GCC unroll 16
  for (int r = 0; r < W<T>; ++r) store(to + r * ldb, rows[r]);
}

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

}  // namespace regard::REGARD_ISA
