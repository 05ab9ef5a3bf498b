// output[i] = sum_j w(logit_ij) value[j] / Z_i, tile by tile with a running normalizer.
//
// reference  regard/form/dense.py::product        backward  attend_grad.h
// work       2 n m (d + e) flops for the pairs in visited tiles
// scratch    (2 d + 2 e + KEYS) ROWS numbers a thread; nothing of size n m
// precision  everything in T; half-precision inputs are widened block by block, or multiplied in pairs,
//            which rounds weights and logits' gradients to bfloat16 (pairs.h)
// after      Milakov & Gimelshein 2018, arXiv:1805.02867 (running normalizer); Rabe & Staats 2021,
//            arXiv:2112.05682 (tiles); Dao 2023, arXiv:2307.08691, alg. 1 (loop order)
//
// Queries are the lanes of vectors: scores are S^T[key][query], so that maxima and sums over keys
// need no shuffles, and keys and values are read as they lie.
#pragma once

#include "few.h"

namespace regard::REGARD_ISA {

// A sum over keys is this many sums that are added up: one chain would round as often as it has
// terms, and wait for each.
constexpr int FEW = 4;

// Runs each(j, u) over keys [begin, end): u says to which of the FEW sums the term of key j goes.
template <class Each>
INLINE void few_sums(int begin, int end, const Each& each) {
  int j = begin;
  for (; j + FEW <= end; j += FEW)
#pragma GCC unroll 4
    for (int u = 0; u < FEW; ++u) each(j + u, u);
  for (; j < end; ++j) each(j, 0);
}

template <class T>
INLINE Vec<T> added_up(const Vec<T> (&sums)[FEW]) {
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The state of a normalizer for the rows of a tile.
template <class T>
struct State {
  T peak[ROWS], total[ROWS], decay[ROWS];
  T spread[ROWS];  // sum of e^x x, x = logit - peak, where it is asked for

  void start() {
    for (int i = 0; i < ROWS; ++i) peak[i] = -INF<T>, total[i] = spread[i] = 0, decay[i] = 1;
  }

  // Logits to weights relative to the peak, in place; returns whether earlier sums must decay.
  template <bool SPREAD = false>
  bool absorb(const Problem& p, const Visible<T>& v, T* tile) {
    if constexpr (PAIRS<T> && !SPREAD)
      if (in_pairs_of_keys(p)) return absorb_softmax<false, true>(v, tile);
    if (p.norm == Norm::softmax) return absorb_softmax<SPREAD, false>(v, tile);
    p.norm == Norm::row_sum ? absorb_sum(v, tile) : absorb_by_pair(p, v, tile);
    return false;
  }

  // Whether `absorb` leaves weights as pairs of keys.
  static bool in_pairs_of_keys(const Problem& p) {
    return in_pairs<T>(p) && p.norm == Norm::softmax && !p.dropout.lanes;
  }

  // What is in the sum without a key: eps; and the sink, which is one more key, whose value is 0.
  void absorb_constant(const Problem& p, int64_t lane) {
    if (p.norm == Norm::row_sum)
      for (T& sum : total) sum += T(p.norm_bias);
    if (!p.sink.data || p.norm != Norm::softmax) return;
    const Vec<T> sink = splat(number_of<T>(p, p.sink, lane));
    for (int i = 0; i < ROWS; i += W<T>) {
      const Vec<T> before = load(peak + i), top = max(before, sink);
      const Vec<T> base = top == -INF<T> ? Vec<T>{} : top;
      store(total + i, load(total + i) * exp<T>(before - base) + exp<T>(sink - base));
      store(peak + i, top);
    }
  }

  // After all keys: what makes weights of numbers that are relative to the peaks `from`.
  void factors(const Problem& p, const T* from, T* factor) const {
    for (int i = 0; i < ROWS; i += W<T>) {
      const Vec<T> top = load(peak + i), sum = load(total + i);
      Vec<T> one = splat(T(1));
      if (p.norm == Norm::softmax) one = exp<T>(load(from + i) - (top == -INF<T> ? Vec<T>{} : top));
      if (p.norm == Norm::softmax || p.norm == Norm::row_sum || p.mean)
        one = sum == 0 ? Vec<T>{} : one / sum;
      store(factor + i, one);
    }
  }

 private:
  // Weights of keys 2 j and 2 j + 1 to row j, 0 outside [begin, end).
  static __attribute__((always_inline)) void weigh_in_pairs(int begin, int end, T* at, Vec<T> base,
                                                            Vec<T> (&sums)[FEW]) {
    const auto weight = [&](int j, int u) __attribute__((always_inline)) {
      const Vec<T> one = exp<T, true>(load(at + j * GROUP<T>) - base);
      sums[u] += one;
      return one;
    };
    const auto both = [&](int j, int u) __attribute__((always_inline)) {
      const Vec<T> one = weight(j, u), other = weight(j + 1, u + 1);
      store(at + j / 2 * GROUP<T>, as_pairs(one, other));
    };
    int j = begin;
    if (j % 2 && j < end) store(at + j / 2 * GROUP<T>, as_pairs(Vec<T>{}, weight(j, 0))), ++j;
    for (; j + FEW <= end; j += FEW) both(j, 0), both(j + 2, 2);
    if (j + 2 <= end) both(j, 0), j += 2;
    if (j < end) store(at + j / 2 * GROUP<T>, as_pairs(weight(j, 0), Vec<T>{}));
  }

  template <bool SPREAD, bool PAIRED>
  bool absorb_softmax(const Visible<T>& v, T* tile) {
    bool moved = false;
    for (int g = 0; g < v.GROUPS; ++g)
      for (int q = 0; q < v.vectors(); ++q) {
        const int lane = g * GROUP<T> + q * W<T>;
        const Vec<T> before = load(peak + lane);
        Vec<T> now = before;
        T* at = tile + g * PANEL<T> + q * W<T>;
        for (int j = v.begin[g]; j < v.end[g]; ++j) now = max(load(at + j * GROUP<T>), now);
        const Vec<T> base = now == -INF<T> ? Vec<T>{} : now;
        Vec<T> sums[FEW] = {}, spreads[FEW] = {};
        if constexpr (PAIRED)
          weigh_in_pairs(v.begin[g], v.end[g], at, base, sums);
        else
          few_sums(v.begin[g], v.end[g], [&](int j, int u) __attribute__((always_inline)) {
            const Vec<T> x = load(at + j * GROUP<T>) - base, weight = exp<T>(x);
            store(at + j * GROUP<T>, weight);
            sums[u] += weight;
            // Below `low` the weight is 0, and 0 times infinity is not.
            if constexpr (SPREAD) spreads[u] += weight * max(x, splat(Constants<T>::low));
          });
        const Vec<T> shrink = exp<T>(before - base);
        if constexpr (SPREAD) {
          const Vec<T> moves = max(before - base, splat(Constants<T>::low));
          const Vec<T> earlier = (load(spread + lane) + load(total + lane) * moves) * shrink;
          store(spread + lane, earlier + added_up<T>(spreads));
        }
        store(decay + lane, shrink);
        store(total + lane, load(total + lane) * shrink + added_up<T>(sums));
        store(peak + lane, now);
        for (int k = 0; k < W<T>; ++k) moved |= before[k] != now[k];
      }
    return moved;
  }

  void absorb_sum(const Visible<T>& v, T* tile) {
    for (int g = 0; g < v.GROUPS; ++g)
      for (int q = 0; q < v.vectors(); ++q) {
        const int lane = g * GROUP<T> + q * W<T>;
        T* at = tile + g * PANEL<T> + q * W<T>;
        Vec<T> sums[FEW] = {};
        few_sums(v.begin[g], v.end[g], [&](int j, int u) __attribute__((always_inline)) {
          const Vec<T> logit = load(at + j * GROUP<T>), weight = logit == -INF<T> ? Vec<T>{} : logit;
          store(at + j * GROUP<T>, weight);
          sums[u] += weight;
        });
        store(total + lane, load(total + lane) + added_up<T>(sums));
      }
  }

  void absorb_by_pair(const Problem& p, const Visible<T>& v, T* tile) {
    const T bias = T(p.norm_bias);
    over(v, [&](int, int at, int q) {
      const Vec<T> logit = load(tile + at);
      if (p.norm == Norm::sigmoid)
        store(tile + at, sigmoid<T>(logit + bias));
      else if (p.norm == Norm::relu)
        store(tile + at, max(Vec<T>{}, logit));
      else
        store(tile + at, logit == -INF<T> ? Vec<T>{} : logit);
      if (p.mean) {
        const Vec<T> one = logit == -INF<T> ? Vec<T>{} : splat(T(1));
        store(total + q * W<T>, load(total + q * W<T>) + one);
      }
    });
  }
};

// What turns logits of finished rows into weights again.
template <class T>
struct Finished {
  T peak[ROWS], inverse[ROWS];

  Finished(const Problem& p, int64_t lane, int64_t row, int64_t count) {
    const int64_t at = lane * p.n + row;
    for (int i = 0; i < ROWS; ++i)
      set(i, i < count ? static_cast<const T*>(p.peak)[at + i] : 0,
          i < count ? static_cast<const T*>(p.total)[at + i] : 0);
  }

  explicit Finished(const State<T>& state) {
    for (int i = 0; i < ROWS; ++i) set(i, state.peak[i], state.total[i]);
  }

  // Signed weights of 0 do not tell whether the pair is there: -0 is one that is not.
  static __attribute__((always_inline)) Vec<T> present(Vec<T> logit, Vec<T> factor) {
    return logit == -INF<T> ? splat(T(-0.0)) : logit * factor + Vec<T>{};
  }
  static __attribute__((always_inline)) Bits<T> absent(Vec<T> weight) {
    return as_bits<T>(weight) == as_bits<T>(splat(T(-0.0)));
  }

  // The weight of a vector of logits of the tile's vector q.
  __attribute__((always_inline)) Vec<T> weight(const Problem& p, Vec<T> logit, int q) const {
    return weight(p, logit, load(peak + q * W<T>), load(inverse + q * W<T>));
  }

  INLINE Vec<T> weight(const Problem& p, Vec<T> logit, Vec<T> peak, Vec<T> inverse) {
    if (p.norm == Norm::softmax) return exp<T>(logit - peak) * inverse;
    if (p.norm == Norm::sigmoid) return sigmoid<T>(logit + T(p.norm_bias));
    if (p.norm == Norm::row_sum) return present(logit, inverse);
    if (p.norm == Norm::identity) return present(logit, splat(T(1)));
    return max(Vec<T>{}, logit) * (p.mean ? inverse : splat(T(1)));
  }

 private:
  void set(int i, T top, T total) {
    peak[i] = top == -INF<T> ? 0 : top;
    inverse[i] = total == 0 ? 0 : 1 / total;
  }
};

template <class T>
struct AttendScratch {
  Arena arena;
  Logits<T> logits;
  T *tile, *values_space;
  Tile<T> output;
  AttendScratch(void* memory, const Problem& p)
      : arena(memory),
        logits(arena, p),
        tile(arena.take<T>(KEYS * ROWS)),
        values_space(arena.take<T>(KEYS * packed_row<T>(p.e))),
        output(arena, p.e) {}

  // Adds the weights times the values of a block, `step` keys in a row of either.
  template <class Product>
  void add(const Product& product, const Visible<T>& v, Matrix<T> values, int step, bool few) {
    for (int g = 0; g < (few ? 1 : v.GROUPS); ++g) {
      const int begin = v.begin[g] / step, count = (v.end[g] + step - 1) / step - begin;
      const T *weights = tile + g * PANEL<T> + begin * GROUP<T>, *from = values.at + begin * values.row;
      if (few)
        with_rows<T>(logits.count, [&](auto rows) {
          few_outputs<rows.value>(product, output, Matrix<T>{from, values.row, 1}, count, weights);
        });
      else
        of_panel(v, product, output.width, output.column_panel(g), Matrix<T>{from, 1, values.row},
                 weights, count, true);
    }
  }

  // Every lane of the sums times a factor of its row.
  void scale_sums(const T* factor) {
    for (int g = 0; g < ROWS / GROUP<T>; ++g) {
      T* sums = output.column_panel(g);
      for (int64_t c = 0; c < output.width; ++c)
#pragma GCC unroll 2
        for (int q = 0; q < GROUP<T>; q += W<T>)
          store(sums + c * GROUP<T> + q,
                load(sums + c * GROUP<T> + q) * load(factor + g * GROUP<T> + q));
    }
  }

  // The same where the sums are rows: of few queries.
  void scale_rows(const T* factor) {
    for (int64_t c = 0; c < output.padded; c += GROUP<T>)
      for (int r = 0; r < MOST_FEW; ++r)
#pragma GCC unroll 2
        for (int q = 0; q < GROUP<T>; q += W<T>) {
          T* at = output.row_panel(c) + r * GROUP<T> + q;
          store(at, load(at) * factor[r]);
        }
  }
};

// 0 times NaN is NaN: values of a partly hidden block that are not finite are set to 0, and the rows
// that do see one are marked, one bit each.
template <class T>
static Matrix<T> shield(const Problem& p, const Visible<T>& v, Matrix<T> values, T* space,
                        uint64_t& poisoned) {
  const int64_t row = packed_row<T>(p.e);
  bool copied = values.at == space;
  for (int j = 0; j < v.count; ++j) {
    const T* value = values.at + j * values.row;
    Vec<T> excess{};  // x - x is 0 for finite numbers only
    int64_t at = 0;
    for (; at + W<T> <= p.e; at += W<T>) excess += load(value + at) - load(value + at);
    for (; at < p.e; ++at) excess += value[at] - value[at];
    if (sum<T>(excess) == 0) continue;
    poisoned |= v.keep[j];
    if (!copied)
      for (int k = 0; k < v.count; ++k)
        __builtin_memcpy(space + k * row, values.at + k * values.row, size_t(p.e) * sizeof(T));
    if (!copied) values = {space, row, 1}, copied = true;
    for (int64_t c = 0; c < p.e; ++c) space[j * row + c] = 0;
  }
  return values;
}

// Puts the sums of a tile where they belong.
template <class T>
static void finish(const Problem& p, AttendScratch<T>& s, State<T>& state, uint64_t poisoned, bool few,
                   T* peak, T* total) {
  T before[ROWS], factor[ROWS];
  __builtin_memcpy(before, state.peak, sizeof before);
  state.absorb_constant(p, s.logits.lane);
  state.factors(p, before, factor);
  for (int64_t i = 0; peak && i < s.logits.count; ++i)
    peak[i] = state.peak[i], total[i] = state.total[i];
  if (!p.e) return;
  for (int i = 0; i < ROWS; ++i)
    if (poisoned >> i & 1) factor[i] = T(__builtin_nan(""));
  if (few) {
    s.scale_rows(factor);
  } else {
    s.scale_sums(factor);
    s.output.columns_to_rows();
  }
  s.output.write_rows(p, p.output, s.logits.lane, s.logits.row, s.logits.count);
}

template <class T>
static void attend(const Problem& p, int64_t item, void* memory) {
  AttendScratch<T> s(memory, p);
  const int64_t tiles = (p.n + ROWS - 1) / ROWS;
  // Under a causal mask the last rows are the longest: they begin first.
  const int64_t lane = item / tiles, row = (tiles - 1 - item % tiles) * ROWS;
  s.logits.start(p, lane, row, p.n - row < ROWS ? p.n - row : ROWS);
  State<T> state;
  state.start();
  uint64_t poisoned = 0;
  for (int64_t c = 0; c < s.output.padded * ROWS; ++c) s.output.columns[c] = 0;
  Walk<T> walk(p, lane, row, s.logits.count);
  const bool few = is_few<T>(p, s.logits.count);
  for (int64_t c = 0; few && c < s.output.padded * ROWS; ++c) s.output.rows[c] = 0;
  for (Visible<T> v; walk.next(v);) {
    const Matrix<T> keys = s.logits.keys(p, v, Read::rows);
    Matrix<T> values{};
    if (p.e && !in_pairs<T>(p))
      values = block_of(p, p.value, lane, v, p.e, s.values_space, few ? Read::rows : Read::columns);
    if (few)
      few_logits(p, v, s.logits, keys, s.tile);
    else
      s.logits.tile(p, v, keys, s.tile);
    const bool moved = state.absorb(p, v, s.tile);
    if (moved && few) s.scale_rows(state.decay);
    if (moved && !few) s.scale_sums(state.decay);
    if (p.dropout.lanes) s.logits.drop(p, v, s.tile);
    if (!p.e) continue;
    if (in_pairs<T>(p)) {
      if (!state.in_pairs_of_keys(p)) pair_weights(v, s.tile);
      values = pair_keys(p, p.value, p.e, v, lane, s.values_space, poisoned);
      s.add(MultiplyPairs{}, v, values, 2, few);
    } else {
      if (p.mask.present && !v.full) values = shield(p, v, values, s.values_space, poisoned);
      s.add(Multiply{}, v, values, 1, few);
    }
  }
  const int64_t at = lane * p.n + row;
  finish(p, s, state, poisoned, few, p.peak ? static_cast<T*>(p.peak) + at : nullptr,
         p.total ? static_cast<T*>(p.total) + at : nullptr);
}

template <class T>
static size_t attend_scratch(const Problem& p) {
  return AttendScratch<T>(nullptr, p).arena.used;
}

static int64_t attend_items(const Problem& p) { return p.lanes * ((p.n + ROWS - 1) / ROWS); }

}  // namespace regard::REGARD_ISA
