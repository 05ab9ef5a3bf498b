// The logits of a tile: score, softcap, biases, mask. And dropout. Everything is [key][query].
#pragma once

#include "tile.h"

namespace regard::REGARD_ISA {

// Steps of a score that is a sum over the width: what `product` does instead of multiplying.
template <class T>
struct Distance {
  const T* weight;
  template <class>
  __attribute__((always_inline)) Vec<T> call(Vec<T> sum, T a, Vec<T> b, int64_t k) const {
    const Vec<T> x = b - a;
    return sum + x * x * weight[k];
  }
};

template <class T>
struct Leaky {
  const T* weight;
  T slope;
  template <class>
  __attribute__((always_inline)) Vec<T> call(Vec<T> sum, T a, Vec<T> b, int64_t k) const {
    const Vec<T> x = b + a;
    return sum + (x > 0 ? x : x * slope) * weight[k];
  }
};

template <class T>
struct Tanh {
  const T* weight;
  template <class>
  __attribute__((always_inline)) Vec<T> call(Vec<T> sum, T a, Vec<T> b, int64_t k) const {
    return sum + tanh<T>(b + a) * weight[k];
  }
};

// A tile of numbers per pair is panels [ROWS / GROUP][KEYS][GROUP].
template <class T>
constexpr int PANEL = KEYS * GROUP<T>;

// Runs `each(j, offset, v)` over the visible part of a tile: v numbers its vectors of lanes.
template <class T, class Each>
INLINE void over(const Visible<T>& v, const Each& each) {
  for (int g = 0; g < v.GROUPS; ++g)
    for (int j = v.begin[g]; j < v.end[g]; ++j)
#pragma GCC unroll 2
      for (int q = 0; q < TILE_VECTORS; ++q)
        each(j, g * PANEL<T> + j * GROUP<T> + q * W<T>, g * TILE_VECTORS + q);
}

// splitmix64 (Steele, Lea, Flood 2014).
INLINE uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// Everything that the logits of one tile of queries depend on.
template <class T>
class Logits {
 public:
  Logits(Arena& arena, const Problem& p)
      : query(arena, p.d),
        keys_space(arena.take<T>(KEYS * packed_row<T>(p.d))),
        bias_space(arena.take<T>(p.bias.data ? 2 * KEYS * ROWS : 0)),
        weight(arena.take<T>(p.weight.data ? query.padded : 0)) {}

  // Packs the queries [first, first + count) of a lane.
  void start(const Problem& p, int64_t of_lane, int64_t first, int64_t number) {
    lane = of_lane, row = first, count = number;
    query.read_rows(p, p.query, lane, row, count, p.score == Score::dot ? p.scale : 1);
    query.rows_to_columns();
    if (p.weight.data) {
      for (int64_t c = p.d; c < query.padded; ++c) weight[c] = 0;
      read(weight, row_of(p, p.weight, lane, 0), p.weight.kind, p.d);
    }
    if (p.toeplitz.data)
      by_offset = reinterpret_cast<const T*>(row_of(p, p.toeplitz, lane, 0)) + row + p.m - 1;
    if (!p.dropout.lanes) return;
    const uint64_t of_lane_seed = mix(uint64_t(p.dropout.lanes[lane]) + uint64_t(p.dropout.seed));
    for (int i = 0; i < ROWS; ++i) {
      const uint64_t key = mix(of_lane_seed + uint64_t(row + i));
      fixed[i / W<T>][i % W<T>] = uint32_t(key), added[i / W<T>][i % W<T>] = uint32_t(key >> 32);
    }
  }

  Matrix<T> keys(const Problem& p, const Visible<T>& v, Read how) const {
    return block_of(p, p.key, lane, v.first, v.count, p.d, keys_space, how);
  }

  // logits[key][query] where visible, -inf elsewhere within each group's range of keys.
  // slopes: the derivatives of softcap, if they are wanted.
  void tile(const Problem& p, const Visible<T>& v, Matrix<T> keys, T* logits,
            T* slopes = nullptr) const {
    scores(p, v, keys, logits);
    if (p.softcap) {
      const T cap = T(p.softcap), inverse = T(1 / p.softcap);
      over(v, [&](int, int at, int) {
        const Vec<T> bent = tanh<T>(load(logits + at) * inverse);
        store(logits + at, bent * cap);
        if (slopes) store(slopes + at, 1 - bent * bent);
      });
    }
    if (p.toeplitz.data)
      over(v, [&](int j, int at, int q) {
        store(logits + at, load(logits + at) + load(by_offset - v.first - j + q * W<T>));
      });
    if (p.bias.data) add_bias(p, v, logits);
    if (!v.full)
      over(v, [&](int j, int at, int q) {
        const Bits<T> keep = expand<T>(v.keep[j] >> (q * W<T>));
        store(logits + at, keep ? load(logits + at) : splat(-INF<T>));
      });
  }

  // Multiplies weights by their dropout factors: regard/dropout.py defines them.
  void drop(const Problem& p, const Visible<T>& v, T* tile) const {
    over(v, [&](int j, int at, int q) {
      store(tile + at, load(tile + at) * drop_factor(p, v.first + j, q));
    });
  }

  Vec<T> drop_factor(const Problem& p, int64_t j, int q) const {
    typedef Words<T> Word;
    Word h = fixed[q] ^ uint32_t(j);
    h ^= h >> 16;
    h = h * 0x7feb352du & 0xffffffffu;
    h ^= h >> 15;
    h = ((h + added[q]) & 0xffffffffu) * 0x846ca68bu & 0xffffffffu;
    const Bits<T> falls = (h ^ h >> 16) >> 8 < Word{} + uint32_t(p.dropout.threshold);
    return falls ? Vec<T>{} : splat(T(p.dropout.factor));
  }

  Tile<T> query;  // scaled, for dot products
  int64_t lane = 0, row = 0, count = 0;

 private:
  T *keys_space, *bias_space;
 public:
  T* weight;
 private:
  const T* by_offset = nullptr;
  Words<T> fixed[ROWS / W<T>], added[ROWS / W<T>];  // of the dropout hash, for each row

  template <class Step>
  void sums(const Problem& p, const Visible<T>& v, Matrix<T> keys, T* out, const Step& step) const {
    for (int g = 0; g < v.GROUPS; ++g)
      if (v.begin[g] < v.end[g])
        panel_product<TILE_VECTORS>(step, v.end[g] - v.begin[g],
                                    out + g * PANEL<T> + v.begin[g] * GROUP<T>, GROUP<T>,
                                    Matrix<T>{keys.at + v.begin[g] * keys.row, keys.row, 1},
                                    query.column_panel(g), p.d, false);
  }

  void scores(const Problem& p, const Visible<T>& v, Matrix<T> keys, T* out) const {
    if (!p.d) return over(v, [&](int, int at, int) { store(out + at, Vec<T>{}); });
    switch (p.score) {
      case Score::dot:
        return sums(p, v, keys, out, Multiply{});
      case Score::distance:
        return sums(p, v, keys, out, Distance<T>{weight});
      case Score::leaky:
        return sums(p, v, keys, out, Leaky<T>{weight, T(p.slope)});
      case Score::tanh:
      case Score::reciprocal:
        return sums(p, v, keys, out, Tanh<T>{weight});
    }
  }

  void add_bias(const Problem& p, const Visible<T>& v, T* logits) const {
    const Operand& b = p.bias;
    const int64_t size = size_of(b.kind);
    const char* from = row_of(p, b, lane, row) + v.first * b.column * size;
    if (b.row == 0) {  // one row of biases for all queries
      read(bias_space, from, b.kind, v.count, b.column);
      return over(v, [&](int j, int at, int) { store(logits + at, load(logits + at) + bias_space[j]); });
    }
    T *across = bias_space, *along = bias_space + KEYS * ROWS;  // [query][KEYS], [key][query]
    for (int64_t r = 0; r < ROWS; ++r) {
      T* to = across + r * KEYS;
      const int64_t filled = r < count ? v.count : 0;
      if (filled) read(to, from + r * b.row * size, b.kind, filled, b.column);
      for (int64_t j = filled; j < KEYS; ++j) to[j] = 0;
    }
    for (int64_t r = 0; r < ROWS; r += W<T>)
      for (int64_t c = 0; c < KEYS; c += W<T>)
        transpose_block(along + r / GROUP<T> * PANEL<T> + c * GROUP<T> + r % GROUP<T>, GROUP<T>,
                        across + r * KEYS + c, KEYS);
    over(v, [&](int, int at, int) { store(logits + at, load(logits + at) + load(along + at)); });
  }
};

}  // namespace regard::REGARD_ISA
