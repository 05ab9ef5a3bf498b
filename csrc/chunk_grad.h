// Gradients of chunk.h: tokens backwards, with R = dS' the gradient of the state after a chunk.
//
//   dP = (dO V^T), s <= t; dA_ts = e^G_ts dP_ts        dV = P^T dO + f (K R)
//   dQ = dA K + e (dO S^T)                             dK = dA^T Q + f (V R^T)
//   R' = e_C R + (e Q)^T dO
//   dg_u = sum of P_ts dP_ts over s < u <= t, of e_t q_t . (S dO_t) over t >= u,
//          of f_s k_s . (R v_s) over s < u, and e_C <S, R>
//
// With outputs divided by sums T, dO is that of the quotient over T, dT = -(dO . output), and V, S and R
// have a row for the ones.
//
// reference  regard/form/chunks.py        forward  chunk.h
// work       2 n (1.6 ROWS (d + e) + 4 d e) flops
// scratch    O(ROWS (d + e) + d e + ROWS^2) a thread
// precision  in T; what a decay gets is summed within a chunk, not as a difference of sums over tokens,
//            which is where its digits would go
// after      Yang et al. 2024, arXiv:2312.06635, section 4 and appendix C (chunks backwards)
#pragma once

#include "chunk.h"

namespace regard::REGARD_ISA {

// The square's rows of keys times rows of queries, added.
template <class T>
static void add_pairs(T* to, const T* square, const T* rows, int64_t count) {
  for (int64_t s = 0; s < count; s += GROUP<T>) {
    const int64_t some = count - s < GROUP<T> ? count - s : GROUP<T>;
    panel(some, to + s * GROUP<T>, by_keys(square, s, s), rows + s * GROUP<T>, count - s, true);
  }
}

// What a decay of each token gets of pairs, P_ts dP_ts of s < u <= t, added.
template <class T>
static void decay_of_pairs(const T* pairs, const T* dpairs, int64_t count, T* within) {
  T sums[ROWS] = {};  // over s < u, of each t
  for (int64_t u = 0; u < count; ++u) {
    Vec<T> later{};
    for (int64_t t = u / GROUP<T> * GROUP<T>; t < count; t += W<T>) {
      const int64_t at = t / GROUP<T> * ROWS * GROUP<T> + u * GROUP<T> + t % GROUP<T>;
      const Bits<T> seen = from_lane<T>(t, u);
      const Vec<T> sum = load(sums + t);
      later += as_number<T>(as_bits<T>(sum) & seen);
      store(sums + t, sum + as_number<T>(as_bits<T>(load(pairs + at) * load(dpairs + at)) & seen));
    }
    within[u] += sum<T>(later);
  }
}

// Rows times their factors, and their products with other rows, which is what the factors' logarithms get.
template <class T>
static void scale_and_dot(T* rows, const T* others, const T* factor, int64_t count, T* products) {
  for (int64_t r = 0; r < count; ++r) {
    Vec<T> total{};
#pragma GCC unroll 2
    for (int q = 0; q < GROUP<T>; q += W<T>) {
      const Vec<T> x = factor[r] == 0 ? Vec<T>{} : load(rows + r * GROUP<T> + q) * factor[r];
      store(rows + r * GROUP<T> + q, x);
      total += x * load(others + r * GROUP<T> + q);
    }
    products[r] += sum<T>(total);
  }
}

// Of what decays of tokens enter with, leave with, and are crossed with: added to each token's own.
template <class T>
static void add_decays(T* dlog, const T* enters, const T* leaves, T through, int64_t count) {
  T later = 0, earlier = 0;
  for (int64_t u = count - 1; u >= 0; --u) later += enters[u], dlog[u] += later + through;
  for (int64_t u = 0; u < count; ++u) dlog[u] += earlier, earlier += leaves[u];
}

template <class T>
class RecurGrad {
 public:
  RecurGrad(void* memory, const Recurrence& p)
      : arena(memory),
        slope(arena, p),
        p(p),
        query(arena, p.d),
        key(arena, p.d),
        left(arena, p.e),
        changed(arena, p.d > p.e ? p.d : p.e),
        decays(arena, p),
        pairs(arena.take<T>(SQUARE<T>)),
        dpairs(arena.take<T>(SQUARE<T>)),
        pitch(packed_row<T>(slope.lines)),
        above(arena.take<T>(ROWS * pitch)),
        by_values(arena.take<T>(round_up(p.e, GROUP<T>) * query.padded)) {}

  Arena arena;
  Memory<T> slope;  // R
  T factor = 1;     // of the slope after the chunks so far

  // What a chunk adds to the slope.
  void pass(int64_t lane, int64_t first, int64_t count) {
    start(lane, first, count);
    if (asks) weigh_left();
    carry();
  }

  // The gradients of a chunk before which the state was `before`.
  void chunk(int64_t lane, int64_t first, int64_t count, const T* before) {
    start(lane, first, count);
    const bool scores = p.dquery.data || p.dkey.data || p.ddecay.data;
    read_features(p, p.key, lane, first, count, key);
    if (asks) {
      query.rows_to_columns();
      weigh_left();
      score(scores);
    }
    bring_next(0);
    if (p.dvalue.data) of_value();
    bring_next(1);
    for (T& x : dlog) x = 0;
    if (scores && asks) of_pairs();
    if (scores && asks && (p.dquery.data || p.ddecay.data)) of_query(before);
    bring_next(2);
    if (p.dkey.data || p.ddecay.data) of_key();
    if (p.ddecay.data) of_decay(before);
    bring_next(3);
    carry();
  }

 private:
  const Recurrence& p;
  Tile<T> query, key, left, changed;
  Decays<T> decays;
  T *pairs, *dpairs;
  const int64_t pitch;
  T *above, *by_values;  // dO, dT beside it, [ROWS][pitch]; R as panels of values
  const bool asks = p.query.data;
  int64_t lane = 0, first = 0, count = 0;
  T enters[ROWS] = {}, leaves[ROWS], dlog[ROWS];

  // Part `part` of 4 of what the next chunk, which is the one before, reads.
  void bring_next(int64_t part) const {
    bring_rows<T>(p, p.key, lane, first - ROWS, p.d, part, 4);
    bring_rows<T>(p, p.value, lane, first - ROWS, p.e, part, 4);
    if (!asks) return;
    bring_rows<T>(p, p.query, lane, first - ROWS, p.d, part, 4);
    bring_rows<T>(p, p.left, lane, first - ROWS, p.e, part, 4);
    if (p.sums) bring_rows<T>(p, p.output, lane, first - ROWS, p.e, part, 4);
  }

  void start(int64_t of_lane, int64_t from, int64_t some) {
    lane = of_lane, first = from, count = some;
    decays.find(p, lane, first, count);
    if (asks) read_features(p, p.query, lane, first, count, query);
  }

  int64_t seen_by(int64_t g) const { return count < (g + 1) * GROUP<T> ? count : (g + 1) * GROUP<T>; }
  int64_t panels() const { return (count + GROUP<T> - 1) / GROUP<T>; }

  // dO and dT of the chunk's rows.
  void weigh_left() {
    const Matrix<T> of = rows_at<T>(p, p.left, lane, first);
    const T* output = reinterpret_cast<const T*>(row_of(p, p.output, lane, first));
    const T* total = static_cast<const T*>(p.total) + lane * p.n + first;
    for (int64_t t = 0; t < count; ++t) {
      T* to = above + t * pitch;
      __builtin_memcpy(to, of.at + t * of.row, size_t(p.e) * sizeof(T));
      if (!p.sums) continue;
      const T share = total[t] == 0 ? 0 : 1 / total[t];
      const T* row = output + t * p.output.row;
      Vec<T> sums{};
      int64_t c = 0;
      for (; c + W<T> <= p.e; c += W<T>) {
        const Vec<T> x = load(to + c) * share;
        sums -= x * load(row + c);
        store(to + c, x);
      }
      T rest = sum<T>(sums);
      for (; c < p.e; ++c) to[c] *= share, rest -= to[c] * row[c];
      to[p.e] = rest;
    }
  }

  // P and dP.
  void score(bool both) {
    const Matrix<T> values = rows_at<T>(p, p.value, lane, first);
    Operand rows;
    rows.data = reinterpret_cast<char*>(above), rows.kind = KIND<T>, rows.row = pitch;
    left.read_rows(p, rows, 0, 0, count);
    if (both) left.rows_to_columns();
    for (int64_t g = 0; g < panels(); ++g) {
      T *asked = pairs + g * ROWS * GROUP<T>, *to = dpairs + g * ROWS * GROUP<T>;
      panel(seen_by(g), asked, rows_of(key), query.column_panel(int(g)), p.d, false);
      decays.weigh(pairs, g, seen_by(g));
      if (!both) continue;
      panel(seen_by(g), to, values, left.column_panel(int(g)), p.e, false);
      if (p.sums) {
        T dtotal[GROUP<T>] = {};
        for (int64_t t = g * GROUP<T>; t < count && t < (g + 1) * GROUP<T>; ++t)
          dtotal[t % GROUP<T>] = above[t * pitch + p.e];
        each_vector(to, seen_by(g), [&](Vec<T> x, int64_t, int q) __attribute__((always_inline)) {
          return x + load(dtotal + q);
        });
      }
    }
  }

  // dA in place of dP, and what decays get of the pairs.
  void of_pairs() {
    if (p.ddecay.data) decay_of_pairs(pairs, dpairs, count, dlog);
    for (int64_t g = 0; g < panels(); ++g) decays.weigh(dpairs, g, seen_by(g));
  }

  // A row of dQ or dK is begun by the state, scaled by its factor, and ends with the pairs.
  void of_query(const T* before) {
    const Matrix<T> rows{above, pitch, 1};
    for (T& x : enters) x = 0;
    for (int64_t c = 0; c < p.d; c += GROUP<T>) {
      T* to = changed.row_panel(c);
      panel(count, to, rows, before + c * slope.lines, slope.lines, false);
      if (decays.given) scale_and_dot(to, query.row_panel(c), decays.enter, count, enters);
      for (int64_t g = 0; g < panels(); ++g) {
        const int64_t t = g * GROUP<T>, some = count - t < GROUP<T> ? count - t : GROUP<T>;
        panel(some, to + t * GROUP<T>, Matrix<T>{dpairs + t * ROWS, 1, GROUP<T>}, key.row_panel(c),
              seen_by(g), true);
      }
    }
    if (p.dquery.data) put_features(p.dquery, query);
  }

  void of_key() {
    const Matrix<T> values = rows_at<T>(p, p.value, lane, first);
    for (T& x : leaves) x = 0;
    for (int64_t c = 0; c < p.d; c += GROUP<T>) {
      T *to = changed.row_panel(c), *of = slope.panel_of(c);
      panel(count, to, values, of, p.e, false);
      if (p.sums)
        each_vector(to, count, [&](Vec<T> x, int64_t, int q) __attribute__((always_inline)) {
          return x + load(of + p.e * GROUP<T> + q);
        });
      if (decays.given) scale_and_dot(to, key.row_panel(c), decays.leave, count, leaves);
      if (asks) add_pairs(to, dpairs, query.row_panel(c), count);
    }
    if (p.dkey.data) put_features(p.dkey, key);
  }

  void of_value() {
    by_values_again();
    for (int64_t c = 0; c < p.e; c += GROUP<T>) {
      T* to = changed.row_panel(c);
      panel(count, to, rows_of(key), by_values + c * query.padded, p.d, false);
      if (decays.given)
        each_vector(to, count, [&](Vec<T> x, int64_t r, int) __attribute__((always_inline)) {
          return decays.leave[r] == 0 ? Vec<T>{} : x * decays.leave[r];
        });
      if (asks) add_pairs(to, pairs, left.row_panel(c), count);
    }
    put(p.dvalue, p.e);
  }

  // Gradients of features to those of what they are made of: the slope of elu(x) + 1 is at most 1, and
  // itself where that is less.
  void put_features(const Operand& x, const Tile<T>& of) {
    for (int64_t c = 0; p.elu && c < p.d; c += GROUP<T>)
      each_vector(changed.row_panel(c), count,
                  [&](Vec<T> v, int64_t r, int q) __attribute__((always_inline)) {
                    const Vec<T> feature = load(of.row_panel(c) + r * GROUP<T> + q);
                    return v * min(feature, splat(T(1)));
                  });
    put(x, p.d);
  }

  void put(const Operand& x, int64_t width) {
    Tile<T> narrower = changed;
    narrower.width = width;
    narrower.write_rows(p, x, lane, first, count);
  }

  void of_decay(const T* before) {
    T through = 0;
    if (decays.across != 0) {
      Vec<T> sums{};
      for (int64_t k = 0; k < slope.numbers; k += W<T>) sums += load(before + k) * load(slope.at + k);
      through = decays.across * sum<T>(sums);
    }
    add_decays(dlog, enters, leaves, through, count);
    write(const_cast<char*>(row_of(p, p.ddecay, lane, first)), KIND<T>, dlog, count);
  }

  // The slope before the chunk.
  void carry() {
    if (decays.given) slope.scale(decays.across);
    factor *= decays.across;
    if (!asks) return;
    decays.scale(query.rows, query.padded, count, decays.enter);
    for (int64_t c = 0; c < p.d; c += GROUP<T>)
      panel(slope.lines, slope.panel_of(c), Matrix<T>{above, 1, pitch}, query.row_panel(c), count, true);
  }

  // R with values as lanes: [e / GROUP][padded d][GROUP].
  void by_values_again() {
    const int64_t whole = p.e / W<T> * W<T>;
    for (int64_t i = 0; i < query.padded; i += W<T>) {
      const T* from = slope.panel_of(i) + i % GROUP<T>;
      for (int64_t j = 0; j < round_up(p.e, GROUP<T>); j += W<T>) {
        T* to = by_values + j / GROUP<T> * query.padded * GROUP<T> + i * GROUP<T> + j % GROUP<T>;
        if (j < whole)
          transpose_block(to, GROUP<T>, from + j * GROUP<T>, GROUP<T>);
        else
          for (int r = 0; r < W<T>; ++r)
            for (int k = 0; k < W<T>; ++k)
              to[r * GROUP<T> + k] = j + k < p.e ? from[(j + k) * GROUP<T> + r] : 0;
      }
    }
  }
};

template <class T>
static void sketch_grad(const Recurrence& p, int64_t item, void* memory) {
  const Piece piece = Piece::half(p, item, 2);
  RecurGrad<T> grad(memory, p);
  grad.slope.clear();
  for (int64_t at = (piece.last - 1) / ROWS * ROWS; at >= piece.first; at -= ROWS)
    grad.pass(piece.lane, at, piece.last - at < ROWS ? piece.last - at : ROWS);
  T* to = sketch_of<T>(p, piece.lane, piece.begin);
  __builtin_memcpy(to, grad.slope.at, size_t(grad.slope.numbers) * sizeof(T));
  to[grad.slope.numbers] = grad.factor;
}

template <class T>
static void recur_grad(const Recurrence& p, int64_t item, void* memory) {
  const Piece piece = Piece::whole(p, item);
  RecurGrad<T> grad(memory, p);
  Memory<T>& slope = grad.slope;
  slope.clear();
  if (p.dafter.data && is_first(p, p.dafter, piece.lane)) slope.read(p.dafter, piece.lane);
  for (int64_t after = Piece::halves(p) - 1; after >= piece.end; --after)
    slope.pass(sketch_of<T>(p, piece.lane, after));
  const T* kept = static_cast<const T*>(p.kept) + piece.lane * ((p.n + ROWS - 1) / ROWS) * slope.numbers;
  for (int64_t at = (piece.last - 1) / ROWS * ROWS; at >= piece.first; at -= ROWS)
    grad.chunk(piece.lane, at, piece.last - at < ROWS ? piece.last - at : ROWS,
               kept + at / ROWS * slope.numbers);
  if (!piece.first && p.dstate.data) slope.write(p.dstate, piece.lane);
}

template <class T>
static size_t recur_grad_scratch(const Recurrence& p) {
  return RecurGrad<T>(nullptr, p).arena.used;
}

}  // namespace regard::REGARD_ISA
