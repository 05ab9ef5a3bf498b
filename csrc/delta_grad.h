// Gradients of delta.h: tokens backwards, with R = dS' the gradient of the state after a chunk. Those who
// ask, q and a, have gradients from the left, dO and W; those who are asked, k and b, values V and U:
//
//   dU = A(q, b)^T dO + (f b) R                         (I - A(a, b))^T W = dU
//   dV = A(q, k)^T dO + A(a, k)^T W + (f k) R
//   dA(x, y) = dx_left y_value^T: dO V^T, dO U^T, W V^T, W U^T
//   dx = its pairs' part + e (left S^T),  dy = its pairs' part + f (value R^T)
//   R' = e_C R + (e q)^T dO + (e a)^T W
//   dg_u = its pairs' part (chunk_grad.h, channels_grad.h), of (e x) (left S^T) over t >= u,
//          of (f y) (value R^T) over s < u, and e_C <S, R>
//
// reference  regard/form/chunks.py        forward  delta.h
// work       2 n (1.6 ROWS (d + e) + 4 d e) flops, with erasing 2 n (0.6 ROWS (8 d + 9 e) + 9 d e)
// scratch    O(ROWS (d + e) + d e + ROWS^2) a thread
// precision  as chunk_grad.h
// after      Yang et al. 2024, arXiv:2406.06484; arXiv:2312.06635, appendix C
//
// A piece of the columns of values has a part of every gradient but those of value and state.
#pragma once

#include "channels_grad.h"
#include "chunk_grad.h"
#include "delta.h"

namespace regard::REGARD_ISA {

template <class T>
class TokenSlopes : public TokenDecays<T> {
  typedef TokenDecays<T> Base;
  using Base::p, Base::of, Base::count;

 public:
  TokenSlopes(Arena& arena, const Recurrence& p) : Base(arena, p) {}

  void begin() {
    for (int64_t r = 0; r < ROWS; ++r) dlog[r] = enters[r] = leaves[r] = 0;
  }

  template <bool ENTERS>
  void of_faded(T* slopes, const T* rows) {
    if (!of.given) return;
    for (int64_t c = 0; c < round_up(p.d, GROUP<T>); c += GROUP<T>)
      scale_and_dot(slopes + c * ROWS, rows + c * ROWS, ENTERS ? of.enter : of.leave, count,
                    ENTERS ? enters : leaves);
  }

  void of_pairs(const Pairs<T>& pairs, T* const (&dpairs)[2][2], T* const (&dask)[2], T* const (&dasked)[2]) {
    for (int x = 0; x < 2; ++x)
      for (int y = 0; y < 2; ++y) {
        if (!pairs.ask[x] || !pairs.asked[y]) continue;
        T* square = dpairs[x][y];
        if (of.given && p.ddecay.data) decay_of_pairs(pairs.at[x][y], square, count, dlog);
        for (int64_t t = 0; t < count; t += GROUP<T>) {
          const int64_t some = count - t < GROUP<T> ? count - t : GROUP<T>;
          of.weigh(square, t / GROUP<T>, t + some);
          for (int64_t c = 0; c < p.d; c += GROUP<T>)
            panel(some, dask[x] + row_place<T>(t, c), Matrix<T>{square + place<T>(0, t), 1, GROUP<T>},
                        pairs.asked[y]->row_panel(c), t + some, true);
        }
        for (int64_t c = 0; c < p.d; c += GROUP<T>)
          add_pairs(dasked[y] + c * ROWS, square, pairs.ask[x]->row_panel(c), count);
      }
  }

  void finish(const T* before, const T* after, int64_t panels, int64_t lane, int64_t first, const Operand& to) {
    T through = 0;
    if (of.across != 0) {
      Vec<T> total{};
      for (int64_t k = 0; k < panels * p.d * GROUP<T>; k += W<T>) total += load(before + k) * load(after + k);
      through = of.across * sum<T>(total);
    }
    add_decays(dlog, enters, leaves, through, count);
    ::regard::REGARD_ISA::write(const_cast<char*>(row_of(p, to, lane, first)), KIND<T>, dlog, count);
  }

 private:
  T dlog[ROWS], enters[ROWS], leaves[ROWS];
};

template <class T, class Slopes>
class DeltaGrad : public DeltaChunk<T, Slopes> {
  typedef DeltaChunk<T, Slopes> Base;
  using Base::p, Base::decays, Base::count, Base::first, Base::pairs, Base::space, Base::asks, Base::erases,
      Base::query, Base::key, Base::read, Base::write, Base::value, Base::solved;

 public:
  using Base::arena, Base::columns;
  DeltaGrad(void* memory, const Recurrence& p, int64_t item)
      : Base(memory, p, item),
        slope(arena.template take<T>(columns.most * GROUP<T> * p.d)),
        turned(arena.template take<T>(columns.most * GROUP<T> * key.padded)),
        left(columns.tile(arena)),
        wanted(columns.tile(arena)),
        changed(columns.tile(arena)),
        dask{{arena, query.width}, {arena, read.width}},
        dasked{{arena, p.d}, {arena, write.width}} {
    for (int x = 0; x < 2; ++x)
      for (int y = 0; y < 2; ++y)
        dpairs[x][y] = arena.template take<T>(pairs.ask[x] && pairs.asked[y] ? SQUARE<T> : 0);
  }

  T* slope;  // R

  // The gradients of a chunk before which the state was `before`.
  void chunk(int64_t from, int64_t some, const T* before) {
    Base::start(from, some);
    if (asks) left.read_rows(p, columns.of(p.left), columns.lane, first, count), left.rows_to_columns();
    if (erases) Base::solve(before), want();
    if (p.dvalue.data) of_value();
    if (p.dquery.data || p.dkey.data || p.ddecay.data || p.dread.data || p.dwrite.data) of_rows(before);
    decays.cross(slope, columns.panels);
    if (asks) Base::add_products(slope, decays.template faded<true>(query.rows, space), left);
    if (erases) Base::add_products(slope, decays.template faded<true>(read.rows, space), wanted);
  }

 private:
  T* turned;  // a state as panels of channels, [d / GROUP][e][GROUP]
  Tile<T> left, wanted, changed;
  Tile<T> dask[2], dasked[2];
  T* dpairs[2][2];

  // W.
  void want() {
    const T *leaves = decays.template faded<false>(write.rows, space), *square = pairs.at[1][1];
    for (int64_t j = 0; j < columns.panels; ++j) {
      T* rows = wanted.row_panel(j * GROUP<T>);
      panel(count, rows, rows_from(leaves, 0), slope + j * p.d * GROUP<T>, p.d, false);
      if (asks) add_pairs(rows, pairs.at[0][1], left.row_panel(j * GROUP<T>), count);
      for (int64_t t = (count - 1) / GROUP<T> * GROUP<T>; t >= 0; t -= GROUP<T>) {
        const int64_t seen = Base::seen_by(t);
        panel(seen - t, rows + t * GROUP<T>, by_keys(square, t, t + GROUP<T>), rows + seen * GROUP<T>,
                    count - seen, true);
        for (int64_t s = seen - 2; s >= t; --s)
          Base::substitute(rows, s, square + place<T>(s, s + 1), 1, s + 1, seen);
      }
    }
    // No token, no gradient: columns beside the last one are lanes of pairs.
    for (int64_t j = 0; j < columns.panels; ++j)
      for (int64_t t = count; t < round_up(count, GROUP<T>); ++t)
        for (int q = 0; q < GROUP<T>; q += W<T>) store(wanted.row_panel(j * GROUP<T>) + t * GROUP<T> + q, Vec<T>{});
    wanted.rows_to_columns();
  }

  void of_value() {
    const T* leaves = decays.template faded<false>(key.rows, space);
    for (int64_t j = 0; j < columns.panels; ++j) {
      T* rows = changed.row_panel(j * GROUP<T>);
      panel(count, rows, rows_from(leaves, 0), slope + j * p.d * GROUP<T>, p.d, false);
      if (asks) add_pairs(rows, pairs.at[0][0], left.row_panel(j * GROUP<T>), count);
      if (erases) add_pairs(rows, pairs.at[1][0], wanted.row_panel(j * GROUP<T>), count);
    }
    changed.write_rows(p, columns.of(p.dvalue), columns.lane, first, count);
  }

  // Gradients of all but values.
  void of_rows(const T* before) {
    decays.begin();
    const Tile<T>*lefts[2] = {&left, &wanted}, *values[2] = {&value, &solved};
    turn(before);
    for (int x = 0; x < 2; ++x)
      if (pairs.ask[x]) of_state<true>(dask[x], *lefts[x], *pairs.ask[x]);
    turn(slope);
    for (int y = 0; y < 2; ++y)
      if (pairs.asked[y]) of_state<false>(dasked[y], *values[y], *pairs.asked[y]);
    for (int x = 0; x < 2; ++x)
      for (int y = 0; y < 2; ++y)
        if (pairs.ask[x] && pairs.asked[y]) of_square(dpairs[x][y], *lefts[x], *values[y], x == 1);
    decays.of_pairs(pairs, dpairs, {dask[0].rows, dask[1].rows}, {dasked[0].rows, dasked[1].rows});
    if (p.ddecay.data)
      decays.finish(before, slope, columns.panels, columns.lane, first,
                    part_of(p.ddecay, p.ddecay.column ? p.d : 1));
    const Operand* homes[] = {&p.dquery, &p.dread, &p.dkey, &p.dwrite};
    Tile<T>* found[] = {&dask[0], &dask[1], &dasked[0], &dasked[1]};
    for (int k = 0; k < 4; ++k)
      if (homes[k]->data) found[k]->write_rows(p, part_of(*homes[k], p.d), columns.lane, first, count);
  }

  Operand part_of(const Operand& x, int64_t width) const {
    Operand part = x;
    part.data += columns.piece * p.lanes * p.n * width * int64_t(sizeof(T));
    return part;
  }

  template <bool ENTERS>
  void of_state(Tile<T>& to, const Tile<T>& by, const Tile<T>& rows) {
    const int64_t lines = columns.most * GROUP<T>;
    for (int64_t c = 0; c < p.d; c += GROUP<T>)
      panel(count, to.row_panel(c), rows_from(by.rows, 0), turned + c * lines, by.width, false);
    decays.template of_faded<ENTERS>(to.rows, rows.rows);
  }

  void of_square(T* square, const Tile<T>& by, const Tile<T>& values, bool earlier) {
    for (int64_t g = 0; g * GROUP<T> < count; ++g) {
      const int64_t seen = Base::seen_by(g * GROUP<T>);
      panel(seen, square + g * ROWS * GROUP<T>, rows_from(values.rows, 0), by.column_panel(int(g)),
                  by.width, false);
      Decays<T>::hide(square, g, seen);
    }
    if (earlier) Base::no_own(square);
  }

  // A state as panels of channels.
  void turn(const T* state) {
    const int64_t lines = columns.most * GROUP<T>, whole = p.d / W<T> * W<T>;
    for (int64_t j = 0; j < columns.panels * GROUP<T>; j += W<T>) {
      const T* from = state + j / GROUP<T> * p.d * GROUP<T> + j % GROUP<T>;
      for (int64_t i = 0; i < key.padded; i += W<T>) {
        T* to = turned + i / GROUP<T> * lines * GROUP<T> + j * GROUP<T> + i % GROUP<T>;
        if (i < whole)
          transpose_block(to, GROUP<T>, from + i * GROUP<T>, GROUP<T>);
        else
          for (int k = 0; k < W<T>; ++k)
            for (int r = 0; r < W<T>; ++r)
              to[k * GROUP<T> + r] = i + r < p.d ? from[(i + r) * GROUP<T> + k] : 0;
      }
    }
  }
};

template <class T, class Slopes>
static void delta_grad(const Recurrence& p, int64_t item, void* memory) {
  DeltaGrad<T, Slopes> grad(memory, p, item);
  const Columns<T>& columns = grad.columns;
  const int64_t all = delta_state_numbers<T>(p), chunks = (p.n + ROWS - 1) / ROWS;
  for (int64_t k = 0; k < columns.panels * GROUP<T> * p.d; ++k) grad.slope[k] = 0;
  if (p.dafter.data && is_first(p, p.dafter, columns.lane)) read_state(p, columns, p.dafter, grad.slope);
  const T* kept = static_cast<const T*>(p.kept) + columns.lane * chunks * all + columns.first * GROUP<T> * p.d;
  for (int64_t at = (p.n - 1) / ROWS * ROWS; at >= 0; at -= ROWS)
    grad.chunk(at, p.n - at < ROWS ? p.n - at : ROWS, kept + at / ROWS * all);
  if (p.dstate.data) write_state(p, columns, grad.slope, p.dstate);
}

template <class T, class Slopes>
static size_t delta_grad_scratch(const Recurrence& p) {
  return DeltaGrad<T, Slopes>(nullptr, p, 0).arena.used;
}

}  // namespace regard::REGARD_ISA
