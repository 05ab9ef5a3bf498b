// output_t = S_t^T q_t,  S_t = (I + b_t a_t^T) diag(e^g_t) S_(t-1) + k_t v_t^T: erasing (b erases what a
// reads), a decay of each channel, or both, a chunk of ROWS tokens at a time:
//
//   (I - A(a, b)) U = (e a) S + A(a, k) V          A(x, y) of s <= t as in channels.h; s < t where a asks
//   O  = (e q) S + A(q, k) V + A(q, b) U           e_t: e^(sum of g up to t)
//   S' = e_C S + (f k)^T V + (f b)^T U             f_s: e^(sum of g after s)
//
// reference  regard/form/chunks.py        backward  delta_grad.h
// work       2 n (0.6 ROWS (d + e) + 2 d e) flops, with erasing 2 n (0.6 ROWS (3 d + 3 e) + 2 d e) more: chunks
//            come one after the other, so that no d x d matrix says what each does to any state
// scratch    O(ROWS (d + e) + d e + ROWS^2) a thread
// precision  in T, U by substitution
// after      Yang et al. 2024, arXiv:2406.06484 (the delta rule in chunks), arXiv:2312.06635
//
// Columns of values do not meet: they are the lanes of vectors, panels [e / GROUP][d][GROUP] of a state,
// and where there are fewer lanes than threads, each has some panels and all pairs. Pieces of the tokens,
// as in chunk.h, would need that matrix.
#pragma once

#include "channels.h"

namespace regard::REGARD_ISA {

// One decay for all channels of a token, or none: the pairs of a product.
template <class T>
class TokenDecays {
 public:
  TokenDecays(Arena& arena, const Recurrence& p) : p(p), of(arena, p) {}

  void find(int64_t lane, int64_t first, int64_t some) {
    count = some;
    of.find(p, lane, first, count);
  }

  template <bool ENTERS>
  const T* faded(const T* rows, T* to) const {
    if (!of.given) return rows;
    const T* factor = ENTERS ? of.enter : of.leave;
    for (int64_t c = 0; c < round_up(p.d, GROUP<T>); c += GROUP<T>)
      each_vector(to + c * ROWS, count, [&](Vec<T>, int64_t r, int q) __attribute__((always_inline)) {
        return load(rows + c * ROWS + r * GROUP<T> + q) * factor[r];
      });
    return to;
  }

  void cross(T* state, int64_t panels) const {
    if (!of.given) return;
    for (int64_t k = 0; k < panels * p.d * GROUP<T>; k += W<T>)
      store(state + k, of.across == 0 ? Vec<T>{} : load(state + k) * of.across);
  }

  void pairs(const Pairs<T>& some) {
    some.each([&](const Tile<T>& x, const Tile<T>& y, T* square) {
      for (int64_t g = 0; g * GROUP<T> < count; ++g) {
        const int64_t seen = count < (g + 1) * GROUP<T> ? count : (g + 1) * GROUP<T>;
        panel(seen, square + g * ROWS * GROUP<T>, rows_from(y.rows, 0), x.column_panel(int(g)), p.d,
                    false);
        of.weigh(square, g, seen);
      }
    });
  }

 protected:
  const Recurrence& p;
  Decays<T> of;
  int64_t count = 0;
};

// The columns of values that a piece of work has of a lane.
template <class T>
struct Columns {
  int64_t lane, piece, first, panels, most;  // panels; and those of the widest piece
  int64_t width;
  Columns(const Recurrence& p, int64_t item) : lane(item / p.pieces), piece(item % p.pieces) {
    const int64_t all = (p.e + GROUP<T> - 1) / GROUP<T>;
    first = all * piece / p.pieces, panels = all * (piece + 1) / p.pieces - first;
    most = (all + p.pieces - 1) / p.pieces;
    width = first + panels == all ? p.e - first * GROUP<T> : panels * GROUP<T>;
  }
  Operand of(const Operand& x) const {
    Operand some = x;
    some.data += first * GROUP<T> * x.column * int64_t(sizeof(T));
    return some;
  }
  Tile<T> tile(Arena& arena) const {
    Tile<T> all(arena, most * GROUP<T>);
    all.width = width;
    return all;
  }
};

template <class T>
static inline int64_t delta_state_numbers(const Recurrence& p) { return round_up(p.e, GROUP<T>) * p.d; }

// A chunk's pairs and what it writes, for both directions.
template <class T, class Decay>
class DeltaChunk {
 public:
  DeltaChunk(void* memory, const Recurrence& p, int64_t item)
      : arena(memory),
        columns(p, item),
        p(p),
        query(arena, asks ? p.d : 0),
        key(arena, p.d),
        read(arena, erases ? p.d : 0),
        write(arena, erases ? p.d : 0),
        value(columns.tile(arena)),
        solved(columns.tile(arena)),
        decays(arena, p),
        space(arena.take<T>(ROWS * key.padded)),
        pairs{{asks ? &query : nullptr, erases ? &read : nullptr}, {&key, erases ? &write : nullptr}, {}} {
    for (int x = 0; x < 2; ++x)
      for (int y = 0; y < 2; ++y)
        pairs.at[x][y] = arena.take<T>(pairs.ask[x] && pairs.asked[y] ? SQUARE<T> : 0);
  }

  Arena arena;
  const Columns<T> columns;

 protected:
  const Recurrence& p;
  const bool asks = p.query.data, erases = p.read.data;
  Tile<T> query, key, read, write, value, solved;
  Decay decays;
  T* space;  // rows of d numbers
  Pairs<T> pairs;
  int64_t first = 0, count = 0;

  // Reads a chunk, and makes its pairs.
  void start(int64_t from, int64_t some) {
    first = from, count = some;
    decays.find(columns.lane, first, count);
    key.read_rows(p, p.key, columns.lane, first, count);
    value.read_rows(p, columns.of(p.value), columns.lane, first, count);
    if (erases) write.read_rows(p, p.write, columns.lane, first, count);
    if (erases) read.read_rows(p, p.read, columns.lane, first, count), read.rows_to_columns();
    if (asks) query.read_rows(p, p.query, columns.lane, first, count), query.rows_to_columns();
    decays.pairs(pairs);
    if (erases)
      for (T* square : pairs.at[1]) no_own(square);
  }

  // A token reads what was there before it.
  void no_own(T* square) const {
    for (int64_t t = 0; t < count; ++t) square[place<T>(t, t)] = 0;
  }

  int64_t seen_by(int64_t t) const { return count - t < GROUP<T> ? count : t + GROUP<T>; }

  // Rows of queries t, to t + GROUP, of a square.
  static Matrix<T> by_queries(const T* square, int64_t t) {
    return {square + place<T>(0, t), 1, GROUP<T>};
  }

  // U, from the panels of the state before.
  void solve(const T* state) {
    const T* entered = decays.template faded<true>(read.rows, space);
    for (int64_t t = 0; t < count; t += GROUP<T>) {
      const int64_t seen = seen_by(t), some = seen - t;
      for (int64_t j = 0; j < columns.panels; ++j) {
        T *all = solved.row_panel(j * GROUP<T>), *to = all + t * GROUP<T>;
        panel(some, to, rows_from(entered, t), state + j * p.d * GROUP<T>, p.d, false);
        panel(some, to, by_queries(pairs.at[1][0], t), value.row_panel(j * GROUP<T>), seen, true);
        panel(some, to, by_queries(pairs.at[1][1], t), all, t, true);
      }
      for (int64_t u = t + 1; u < seen; ++u)
        for (int64_t j = 0; j < columns.panels; ++j)
          substitute(solved.row_panel(j * GROUP<T>), u, pairs.at[1][1] + place<T>(t, u), GROUP<T>, t, u);
    }
  }

  // Row u of a panel, and `weight` times each of the rows from `begin` to `end`.
  static void substitute(T* rows, int64_t u, const T* weight, int64_t step, int64_t begin, int64_t end) {
    for (int q = 0; q < GROUP<T>; q += W<T>) {
      Vec<T> sum = load(rows + u * GROUP<T> + q);
      for (int64_t s = begin; s < end; ++s, weight += step) sum += load(rows + s * GROUP<T> + q) * *weight;
      weight -= (end - begin) * step;
      store(rows + u * GROUP<T> + q, sum);
    }
  }

  // Panels of a state, and the sum of rows times rows of values.
  void add_products(T* state, const T* rows, const Tile<T>& values) const {
    for (int64_t j = 0; j < columns.panels; ++j)
      for (int64_t c = 0; c < p.d; c += GROUP<T>)
        panel(p.d - c < GROUP<T> ? p.d - c : GROUP<T>, state + (j * p.d + c) * GROUP<T>,
              Matrix<T>{rows + c * ROWS, 1, GROUP<T>}, values.row_panel(j * GROUP<T>), count, true);
  }
};

// Panels of a state between memory and a tensor [d, e].
template <class T>
static void read_state(const Recurrence& p, const Columns<T>& columns, const Operand& x, T* to) {
  const T* from = reinterpret_cast<const T*>(row_of(p, columns.of(x), columns.lane, 0));
  for (int64_t j = 0; j < columns.panels * GROUP<T>; ++j)
    for (int64_t i = 0; i < p.d; ++i)
      to[(j / GROUP<T> * p.d + i) * GROUP<T> + j % GROUP<T>] =
          j < columns.width ? from[i * x.row + j * x.column] : 0;
}
template <class T>
static void write_state(const Recurrence& p, const Columns<T>& columns, const T* from, const Operand& x) {
  T* to = reinterpret_cast<T*>(const_cast<char*>(row_of(p, columns.of(x), columns.lane, 0)));
  for (int64_t j = 0; j < columns.width; ++j)
    for (int64_t i = 0; i < p.d; ++i)
      to[i * x.row + j * x.column] = from[(j / GROUP<T> * p.d + i) * GROUP<T> + j % GROUP<T>];
}

template <class T, class Decay>
class Delta : public DeltaChunk<T, Decay> {
  typedef DeltaChunk<T, Decay> Base;
  using Base::p, Base::decays, Base::count, Base::first, Base::key, Base::pairs, Base::value;

 public:
  using Base::columns;
  Delta(void* memory, const Recurrence& p, int64_t item)
      : Base(memory, p, item),
        state(Base::arena.template take<T>(columns.most * GROUP<T> * p.d)),
        output(columns.tile(Base::arena)) {}

  T* state;  // panels [e / GROUP][d][GROUP]

  void chunk(int64_t from, int64_t some) {
    Base::start(from, some);
    if (Base::erases) Base::solve(state);
    if (Base::asks) answer();
    decays.cross(state, columns.panels);
    Base::add_products(state, decays.template faded<false>(key.rows, Base::space), value);
    if (Base::erases)
      Base::add_products(state, decays.template faded<false>(Base::write.rows, Base::space), Base::solved);
  }

 private:
  Tile<T> output;

  void answer() {
    const T* entered = decays.template faded<true>(Base::query.rows, Base::space);
    for (int64_t j = 0; j < columns.panels; ++j)
      for (int64_t t = 0; t < count; t += GROUP<T>) {
        const int64_t seen = Base::seen_by(t), c = j * GROUP<T>;
        T* to = output.row_panel(c) + t * GROUP<T>;
        panel(seen - t, to, rows_from(entered, t), state + c * p.d, p.d, false);
        panel(seen - t, to, Base::by_queries(pairs.at[0][0], t), value.row_panel(c), seen, true);
        if (Base::erases)
          panel(seen - t, to, Base::by_queries(pairs.at[0][1], t), Base::solved.row_panel(c), seen, true);
      }
    output.write_rows(p, columns.of(p.output), columns.lane, first, count);
  }
};

template <class T, class Decay>
static void delta(const Recurrence& p, int64_t item, void* memory) {
  Delta<T, Decay> delta(memory, p, item);
  const Columns<T>& columns = delta.columns;
  const int64_t numbers = columns.panels * GROUP<T> * p.d, all = delta_state_numbers<T>(p);
  read_state(p, columns, p.state, delta.state);
  T* kept = static_cast<T*>(p.kept);
  if (kept) kept += columns.lane * ((p.n + ROWS - 1) / ROWS) * all + columns.first * GROUP<T> * p.d;
  for (int64_t at = 0; at < p.n; at += ROWS) {
    if (kept) __builtin_memcpy(kept, delta.state, size_t(numbers) * sizeof(T)), kept += all;
    delta.chunk(at, p.n - at < ROWS ? p.n - at : ROWS);
  }
  if (is_first(p, p.after, columns.lane)) write_state(p, columns, delta.state, p.after);
}

template <class T, class Decay>
static size_t delta_scratch(const Recurrence& p) {
  return Delta<T, Decay>(nullptr, p, 0).arena.used;
}

static int64_t delta_items(const Recurrence& p) { return p.lanes * p.pieces; }

// Whether each channel has a decay of its own.
static inline bool decays_by_channel(const Recurrence& p) { return p.decay.data && p.decay.column; }

}  // namespace regard::REGARD_ISA
