// output[i] = sum_j w(logit_ij) value[j] / Z_i, tile by tile with a running normalizer.
//
// reference  regard/form/dense.py::product        backward  attend_grad.h
// work       2 n m (d + e) flops for the pairs in visited tiles
// scratch    (2 d + 2 e + KEYS) ROWS numbers a thread; nothing of size n m
// precision  everything in T; half-precision inputs are widened block by block
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

// The state of a normalizer for the rows of a tile.
template <class T>
struct State {
  T peak[ROWS], total[ROWS], decay[ROWS];

  void start() {
    for (int i = 0; i < ROWS; ++i) peak[i] = -INF<T>, total[i] = 0, decay[i] = 1;
  }

  // Logits to weights relative to the peak, in place; returns whether earlier sums must decay.
  bool absorb(const Problem& p, const Visible<T>& v, T* tile) {
    if (p.norm == Norm::softmax) return absorb_softmax(v, tile);
    p.norm == Norm::row_sum ? absorb_sum(v, tile) : absorb_by_pair(p, v, tile);
    return false;
  }

 private:
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
        Vec<T> sums[FEW] = {};
        const auto one = [&](int j, Vec<T>& sum) __attribute__((always_inline)) {
          const Vec<T> weight = exp<T>(load(at + j * GROUP<T>) - base);
          store(at + j * GROUP<T>, weight);
          sum += weight;
        };
        int j = v.begin[g];
        for (; j + FEW <= v.end[g]; j += FEW)
#pragma GCC unroll 4
          for (int u = 0; u < FEW; ++u) one(j + u, sums[u]);
        for (; j < v.end[g]; ++j) one(j, sums[0]);
        const Vec<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        const Vec<T> shrink = exp<T>(before - base);
        store(decay + lane, shrink);
        store(total + lane, load(total + lane) * shrink + sum);
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
        for (int j = v.begin[g]; j < v.end[g]; ++j) {
          const Vec<T> logit = load(at + j * GROUP<T>), weight = logit == -INF<T> ? Vec<T>{} : logit;
          store(at + j * GROUP<T>, weight);
          sums[j % FEW] += weight;
        }
        store(total + lane, load(total + lane) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
      }
  }

  void absorb_by_pair(const Problem& p, const Visible<T>& v, T* tile) {
    const T bias = T(p.norm_bias);
    over(v, [&](int, int at, int q) {
      const Vec<T> logit = load(tile + at);
      if (p.norm == Norm::sigmoid)
        store(tile + at, sigmoid<T>(logit + bias));
      else if (p.norm == Norm::relu)
        store(tile + at, max(logit, Vec<T>{}));
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
    for (int i = 0; i < ROWS; ++i) {
      const T top = i < count ? static_cast<const T*>(p.peak)[at + i] : 0;
      const T total = i < count ? static_cast<const T*>(p.total)[at + i] : 0;
      peak[i] = top == -INF<T> ? 0 : top;
      inverse[i] = total == 0 ? 0 : 1 / total;
    }
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
    if (p.norm == Norm::softmax)
      return exp<T>(logit - load(peak + q * W<T>)) * load(inverse + q * W<T>);
    if (p.norm == Norm::sigmoid) return sigmoid<T>(logit + T(p.norm_bias));
    if (p.norm == Norm::row_sum) return present(logit, load(inverse + q * W<T>));
    if (p.norm == Norm::identity) return present(logit, splat(T(1)));
    return max(logit, Vec<T>{}) * (p.mean ? load(inverse + q * W<T>) : splat(T(1)));
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
  T factor[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    factor[i] = 1;
    if (p.norm == Norm::softmax) {
      if (p.sink.data) {
        // The sink is one more key, whose value is 0.
        const T sink = number_of<T>(p, p.sink, s.logits.lane);
        const T top = state.peak[i] > sink ? state.peak[i] : sink;
        const T base = top == -INF<T> ? 0 : top;
        factor[i] = exp<T>(splat(state.peak[i] - base))[0];
        state.total[i] = state.total[i] * factor[i] + exp<T>(splat(sink - base))[0];
        state.peak[i] = top;
      }
      factor[i] = state.total[i] == 0 ? 0 : factor[i] / state.total[i];
    } else if (p.mean || p.norm == Norm::row_sum) {
      if (p.norm == Norm::row_sum) state.total[i] += T(p.norm_bias);
      factor[i] = state.total[i] == 0 ? 0 : 1 / state.total[i];
    }
  }
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
    if (p.e)
      values = block_of(p, p.value, lane, v.first, v.count, p.e, s.values_space,
                        few ? Read::rows : Read::columns);
    if (few) {
      with_rows<T>(s.logits.count, [&](auto rows) {
        few_scores<rows.value>(s.logits.query, keys, v.count, s.tile, values);
      });
      s.logits.shape(p, v, s.tile);
    } else {
      s.logits.tile(p, v, keys, s.tile);
    }
    const bool moved = state.absorb(p, v, s.tile);
    if (moved && few) s.scale_rows(state.decay);
    if (moved && !few) s.scale_sums(state.decay);
    if (p.dropout.lanes) s.logits.drop(p, v, s.tile);
    if (!p.e) continue;
    if (p.mask.present && !v.full) values = shield(p, v, values, s.values_space, poisoned);
    if (few) {
      with_rows<T>(s.logits.count, [&](auto rows) {
        few_outputs<rows.value>(s.output, Matrix<T>{values.at + v.begin[0] * values.row, values.row, 1},
                                v.end[0] - v.begin[0], s.tile + v.begin[0] * GROUP<T>);
      });
      continue;
    }
    for (int g = 0; g < v.GROUPS; ++g)
      of_panel(v, Multiply{}, p.e, s.output.column_panel(g),
               Matrix<T>{values.at + v.begin[g] * values.row, 1, values.row},
               s.tile + g * PANEL<T> + v.begin[g] * GROUP<T>, v.end[g] - v.begin[g], true);
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
