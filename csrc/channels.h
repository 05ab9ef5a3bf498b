// Pairs of tokens that decay by a number of each channel's own, for the rows of delta.h:
//
//   A(x, y)_ts = sum_c x_tc y_sc e^(sum of g_c over tokens s + 1 to t), s <= t
//
// is no product of matrices. Split at a token m, s < m <= t, it is one: of x_t e^(sum from m to t) and of
// y_s e^(sum from s + 1 to m - 1), which whatever the decay are no larger than x and y. The halves of a
// chunk are split in the middle, and its quarters. Within leaves of 16 tokens what is left of x goes
// from key to key:
//
//   z_t = x_tc;   for s = t, t - 1, ...:   A_ts += z_t y_sc,   z_t *= e^g_sc
//
// reference  regard/form/chunks.py::_by_channel        backward  channels_grad.h
// work       a chunk: 0.75 ROWS^2 d flops of products, 3 LEAF ROWS d of leaves, 3 ROWS d exponentials
// precision  exponents are sums of numbers of one sign, and nothing is divided by a factor
// after      Yang et al. 2024, arXiv:2312.06635, section 4 (secondary chunks)
#pragma once

#include "chunk.h"

namespace regard::REGARD_ISA {

constexpr int64_t LEAF = 16;  // tokens; a multiple of every vector's lanes

// Those who ask, query and read, and those who are asked, key and write, as rows; those who ask as columns
// too. Null where there are none. Of each two a square as in chunk.h.
template <class T>
struct Pairs {
  Tile<T>*ask[2], *asked[2];
  T* at[2][2];

  template <class Each>
  void each(const Each& each) const {
    for (int x = 0; x < 2; ++x)
      for (int y = 0; y < 2; ++y)
        if (ask[x] && asked[y]) each(*ask[x], *asked[y], at[x][y]);
  }
};

// Rows from `first` on, to be broadcast.
template <class T>
INLINE Matrix<T> rows_from(const T* rows, int64_t first) {
  return {rows + first * GROUP<T>, GROUP<T>, 1, GROUP<T>, ROWS * GROUP<T>};
}

// Where token t as a query, and s as a key, lie in a square.
template <class T>
INLINE int64_t place(int64_t s, int64_t t) {
  return t / GROUP<T> * ROWS * GROUP<T> + s * GROUP<T> + t % GROUP<T>;
}

// And channel c of row r.
template <class T>
INLINE int64_t row_place(int64_t r, int64_t c) {
  return c / GROUP<T> * ROWS * GROUP<T> + r * GROUP<T> + c % GROUP<T>;
}

template <class T>
INLINE Bits<T> lane_is(int lane) {
  Bits<T> is{};
  is[lane] = -1;
  return is;
}

template <class T>
class ChannelDecays {
 public:
  ChannelDecays(Arena& arena, const Recurrence& p)
      : p(p),
        one(arena, p.d),
        padded(one.padded),
        enter(arena.take<T>(ROWS * padded)),
        leave(arena.take<T>(ROWS * padded)),
        whole(arena.take<T>(ROWS / LEAF * padded)),
        carried(arena.take<T>(padded * W<T>)),
        entered(arena, p.d),
        left{arena.take<T>(ROWS * padded), arena.take<T>(ROWS * padded)} {}

  void find(int64_t lane, int64_t first, int64_t some) {
    if (!p.decay.row && some == count) return;
    count = some;
    one.read_rows(p, p.decay, lane, first, count);  // and 0 after them
    for (int64_t c = 0; c < padded; c += W<T>)
      for (int64_t l = 0; l < ROWS / LEAF; ++l) {
        const int64_t at = row_place<T>(l * LEAF, c);
        Vec<T> sum{};
        for (int64_t r = 0; r < LEAF; ++r) {
          sum += load(one.rows + at + r * GROUP<T>);
          store(enter + at + r * GROUP<T>, exp<T>(sum));
        }
        store(whole + l * padded + c, exp<T>(sum));
        sum = Vec<T>{};
        for (int64_t r = LEAF - 1; r >= 0; --r) {
          T* g = one.rows + at + r * GROUP<T>;
          store(leave + at + r * GROUP<T>, exp<T>(sum));
          sum += load(g);
          store(g, exp<T>(load(g)));
        }
      }
  }

  // Rows as they enter the chunk, from its first token on, or as they leave it.
  template <bool ENTERS>
  const T* faded(const T* rows, T* to) const {
    fade<ENTERS>(to, rows, ROWS);
    return to;
  }

  // Panels of a state, [d][GROUP], after the chunk.
  void cross(T* state, int64_t panels) const {
    for (int64_t c = 0; c < p.d; ++c) {
      const T kept = across(c);
      for (int64_t j = 0; j < panels; ++j) {
        T* row = state + (j * p.d + c) * GROUP<T>;
        for (int q = 0; q < GROUP<T>; q += W<T>)
          store(row + q, kept == 0 ? Vec<T>{} : load(row + q) * kept);  // even what overflowed
      }
    }
  }

  void pairs(const Pairs<T>& of) {
    for (int64_t half = ROWS / 2; half >= LEAF; half /= 2) {
      if (half >= count) continue;
      for (int y = 0; y < 2; ++y)
        if (of.asked[y]) fade<false>(left[y], of.asked[y]->rows, half);
      for (int x = 0; x < 2; ++x) {
        if (!of.ask[x]) continue;
        fade<true>(entered.rows, of.ask[x]->rows, half);
        entered.rows_to_columns();
        for (int y = 0; y < 2; ++y)
          if (of.asked[y]) split(half, left[y], of.at[x][y]);
      }
    }
    of.each([&](const Tile<T>& x, const Tile<T>& y, T* square) { leaves(x, y, square); });
  }

  // What is kept of channel c across the chunk.
  T across(int64_t c) const {
    T kept = 1;
    for (int64_t l = 0; l < ROWS / LEAF; ++l) kept *= whole[l * padded + c];
    return kept;
  }

 protected:
  const Recurrence& p;
  Tile<T> one;  // e^g
  const int64_t padded;
  T *enter, *leave, *whole;  // of tokens from a leaf's first on, and after one to the leaf's last; of leaves
  T* carried;
  Tile<T> entered;
  T* left[2];
  int64_t count = -1;

  // What is kept of rows of every second `half` tokens (all where that is a chunk) from its first token on,
  // or after a row to its last.
  template <bool ENTERS, class Each>
  void each_kept(int64_t half, int64_t rows, const Each& each) const {
    const int64_t leaves = half / LEAF;
    for (int64_t c = 0; c < padded; c += W<T>)
      for (int64_t l = 0; l * LEAF < rows; ++l) {
        if (half < ROWS && (l / leaves % 2 == 1) != ENTERS) continue;
        Vec<T> between = splat(T(1));
        const int64_t begin = l / leaves * leaves;
        for (int64_t k = ENTERS ? begin : l + 1; k < (ENTERS ? l : begin + leaves); ++k)
          between *= load(whole + k * padded + c);
        for (int64_t r = l * LEAF; r < (l + 1) * LEAF && r < rows; ++r) {
          const int64_t at = row_place<T>(r, c);
          each(at, load((ENTERS ? enter : leave) + at) * between);
        }
      }
  }

  template <bool ENTERS>
  void fade(T* to, const T* from, int64_t half) const {
    if (ENTERS && GROUP<T> > half)  // lanes beside those that ask
      for (int64_t k = 0; k < ROWS * padded; k += W<T>) store(to + k, Vec<T>{});
    each_kept<ENTERS>(half, ROWS, [&](int64_t at, Vec<T> kept) __attribute__((always_inline)) {
      store(to + at, load(from + at) * kept);
    });
  }

  void split(int64_t half, const T* keys, T* square) const {
    for (int64_t t = 0; t < count; t += GROUP<T>) {
      if (GROUP<T> <= half && !(t & half)) continue;
      const int64_t s = t / (2 * half) * 2 * half;
      panel(half, square + place<T>(s, t), rows_from(keys, s), entered.column_panel(int(t / GROUP<T>)),
            p.d, false);
    }
  }

  void leaves(const Tile<T>& x, const Tile<T>& y, T* square) const {
    constexpr int KEYS_AT_ONCE = W<T> < 8 ? W<T> : 8;
    for (int64_t t = 0; t < count; t += W<T>) {
      T* to = square + place<T>(0, t);
      const T* asks = x.columns + place_of_column(t);
      for (int64_t s = t + W<T>; s < round_up(t + 1, GROUP<T>); ++s) store(to + s * GROUP<T>, Vec<T>{});
      for (int64_t s = t + W<T> - KEYS_AT_ONCE; s >= t / LEAF * LEAF; s -= KEYS_AT_ONCE) {
        if (s == t)
          some<KEYS_AT_ONCE, 0>(asks, y.rows, s, s + KEYS_AT_ONCE == t + W<T>, to);
        else if (s > t)
          some<KEYS_AT_ONCE, W<T> - KEYS_AT_ONCE>(asks, y.rows, s, true, to);
        else
          some<KEYS_AT_ONCE, -1>(asks, y.rows, s, false, to);
      }
    }
  }
  int64_t place_of_column(int64_t t) const { return t / GROUP<T> * padded * GROUP<T> + t % GROUP<T>; }

  // K keys from s on; OWN: the lane of the first one's own query, or -1.
  template <int K, int OWN>
  void some(const T* asks, const T* keys, int64_t s, bool begins, T* to) const {
    const T* kept = one.rows;
    Vec<T> sums[K] = {};
    for (int64_t c = 0; c < p.d; ++c) {
      const int64_t at = row_place<T>(s, c);
      const Vec<T> own = load(asks + c * GROUP<T>);
      Vec<T> z = begins ? Vec<T>{} : load(carried + c * W<T>);
#pragma GCC unroll 8
      for (int k = K - 1; k >= 0; --k) {
        if constexpr (OWN >= 0) z = lane_is<T>(OWN + k) ? own : z;
        sums[k] += z * keys[at + k * GROUP<T>];
        z *= kept[at + k * GROUP<T>];
      }
      store(carried + c * W<T>, z);
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) store(to + (s + k) * GROUP<T>, sums[k]);
  }
};

}  // namespace regard::REGARD_ISA
