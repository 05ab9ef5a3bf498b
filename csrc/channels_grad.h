// Gradients of the pairs of channels.h from those of a square, dA_ts:
//
//   dx_t = sum of dA_ts y_s e^G_ts over s <= t        dy_s = sum of dA_ts x_t e^G_ts over t >= s
//   dg_u = sum of dA_ts x_t y_s e^G_ts over s < u <= t, channel by channel
//
// Of halves that are split at m, with x' and y' what channels.h multiplies: dg_u gets x'_t dx'_t of t >= u
// from a u in the second half, y'_s dy'_s of s < u from one in the first. In a leaf, for each t,
//
//   z_s = x_t e^G_ts, from t back;    h_u = e^g_u h_(u-1) + dA_tu y_u, from the first on
//   dy_s += dA_ts z_s,  dg_u += (e^g_u h_(u-1)) z_u,  dx_t = h_t
//
// reference  regard/form/chunks.py::_by_channel        forward  channels.h
// precision  every number is a sum of the pairs that it is made of: x dx - y dy, summed over all later
//            tokens, is as short and has no digits left where much is forgotten
#pragma once

#include "channels.h"

namespace regard::REGARD_ISA {

template <class T>
class ChannelSlopes : public ChannelDecays<T> {
  typedef ChannelDecays<T> Base;
  using Base::p, Base::padded, Base::count, Base::one, Base::left;

 public:
  ChannelSlopes(Arena& arena, const Recurrence& p)
      : Base(arena, p), dlog(arena, p.d), products(arena.take<T>(ROWS * padded)) {
    for (T*& x : right) x = arena.take<T>(ROWS * padded);
    for (T*& x : sums) x = arena.take<T>(ROWS * padded);
  }

  void begin() {
    for (int64_t k = 0; k < ROWS * padded; k += W<T>) {
      store(dlog.rows + k, Vec<T>{});
      for (T* x : sums) store(x + k, Vec<T>{});
    }
  }

  // Gradients of rows as they enter the chunk or leave it to those of the rows.
  template <bool ENTERS>
  void of_faded(T* slopes, const T* rows) {
    move<ENTERS>(slopes, slopes, rows, ROWS, sums[!ENTERS], false);
  }

  // What the pairs give to the gradients of those who ask and those who are asked.
  void of_pairs(const Pairs<T>& of, T* const (&dpairs)[2][2], T* const (&dask)[2], T* const (&dasked)[2]) {
    int64_t level = 2;
    for (int64_t half = ROWS / 2; half >= LEAF; half /= 2, ++level) {
      if (half >= count) continue;
      for (int k = 0; k < 2; ++k) {
        if (of.ask[k]) Base::template fade<true>(right[k], of.ask[k]->rows, half);
        if (of.asked[k]) Base::template fade<false>(left[k], of.asked[k]->rows, half);
      }
      for (int x = 0; x < 2; ++x) {
        if (!of.ask[x]) continue;
        of_asking(of, dpairs[x], half);
        move<true>(dask[x], products, of.ask[x]->rows, half, sums[level], true);
      }
      for (int y = 0; y < 2; ++y) {
        if (!of.asked[y]) continue;
        of_asked(of, y, dpairs, half);
        move<false>(dasked[y], products, of.asked[y]->rows, half, sums[level], true);
      }
    }
    for (int x = 0; x < 2; ++x)
      if (of.ask[x]) leaves(of, x, dpairs[x], dask[x], dasked);
  }

  // What is left of dg, from the state before and the gradient of the one after, panels [d][GROUP]; written.
  void finish(const T* before, const T* after, int64_t panels, int64_t lane, int64_t first, const Operand& to) {
    for (int64_t c = 0; c < padded; c += W<T>) {
      later(c, 0, ROWS, sums[0]);
      earlier(c, 0, ROWS, sums[1]);
      int64_t level = 2;
      for (int64_t half = ROWS / 2; half >= LEAF; half /= 2, ++level)
        for (int64_t at = 0; at < count; at += 2 * half) {
          earlier(c, at, at + half, sums[level]);
          later(c, at + half, at + 2 * half, sums[level]);
        }
    }
    for (int64_t c = 0; c < p.d; ++c) {
      T through = Base::across(c);
      if (through == 0) continue;
      Vec<T> total{};
      for (int64_t j = 0; j < panels; ++j)
        for (int q = 0; q < GROUP<T>; q += W<T>) {
          const int64_t at = (j * p.d + c) * GROUP<T> + q;
          total += load(before + at) * load(after + at);
        }
      through *= sum<T>(total);
      for (int64_t u = 0; u < count; ++u) dlog.rows[row_place<T>(u, c)] += through;
    }
    dlog.write_rows(p, to, lane, first, count);
  }

 private:
  Tile<T> dlog;
  // x dx and y dy: of what enters the chunk, of what leaves it, and of the halves of each size.
  T *products, *right[2], *sums[4];

  // Gradients of faded rows to those of the rows.
  template <bool ENTERS>
  void move(T* to, const T* slopes, const T* rows, int64_t half, T* sums, bool add) const {
    Base::template each_kept<ENTERS>(
        half, count, [&](int64_t at, Vec<T> kept) __attribute__((always_inline)) {
          const Vec<T> x = load(slopes + at) * kept;
          store(sums + at, load(sums + at) + x * load(rows + at));
          store(to + at, add ? load(to + at) + x : x);
        });
  }

  void of_asking(const Pairs<T>& of, T* const (&dpairs)[2], int64_t half) const {
    const int64_t step = GROUP<T> < half ? GROUP<T> : half;
    for (int64_t t = half; t < count; t += step) {
      if (!(t & half)) continue;
      const int64_t s = t / (2 * half) * 2 * half, some = count - t < step ? count - t : step;
      for (int64_t c = 0; c < padded; c += GROUP<T>)
        for (int y = 0; y < 2; ++y)
          if (of.asked[y])
            panel(some, products + row_place<T>(t, c), Matrix<T>{dpairs[y] + place<T>(s, t), 1, GROUP<T>},
                        left[y] + row_place<T>(s, c), half, y > 0);
    }
  }

  void of_asked(const Pairs<T>& of, int y, T* const (&dpairs)[2][2], int64_t half) const {
    for (int64_t s = 0; s < count; s += 2 * half) {
      const int64_t t = s + half, some = count - t < half ? count - t : half;
      for (int64_t c = 0; c < padded; c += GROUP<T>) {
        bool add = false;
        for (int x = 0; x < 2 && some > 0; ++x) {
          if (!of.ask[x]) continue;
          panel(half, products + row_place<T>(s, c),
                      Matrix<T>{dpairs[x][y] + place<T>(s, t), GROUP<T>, 1, GROUP<T>, ROWS * GROUP<T>},
                      right[x] + row_place<T>(t, c), some, add);
          add = true;
        }
        if (!add)  // nobody asks
          for (int64_t r = 0; r < half * GROUP<T>; r += W<T>)
            store(products + row_place<T>(s, c) + r, Vec<T>{});
      }
    }
  }

  void leaves(const Pairs<T>& of, int x, T* const (&dpairs)[2], T* dask, T* const (&dasked)[2]) {
    for (int64_t c = 0; c < padded; c += GROUP<T>)
      for (int64_t t = 0; t < count; ++t)
        if (of.asked[1])
          leaf<true>(of, x, dpairs, dask, dasked, t, c);
        else
          leaf<false>(of, x, dpairs, dask, dasked, t, c);
  }

  // The pairs of one token that asks, in its leaf.
  template <bool BOTH>
  void leaf(const Pairs<T>& of, int x, T* const (&dpairs)[2], T* dask, T* const (&dasked)[2], int64_t t,
            int64_t c) {
    const int64_t begin = t / LEAF * LEAF, at = row_place<T>(begin, c);
    const T *w = dpairs[0] + place<T>(begin, t), *v = BOTH ? dpairs[1] + place<T>(begin, t) : w;
    const T *y = of.asked[0]->rows + at, *b = BOTH ? of.asked[1]->rows + at : y, *kept = one.rows + at;
    T *dy = dasked[0] + at, *db = BOTH ? dasked[1] + at : dy, *dg = dlog.rows + at;
    Vec<T> zs[LEAF][TILE_VECTORS], z[TILE_VECTORS], h[TILE_VECTORS];
#pragma GCC unroll 2
    for (int q = 0; q < TILE_VECTORS; ++q)
      z[q] = load(of.ask[x]->rows + row_place<T>(t, c) + q * W<T>), h[q] = Vec<T>{};
    for (int64_t s = t - begin; s >= 0; --s)
#pragma GCC unroll 2
      for (int q = 0; q < TILE_VECTORS; ++q) {
        const int64_t row = s * GROUP<T> + q * W<T>;
        zs[s][q] = z[q];
        store(dy + row, load(dy + row) + z[q] * w[s * GROUP<T>]);
        if (BOTH) store(db + row, load(db + row) + z[q] * v[s * GROUP<T>]);
        z[q] *= load(kept + row);
      }
    for (int64_t u = 0; u <= t - begin; ++u)
#pragma GCC unroll 2
      for (int q = 0; q < TILE_VECTORS; ++q) {
        const int64_t row = u * GROUP<T> + q * W<T>;
        h[q] *= load(kept + row);
        store(dg + row, load(dg + row) + h[q] * zs[u][q]);
        h[q] += load(y + row) * w[u * GROUP<T>];
        if (BOTH) h[q] += load(b + row) * v[u * GROUP<T>];
      }
#pragma GCC unroll 2
    for (int q = 0; q < TILE_VECTORS; ++q) {
      T* to = dask + row_place<T>(t, c) + q * W<T>;
      store(to, load(to) + h[q]);
    }
  }

  // To each of the tokens from begin to end the sum of those not before it, or before it.
  void later(int64_t c, int64_t begin, int64_t end, const T* of) {
    Vec<T> sum{};
    for (int64_t u = (end < count ? end : count) - 1; u >= begin; --u) {
      T* to = dlog.rows + row_place<T>(u, c);
      sum += load(of + row_place<T>(u, c));
      store(to, load(to) + sum);
    }
  }
  void earlier(int64_t c, int64_t begin, int64_t end, const T* of) {
    Vec<T> sum{};
    for (int64_t u = begin; u < end && u < count; ++u) {
      T* to = dlog.rows + row_place<T>(u, c);
      store(to, load(to) + sum);
      sum += load(of + row_place<T>(u, c));
    }
  }
};

}  // namespace regard::REGARD_ISA
