// The logits of a tile: score, softcap, biases, mask. And dropout. Everything is [key][query].
#pragma once

#include "pairs.h"

namespace regard::REGARD_ISA {

// Steps of scores that are sums over the width: what `product` does instead of multiplying.
template <class T>
struct Distance {
  static constexpr int ROWS_AT_ONCE = 4;
  const T* weight;
  template <class>
  __attribute__((always_inline)) Vec<T> call(Vec<T> sum, T a, Vec<T> b, int64_t k) const {
    const Vec<T> x = b - a;
    return sum + x * x * weight[k];
  }
};

// w leaky(x) = slope w x + (1 - slope) w max(x, 0): the first part is a sum per token (`linear`), so
// that a pair costs an addition, a maximum and one multiply-add. weight: (1 - slope) w.
template <class T>
struct Leaky {
  static constexpr int ROWS_AT_ONCE = 4;
  const T* weight;
  template <class>
  __attribute__((always_inline)) Vec<T> call(Vec<T> sum, T a, Vec<T> b, int64_t k) const {
    return sum + max(b + a, Vec<T>{}) * weight[k];
  }
};

template <class T>
struct Tanh {
  static constexpr int ROWS_AT_ONCE = 2;
  const T* weight;
  template <class>
  __attribute__((always_inline)) Vec<T> call(Vec<T> sum, T a, Vec<T> b, int64_t k) const {
    return sum + tanh<T>(b + a) * weight[k];
  }
};

// Sums over d of 1 / a_d, a_d = c_d + q_d k_d, of R keys and one vector of queries. Four terms share
// one division: (a + b) / (a b) twice, and once more. a_d stops at 2^31, so that no product of four
// overflows, and what is cut off is 2^-31 of the largest weight.
template <int R, class T>
INLINE void sum_of_reciprocals(T* out, const T* keys, int64_t row, const T* queries, const T* c,
                               int64_t width) {
  Vec<T> sums[R] = {};
  for (int64_t d = 0; d < width; d += 4) {
    Vec<T> q[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) q[u] = load(queries + (d + u) * GROUP<T>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec<T> a[4];
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        a[u] = q[u] * keys[r * row + d + u] + c[d + u];
        a[u] = min(a[u], splat(T(2147483648.0)));
      }
      const Vec<T> one = a[0] * a[1], other = a[2] * a[3];
      sums[r] += ((a[0] + a[1]) * other + (a[2] + a[3]) * one) / (one * other);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) store(out + r * GROUP<T>, sums[r]);
}

// panel_product to a panel; one vector is enough where a tile has so few queries.
template <class T, class Step>
INLINE void of_panel(const Visible<T>& v, const Step& step, int64_t rows, T* c, Matrix<T> a,
                     const T* b, int64_t count, bool add) {
  if (v.few)
    panel_product<1>(step, rows, c, GROUP<T>, a, b, count, add);
  else
    panel_product<TILE_VECTORS>(step, rows, c, GROUP<T>, a, b, count, add);
}

// Runs `each(j, offset, v)` over the visible part of a tile: v numbers its vectors of lanes.
template <class T, class Each>
INLINE void over(const Visible<T>& v, const Each& each) {
  for (int g = 0; g < v.GROUPS; ++g)
    for (int j = v.begin[g]; j < v.end[g]; ++j)
      for (int q = 0; q < v.vectors(); ++q)
        each(j, g * PANEL<T> + j * GROUP<T> + q * W<T>, g * TILE_VECTORS + q);
}

// splitmix64 (Steele, Lea, Flood 2014).
INLINE uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// Which entries of the rows' bands a block of keys meets: key j and row r meet in entry
// j - r + shift, those before the first in the first, those behind the last in the last.
struct Overlap {
  int64_t shift, keys, last;
  int64_t begin(int64_t r) const { return clip(r - shift, 0); }  // the first key inside
  int64_t end(int64_t r) const { return clip(r - shift + last + 1, begin(r)); }
  bool before() const { return keys - 1 + shift <= 0; }  // every key, for every row
  bool behind(int64_t rows) const { return shift - (rows - 1) >= last; }

 private:
  int64_t clip(int64_t key, int64_t least) const {
    return key < least ? least : key > keys ? keys : key;
  }
};

// Everything that the logits of one tile of queries depend on.
template <class T>
class Logits {
 public:
  Logits(Arena& arena, const Problem& p)
      : query(arena, factors_in<T>(p, p.d)),
        weight(arena.take<T>(p.weight.data ? query.padded + 2 : 0)),
        bias_space(arena.take<T>(p.bias.data || p.band.data ? 2 * KEYS * ROWS : 0)),
        keys_space(arena.take<T>(KEYS * packed_row<T>(p.d))),
        bent(arena.take<T>(p.score == Score::leaky ? query.padded : 0)) {}

  // Packs the queries [first, first + count) of a lane.
  void start(const Problem& p, int64_t of_lane, int64_t first, int64_t number) {
    lane = of_lane, row = first, count = number;
    query.read_rows(p, factors_of<T>(p, p.query), lane, row, count,
                    p.score == Score::dot && !p.pairs ? p.scale : 1);
    query.rows_to_columns();
    if (p.weight.data) {
      // After the width's own numbers come two of score `reciprocal`.
      for (int64_t c = p.d; c < query.padded + 2; ++c) weight[c] = 0;
      read(weight, row_of(p, p.weight, lane, 0), p.weight.kind,
           p.d + (p.score == Score::reciprocal ? 2 : 0));
    }
    if (p.score == Score::leaky && p.slope) {
      for (int64_t c = 0; c < p.d; ++c) bent[c] = weight[c] * T(1 - p.slope);
      for (int i = 0; i < ROWS; ++i) linear[i] = 0;
      for (int64_t c = 0; c < p.d; ++c)
        for (int g = 0; g < ROWS / GROUP<T>; ++g)
          for (int q = 0; q < GROUP<T>; q += W<T>)
            store(linear + g * GROUP<T> + q,
                  load(linear + g * GROUP<T> + q) +
                      load(query.column_panel(g) + c * GROUP<T> + q) * (weight[c] * T(p.slope)));
    }
    if (p.toeplitz.data)
      by_offset = reinterpret_cast<const T*>(row_of(p, p.toeplitz, lane, 0)) + row + p.m - 1;
    if (p.band.data) band = row_of(p, p.band, lane, row);
    for (int64_t r = 0; band && r < ROWS; ++r) {
      before[r] = behind[r] = 0;
      if (r >= count) continue;
      read(before + r, entry_of(p, r, 0), p.band.kind, 1);
      read(behind + r, entry_of(p, r, p.band_width - 1), p.band.kind, 1);
    }
    if (!p.dropout.lanes) return;
    const uint64_t of_lane_seed = mix(uint64_t(p.dropout.lanes[lane]) + uint64_t(p.dropout.seed));
    for (int i = 0; i < ROWS; ++i) {
      const uint64_t key = mix(of_lane_seed + uint64_t(row + i));
      fixed[i / W<T>][i % W<T>] = uint32_t(key), added[i / W<T>][i % W<T>] = uint32_t(key >> 32);
    }
  }

  Matrix<T> keys(const Problem& p, const Visible<T>& v, Read how) const {
    return block_of(p, factors_of<T>(p, p.key), lane, v, query.width, keys_space, how);
  }

  // logits[key][query] where visible, -inf elsewhere within each group's range of keys.
  // slopes: the derivatives of softcap, if they are wanted.
  void tile(const Problem& p, const Visible<T>& v, Matrix<T> keys, T* logits,
            T* slopes = nullptr) const {
    scores(p, v, keys, logits);
    shape(p, v, logits, slopes);
  }

  // What follows the scores.
  void shape(const Problem& p, const Visible<T>& v, T* logits, T* slopes = nullptr) const {
    if (p.softcap) {
      const T cap = T(p.softcap), inverse = T(1 / p.softcap);
      over(v, [&](int, int at, int) {
        Vec<T> slope;
        store(logits + at, tanh<T>(load(logits + at) * inverse, slopes ? &slope : nullptr) * cap);
        if (slopes) store(slopes + at, slope);
      });
    }
    if (p.toeplitz.data)
      over(v, [&](int j, int at, int q) {
        store(logits + at, load(logits + at) + load(by_offset - v.first - j + q * W<T>));
      });
    if (p.bias.data) add_bias(p, v, logits);
    if (p.band.data) add_band(p, v, logits);
    if (!v.full)
      over(v, [&](int j, int at, int q) {
        const Bits<T> keep = expand<T>(v.keep[j] >> (q * W<T>));
        store(logits + at, keep ? load(logits + at) : splat(-INF<T>));
      });
  }

  // Multiplies weights by their dropout factors: regard/dropout.py defines them.
  void drop(const Problem& p, const Visible<T>& v, T* tile) const {
    over(v, [&](int j, int at, int q) {
      store(tile + at, load(tile + at) * drop_factor(p, v.column(j), q));
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

  Overlap overlap(const Problem& p, const Visible<T>& v) const {
    return {v.first - row - p.band_offset + p.band_left, v.count, p.band_width - 1};
  }

  Tile<T> query;  // scaled, for dot products
  T* weight;      // of additive scores and distances
  T* bias_space;  // two tiles: [query][KEYS] and [key][query]
  int64_t lane = 0, row = 0, count = 0;

 private:
  T* keys_space;
  T* bent;         // weights of the part of leaky that is not linear
  T linear[ROWS];  // slope w . query
  const T* by_offset = nullptr;
  const char* band = nullptr;    // of the tile's first row
  T before[ROWS], behind[ROWS];  // the first and the last entry of each row's band
  Words<T> fixed[ROWS / W<T>], added[ROWS / W<T>];  // of the dropout hash, for each row

  template <class Step>
  void sums(const Visible<T>& v, Matrix<T> keys, T* out, const Step& step) const {
    for (int g = 0; g < v.GROUPS; ++g)
      of_panel(v, step, v.end[g] - v.begin[g], out + g * PANEL<T> + v.begin[g] * GROUP<T>,
               Matrix<T>{keys.at + v.begin[g] * keys.row, keys.row, 1}, query.column_panel(g),
               query.width, false);
  }

  void scores(const Problem& p, const Visible<T>& v, Matrix<T> keys, T* out) const {
    if (!p.d) return over(v, [&](int, int at, int) { store(out + at, Vec<T>{}); });
    switch (p.score) {
      case Score::dot:
        if (in_pairs<T>(p)) return sums(v, keys, out, ScaledPairs{{}, float(p.scale)});
        return sums(v, keys, out, Multiply{});
      case Score::distance:
        return sums(v, keys, out, Distance<T>{weight});
      case Score::leaky:
        if (!p.slope) return sums(v, keys, out, Leaky<T>{weight});
        sums(v, keys, out, Leaky<T>{bent});
        return add_linear(p, v, keys, out);
      case Score::tanh:
        return sums(v, keys, out, Tanh<T>{weight});
      case Score::reciprocal:
        return reciprocals(p, v, keys, out);
    }
  }

  void add_linear(const Problem& p, const Visible<T>& v, Matrix<T> keys, T* out) const {
    T of_key[KEYS];
    for (int j = 0; j < v.count; ++j) {
      Vec<T> total{};
      const T* key = keys.at + j * keys.row;
      int64_t c = 0;
      for (; c + W<T> <= p.d; c += W<T>) total += load(key + c) * load(weight + c);
      of_key[j] = sum<T>(total);
      for (; c < p.d; ++c) of_key[j] += key[c] * weight[c];
      of_key[j] *= T(p.slope);
    }
    over(v, [&](int j, int at, int q) {
      store(out + at, load(out + at) + (load(linear + q * W<T>) + of_key[j]));
    });
  }

  // w . tanh(q + k) = sum w_d - 2 sum w_d / (1 + e^(2 q_d) e^(2 k_d)), as regard/form/separable.py
  // prepares it: weight[d] holds the first number, weight[d + 1] the factor of the sum.
  void reciprocals(const Problem& p, const Visible<T>& v, Matrix<T> keys, T* out) const {
    const T first = weight[p.d], factor = weight[p.d + 1];
    for (int g = 0; g < v.GROUPS; ++g)
      for (int q = 0; q < v.vectors(); ++q) {
        const T* queries = query.column_panel(g) + q * W<T>;
        T* to = out + g * PANEL<T> + q * W<T>;
        int j = v.begin[g];
        for (; j + 4 <= v.end[g]; j += 4)
          sum_of_reciprocals<4>(to + j * GROUP<T>, keys.at + j * keys.row, keys.row, queries, weight, p.d);
        for (; j < v.end[g]; ++j)
          sum_of_reciprocals<1>(to + j * GROUP<T>, keys.at + j * keys.row, keys.row, queries, weight, p.d);
      }
    over(v, [&](int, int at, int) { store(out + at, load(out + at) * factor + first); });
  }

  void add_bias(const Problem& p, const Visible<T>& v, T* logits) const {
    const Operand& b = p.bias;
    const int64_t size = size_of(b.kind);
    const char* from = row_of(p, b, lane, row) + v.first * b.column * size;
    if (b.row == 0) {  // one row of biases for all queries
      read(bias_space, from, b.kind, v.count, b.column);
      return over(v, [&](int j, int at, int) { store(logits + at, load(logits + at) + bias_space[j]); });
    }
    add_rows(v, logits, [&](int64_t r, T* to) {
      read(to, from + r * b.row * size, b.kind, v.count, b.column);
    });
  }

  const char* entry_of(const Problem& p, int64_t r, int64_t entry) const {
    return band + (r * p.band.row + entry) * size_of(p.band.kind);
  }

  void add_band(const Problem& p, const Visible<T>& v, T* logits) const {
    const Overlap of = overlap(p, v);
    const T* tail = of.before() ? before : of.behind(count) ? behind : nullptr;
    if (tail)
      return over(v, [&](int, int at, int q) {
        store(logits + at, load(logits + at) + load(tail + q * W<T>));
      });
    add_rows(v, logits, [&](int64_t r, T* to) {
      const int64_t begin = of.begin(r), end = of.end(r);
      for (int64_t j = 0; j < begin; ++j) to[j] = before[r];
      if (begin < end) read(to + begin, entry_of(p, r, begin - r + of.shift), p.band.kind, end - begin);
      for (int64_t j = end; j < v.count; ++j) to[j] = behind[r];
    });
  }

  // Adds a tile of which row(r, to) writes the numbers of one query.
  template <class Row>
  void add_rows(const Visible<T>& v, T* logits, const Row& row) const {
    T *across = bias_space, *along = bias_space + KEYS * ROWS;
    const int64_t rows = v.few ? W<T> : ROWS;
    for (int64_t r = 0; r < rows; ++r) {
      T* to = across + r * KEYS;
      const int64_t filled = r < count ? v.count : 0;
      if (filled) row(r, to);
      for (int64_t j = filled; j < KEYS; ++j) to[j] = 0;
    }
    for (int64_t r = 0; r < rows; r += W<T>)
      for (int64_t c = 0; c < v.count; c += W<T>)
        transpose_block(along + r / GROUP<T> * PANEL<T> + c * GROUP<T> + r % GROUP<T>, GROUP<T>,
                        across + r * KEYS + c, KEYS);
    over(v, [&](int, int at, int) { store(logits + at, load(logits + at) + load(along + at)); });
  }
};

}  // namespace regard::REGARD_ISA
