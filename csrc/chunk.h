// output_t = S_t^T q_t,  S_t = e^g_t S_(t-1) + k_t v_t^T, a chunk of ROWS tokens at a time:
//
//   P_ts = e^G_ts q_t . k_s, s <= t       G_ts: sum of g over tokens s + 1 to t
//   O    = P V + (e Q) S                  e_t:  e^(sum of g up to t)
//   S'   = e_C S + (f K)^T V              f_s:  e^(sum of g after s)
//
// and, where outputs are divided by sums, the same of a value of ones: a row z of S^T, and a vector of
// sums beside O^T, which as a 65th column would cost a whole register tile.
//
// reference  regard/form/chunks.py        backward  chunk_grad.h
// work       2 n (0.6 ROWS (d + e) + 2 d e) flops: panels above the diagonal are left out
// scratch    O(ROWS (d + e) + d e) a thread
// precision  everything in T; exponents are sums of numbers of one sign, no differences of running
//            sums; a pair that is forgotten is 0 whatever its product
// after      Sun et al. 2023 (RetNet), arXiv:2307.08621, eq. 7; Dao, Gu 2024, arXiv:2405.21060, sec. 6
//
// Tokens that ask are the lanes of vectors, as in attend.h, and channels of the key those of S^T:
// panels [d / GROUP][e + sums][GROUP]. Values are read as they lie. elu(x) + 1 of queries and keys is
// made as they are read: in PyTorch it took as long as all else.
//
// Where there are fewer lanes than threads, a lane is cut into pieces. `sketch` finds what each does to
// a state, (its own sum, the factor of the state before it), and `recur` begins each from those.
#pragma once

#include "tile.h"

namespace regard::REGARD_ISA {

template <class T>
INLINE void panel(int64_t rows, T* c, Matrix<T> a, const T* b, int64_t count, bool add) {
  panel_product<TILE_VECTORS, T>(MultiplyApart{}, rows, c, GROUP<T>, a, b, count, add);
}

// Each vector of `rows` lines of a panel, where vectors are the lanes q of a line r.
template <class T, class Each>
INLINE void each_vector(T* panel, int64_t rows, const Each& each) {
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int q = 0; q < GROUP<T>; q += W<T>)
      store(panel + r * GROUP<T> + q, each(load(panel + r * GROUP<T> + q), r, q));
}

// Lanes of the vector from `first` on that are `least` at least.
template <class T>
INLINE Bits<T> from_lane(int64_t first, int64_t least) {
  typedef typename Lanes<T>::integer I;
  Bits<T> index;
#pragma GCC unroll 16
  for (int k = 0; k < W<T>; ++k) index[k] = k;
  return index >= I(least - first) - Bits<T>{};
}

// The numbers of a state as panels, and of panels of tokens by tokens.
static inline int64_t lines_of(const Recurrence& p) { return p.e + p.sums; }
template <class T>
static inline int64_t state_numbers(const Recurrence& p) {
  return round_up(p.d, GROUP<T>) * lines_of(p);
}
template <class T>
constexpr int64_t SQUARE = int64_t(ROWS) * ROWS;

// Element (s, t) of a square at panel t / GROUP, line s; read with rows s and columns t.
template <class T>
INLINE Matrix<T> by_keys(const T* square, int64_t s, int64_t t) {
  return {square + t / GROUP<T> * ROWS * GROUP<T> + s * GROUP<T>, GROUP<T>, 1, GROUP<T>,
          int64_t(ROWS) * GROUP<T>};
}

// What the decays of a chunk make of its pairs and of the state.
template <class T>
struct Decays {
  const bool given, constant;
  T* within;  // a square of e^G_ts, 0 where s > t
  T enter[ROWS], leave[ROWS], across = 1;

  Decays(Arena& arena, const Recurrence& p)
      : given(p.decay.data), constant(!p.decay.row), within(arena.take<T>(given ? SQUARE<T> : 0)) {}

  void find(const Recurrence& p, int64_t lane, int64_t first, int64_t count, bool pairs = true) {
    if (!given || (constant && count == known)) return;
    known = count;
    const T* g = reinterpret_cast<const T*>(row_of(p, p.decay, lane, first));
    T sums[ROWS] = {}, after = 0;  // of the tokens after s: up to t, and to the last
    for (int64_t s = count - 1; s >= 0; --s) {
      for (int64_t t = s / GROUP<T> * GROUP<T>; t < ROWS; t += W<T>) {
        const Bits<T> seen = from_lane<T>(t, s);
        const Vec<T> sum = load(sums + t);
        if (pairs)
          store(within + t / GROUP<T> * ROWS * GROUP<T> + s * GROUP<T> + t % GROUP<T>,
                as_number<T>(as_bits<T>(exp<T>(sum)) & seen));
        store(sums + t, sum + as_number<T>(as_bits<T>(splat(g[s * p.decay.row])) & seen));
      }
      leave[s] = after;
      after += g[s * p.decay.row];
    }
    for (int64_t s = count; s < ROWS; ++s) leave[s] = 0;
    for (int64_t t = 0; t < ROWS; t += W<T>) {
      store(enter + t, exp<T>(load(sums + t)));
      store(leave + t, exp<T>(load(leave + t)));
    }
    across = enter[count - 1];
  }

  // Pairs of the tokens of panel g with `rows` keys, weighed by their decay; 0 where it is.
  void weigh(T* square, int64_t g, int64_t rows) const {
    T* of = square + g * ROWS * GROUP<T>;
    if (given)
      each_vector(of, rows, [&](Vec<T> x, int64_t r, int q) __attribute__((always_inline)) {
        const Vec<T> kept = load(within + g * ROWS * GROUP<T> + r * GROUP<T> + q);
        return as_number<T>(as_bits<T>(x * kept) & (kept != 0));
      });
    else
      hide(square, g, rows);
  }

  // 0 for keys after the query.
  static void hide(T* square, int64_t g, int64_t rows) {
    const int64_t first = g * GROUP<T>;
    each_vector(square + first * ROWS + first * GROUP<T>, rows - first,
                [&](Vec<T> x, int64_t r, int q) __attribute__((always_inline)) {
                  return as_number<T>(as_bits<T>(x) & from_lane<T>(q, r));
                });
  }

  // Rows in panels [width / GROUP][ROWS][GROUP] times a factor of each.
  void scale(T* rows, int64_t padded, int64_t count, const T* factor) const {
    if (!given) return;
    for (int64_t c = 0; c < padded; c += GROUP<T>)
      each_vector(rows + c * ROWS, count, [&](Vec<T> x, int64_t r, int) __attribute__((always_inline)) {
        return x * factor[r];
      });
  }

 private:
  int64_t known = -1;  // of a constant decay: the tokens of the chunk it was found for
};

// A state as panels: how it begins, and where it goes.
template <class T>
struct Memory {
  const Recurrence& p;
  const int64_t lines, numbers;
  T* at;
  Memory(Arena& arena, const Recurrence& p)
      : p(p), lines(lines_of(p)), numbers(state_numbers<T>(p)), at(arena.take<T>(numbers)) {}

  int64_t panels() const { return (p.d + GROUP<T> - 1) / GROUP<T>; }
  T* panel_of(int64_t channel) const { return at + channel / GROUP<T> * lines * GROUP<T>; }

  void clear() {
    for (int64_t k = 0; k < numbers; ++k) at[k] = 0;
  }
  void scale(T factor) {
    if (factor == 0) return clear();  // even what overflowed
    for (int64_t k = 0; k < numbers; k += W<T>) store(at + k, load(at + k) * factor);
  }
  // factor * this + what a piece of work left.
  void pass(const T* sketch) {
    scale(sketch[numbers]);
    for (int64_t k = 0; k < numbers; k += W<T>) store(at + k, load(at + k) + load(sketch + k));
  }
  void read(const Operand& x, int64_t lane) {
    const T* from = reinterpret_cast<const T*>(row_of(p, x, lane, 0));
    for (int64_t i = 0; i < p.d; ++i)
      for (int64_t j = 0; j < lines; ++j) *place(i, j) = from[i * x.row + j * x.column];
  }
  void write(const Operand& x, int64_t lane) const {
    T* to = reinterpret_cast<T*>(const_cast<char*>(row_of(p, x, lane, 0)));
    for (int64_t i = 0; i < p.d; ++i)
      for (int64_t j = 0; j < lines; ++j) to[i * x.row + j * x.column] = *place(i, j);
  }

 private:
  T* place(int64_t i, int64_t j) const { return panel_of(i) + j * GROUP<T> + i % GROUP<T>; }
};

// Whether a lane is the first of those that share a tensor: the one that writes it.
static inline bool is_first(const Recurrence& p, const Operand& x, int64_t lane) {
  for (int a = p.axes - 1; a >= 0; --a) {
    if (!x.axis[a] && lane % p.size[a]) return false;
    lane /= p.size[a];
  }
  return true;
}

// The tokens of a lane that a piece of work has, counted in halves of pieces, for each of which there is
// a sketch: so that threads that would wait share the pieces before the last.
struct Piece {
  int64_t lane, begin, end, first, last;
  Piece(const Recurrence& p, int64_t lane, int64_t begin, int64_t end)
      : lane(lane), begin(begin), end(end) {
    const int64_t chunks = (p.n + ROWS - 1) / ROWS;
    first = chunks * begin / halves(p) * ROWS, last = chunks * end / halves(p) * ROWS;
    if (last > p.n) last = p.n;
  }
  static int64_t halves(const Recurrence& p) { return 2 * p.pieces; }
  static Piece whole(const Recurrence& p, int64_t item) {
    const int64_t begin = item % p.pieces * 2;
    return {p, item / p.pieces, begin, begin + 2};
  }
  static Piece half(const Recurrence& p, int64_t item, int64_t from) {
    const int64_t begin = item % (halves(p) - 2) + from;
    return {p, item / (halves(p) - 2), begin, begin + 1};
  }
};

template <class T>
INLINE T* sketch_of(const Recurrence& p, int64_t lane, int64_t half) {
  return static_cast<T*>(p.sketch) + (lane * Piece::halves(p) + half) * (state_numbers<T>(p) + GROUP<T>);
}

// Rows of a tensor whose columns are read: in place, unless that evicts its own lines.
template <class T>
static inline Matrix<T> rows_at(const Recurrence& p, const Operand& x, int64_t lane, int64_t first) {
  return {reinterpret_cast<const T*>(row_of(p, x, lane, first)), x.row, 1};
}
template <class T>
static inline Matrix<T> columns_at(const Recurrence& p, const Operand& x, int64_t lane, int64_t first,
                                   int64_t count, int64_t width, T* space) {
  const Matrix<T> rows = rows_at<T>(p, x, lane, first);
  if (!collides<T>(x.row)) return {rows.at, 1, rows.row};
  const int64_t pitch = packed_row<T>(width);
  for (int64_t r = 0; r < count; ++r)
    __builtin_memcpy(space + r * pitch, rows.at + r * rows.row, size_t(width) * sizeof(T));
  return {space, 1, pitch};
}

// Rows of queries or keys as features, 0 where there are none.
template <class T>
static inline void read_features(const Recurrence& p, const Operand& x, int64_t lane, int64_t first,
                                 int64_t count, Tile<T>& to) {
  to.read_rows(p, x, lane, first, count);
  if (!p.elu) return;
  for (int64_t c = 0; c < to.width; c += GROUP<T>)
    each_vector(to.row_panel(c), count, [&](Vec<T> v, int64_t, int q) __attribute__((always_inline)) {
      const Vec<T> mapped = v > 0 ? v + 1 : exp<T>(v);
      return as_number<T>(as_bits<T>(mapped) & ~from_lane<T>(c + q, to.width));
    });
}

// A tile's rows to be broadcast.
template <class T>
INLINE Matrix<T> rows_of(const Tile<T>& x) {
  return {x.rows, GROUP<T>, 1, GROUP<T>, ROWS * GROUP<T>};
}

// Asks for rows of the next chunk while this one is done: part `part` of `parts` of them. Read in order
// but a line here and a line there, they come late by themselves, which took half of the time.
template <class T>
INLINE void bring_rows(const Recurrence& p, const Operand& x, int64_t lane, int64_t first, int64_t width,
                       int64_t part, int64_t parts) {
  if (!x.data || first < 0) return;
  const int64_t count = p.n - first < ROWS ? p.n - first : ROWS;
  const char* from = row_of(p, x, lane, first);
  for (int64_t r = part * ROWS / parts; r < (part + 1) * ROWS / parts && r < count; ++r)
    for (int64_t byte = 0; byte < width * int64_t(sizeof(T)); byte += 64)
      bring(from + r * x.row * int64_t(sizeof(T)) + byte);
}

template <class T>
class Recur {
 public:
  Recur(void* memory, const Recurrence& p)
      : arena(memory),
        state(arena, p),
        p(p),
        query(arena, p.d),
        key(arena, p.d),
        output(arena, p.e),
        decays(arena, p),
        pairs(arena.take<T>(SQUARE<T>)),
        space(arena.take<T>(collides<T>(p.value.row) ? ROWS * packed_row<T>(p.e) : 0)) {}

  Arena arena;
  Memory<T> state;

  void chunk(int64_t lane, int64_t first, int64_t count, bool asks) {
    decays.find(p, lane, first, count, asks);
    const Matrix<T> values = columns_at<T>(p, p.value, lane, first, count, p.e, space);
    read_features(p, p.key, lane, first, count, key);
    if (asks) ask(lane, first, count, values);
    if (decays.given) state.scale(decays.across);
    decays.scale(key.rows, key.padded, count, decays.leave);
    for (int64_t c = 0; c < p.d; c += GROUP<T>) {
      if (!asks) bring_next(lane, first, c / GROUP<T>, state.panels());
      T* to = state.panel_of(c);
      panel(p.e, to, values, key.row_panel(c), count, true);
      if (p.sums)
        each_vector(to + p.e * GROUP<T>, 1, [&](Vec<T> sum, int64_t, int q) {
          for (int64_t s = 0; s < count; ++s) sum += load(key.row_panel(c) + s * GROUP<T> + q);
          return sum;
        });
    }
    factor *= decays.across;
  }

  T factor = 1;  // of the state before the chunks so far

 private:
  const Recurrence& p;
  Tile<T> query, key, output;
  Decays<T> decays;
  T *pairs, *space;

  void bring_next(int64_t lane, int64_t first, int64_t part, int64_t parts) const {
    if (first + ROWS >= p.n) return;
    bring_rows<T>(p, p.key, lane, first + ROWS, p.d, part, parts);
    bring_rows<T>(p, p.value, lane, first + ROWS, p.e, part, parts);
    bring_rows<T>(p, p.query, lane, first + ROWS, p.d, part, parts);
  }

  void ask(int64_t lane, int64_t first, int64_t count, Matrix<T> values) {
    read_features(p, p.query, lane, first, count, query);
    query.rows_to_columns();
    T total[ROWS];
    for (int64_t g = 0; g * GROUP<T> < count; ++g) {
      const int64_t seen = count < (g + 1) * GROUP<T> ? count : (g + 1) * GROUP<T>;
      T *asked = pairs + g * ROWS * GROUP<T>, *to = output.column_panel(int(g));
      bring_next(lane, first, g, ROWS / GROUP<T>);
      panel(seen, asked, rows_of(key), query.column_panel(int(g)), p.d, false);
      decays.weigh(pairs, g, seen);
      panel(p.e, to, Matrix<T>{state.at, GROUP<T>, 1, GROUP<T>, state.lines * GROUP<T>},
            query.column_panel(int(g)), p.d, false);
      const T* enter = decays.enter + g * GROUP<T>;
      if (decays.given)
        each_vector(to, p.e, [&](Vec<T> x, int64_t, int q) __attribute__((always_inline)) {
          const Vec<T> kept = load(enter + q);
          return as_number<T>(as_bits<T>(x * kept) & (kept != 0));
        });
      panel(p.e, to, values, asked, seen, true);
      if (p.sums) divide(g, seen, asked, to, total);
    }
    output.columns_to_rows();
    output.write_rows(p, p.output, lane, first, count);
    if (p.total && p.sums)
      __builtin_memcpy(static_cast<T*>(p.total) + lane * p.n + first, total,
                       size_t(count) * sizeof(T));
  }

  // Outputs of panel g by the sums of their weights; 0 where that is 0.
  void divide(int64_t g, int64_t seen, const T* asked, T* to, T* total) {
    for (int q = 0; q < GROUP<T>; q += W<T>) {
      Vec<T> sum{}, before{};
      for (int64_t s = 0; s < seen; ++s) sum += load(asked + s * GROUP<T> + q);
      for (int64_t i = 0; i < p.d; ++i)
        before += load(query.column_panel(int(g)) + i * GROUP<T> + q) *
                  state.panel_of(i)[p.e * GROUP<T> + i % GROUP<T>];
      if (decays.given) {
        const Vec<T> kept = load(decays.enter + g * GROUP<T> + q);
        before = as_number<T>(as_bits<T>(before * kept) & (kept != 0));
      }
      sum += before + T(p.eps);
      store(total + g * GROUP<T> + q, sum);
      const Vec<T> share = sum == 0 ? Vec<T>{} : 1 / sum;
      for (int64_t c = 0; c < p.e; ++c)
        store(to + c * GROUP<T> + q, load(to + c * GROUP<T> + q) * share);
    }
  }
};

template <class T>
static void sketch(const Recurrence& p, int64_t item, void* memory) {
  const Piece piece = Piece::half(p, item, 0);
  Recur<T> recur(memory, p);
  recur.state.clear();
  for (int64_t at = piece.first; at < piece.last; at += ROWS)
    recur.chunk(piece.lane, at, piece.last - at < ROWS ? piece.last - at : ROWS, false);
  T* to = sketch_of<T>(p, piece.lane, piece.begin);
  __builtin_memcpy(to, recur.state.at, size_t(recur.state.numbers) * sizeof(T));
  to[recur.state.numbers] = recur.factor;
}

template <class T>
static void recur(const Recurrence& p, int64_t item, void* memory) {
  const Piece piece = Piece::whole(p, item);
  Recur<T> recur(memory, p);
  Memory<T>& state = recur.state;
  state.clear();
  state.read(p.state, piece.lane);
  for (int64_t before = 0; before < piece.begin; ++before)
    state.pass(sketch_of<T>(p, piece.lane, before));
  T* kept = static_cast<T*>(p.kept);
  if (kept) kept += (piece.lane * ((p.n + ROWS - 1) / ROWS) + piece.first / ROWS) * state.numbers;
  for (int64_t at = piece.first; at < piece.last; at += ROWS) {
    if (kept) __builtin_memcpy(kept, state.at, size_t(state.numbers) * sizeof(T)), kept += state.numbers;
    recur.chunk(piece.lane, at, piece.last - at < ROWS ? piece.last - at : ROWS, p.query.data);
  }
  if (piece.last == p.n && is_first(p, p.after, piece.lane))
    state.write(p.after, piece.lane);
}

template <class T>
static size_t recur_scratch(const Recurrence& p) {
  return Recur<T>(nullptr, p).arena.used;
}

static int64_t sketch_items(const Recurrence& p) { return p.lanes * (Piece::halves(p) - 2); }
static int64_t recur_items(const Recurrence& p) { return p.lanes * p.pieces; }

}  // namespace regard::REGARD_ISA
