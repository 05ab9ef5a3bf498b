// Looking at the matrix: all that is asked about it, from one computation of its scores.
//
// A first pass over a row's keys makes weights relative to the largest logit so far, as attend.h does,
// and keeps them; a second multiplies them by what the row turned out to need, uses them, and drops
// them. Blocks that a strip does not hold are computed again. The largest weights are found by their
// logits, and entropy under softmax by the formula below, in the first pass: alone they need no strip.
//
//   entropy = log Z - (sum e^x x) / Z, x = logit - peak, Z = sum e^x: both terms are at least 0
//
// reference  regard/form/looks.py
// work       2 n m d flops for the pairs in visited tiles, and a few per pair; of blocks beyond the strip twice
// scratch    a thread: KEYS ROWS numbers for each block of the strip, and what attend.h needs without
//            values; 2 k ROWS for the largest
// precision  everything in T
#pragma once

#include "attend.h"

namespace regard::REGARD_ISA {

// The k largest logits of each row of a tile, in descending order.
template <class T>
struct Best {
  int64_t k;
  T* logits;  // [ROWS][k]
  int64_t* columns;
  T least[ROWS];  // the smallest logit of a full list

  Best(Arena& arena, int64_t k)
      : k(k), logits(arena.take<T>(ROWS * k + W<T>)), columns(arena.take<int64_t>(ROWS * k)) {}

  void start() {
    for (int64_t x = 0; x < ROWS * k; ++x) logits[x] = -INF<T>, columns[x] = -1;
    for (T& one : least) one = -INF<T>;
  }

  // Lanes whose largest logit of a block does not enter the list are not looked at further.
  void take(const Visible<T>& v, const T* tile) {
    for (int g = 0; g < v.GROUPS; ++g)
      for (int q = 0; q < v.vectors(); ++q) {
        const int lane = g * GROUP<T> + q * W<T>;
        const T* at = tile + g * PANEL<T> + q * W<T>;
        Vec<T> top = splat(-INF<T>);
        for (int j = v.begin[g]; j < v.end[g]; ++j) top = max(load(at + j * GROUP<T>), top);
        for (int u = 0; u < W<T>; ++u)
          if (top[u] > least[lane + u])
            for (int j = v.begin[g]; j < v.end[g]; ++j)
              if (at[j * GROUP<T> + u] > least[lane + u])
                insert(lane + u, at[j * GROUP<T> + u], v.first + j);
      }
  }

  // Writes the weights that the logits of `count` rows turned out to have; 0 where a row has fewer.
  void write(const Problem& p, const Finished<T>& rows, int64_t count, T* values, int64_t* indices) const {
    const T kept = p.dropout.lanes ? T(p.dropout.factor) : 1;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < k; c += W<T>) {
        const Vec<T> weights = Finished<T>::weight(p, load(logits + i * k + c), splat(rows.peak[i]),
                                                   splat(rows.inverse[i]));
        for (int64_t u = c; u < k && u < c + W<T>; ++u) {
          indices[i * k + u] = columns[i * k + u];
          values[i * k + u] = columns[i * k + u] < 0 ? 0 : weights[u - c] * kept;
        }
      }
  }

 private:
  void insert(int row, T logit, int64_t column) {
    T* x = logits + row * k;
    int64_t* c = columns + row * k;
    int64_t place = k - 1;
    for (; place > 0 && x[place - 1] < logit; --place) x[place] = x[place - 1], c[place] = c[place - 1];
    x[place] = logit, c[place] = column;
    least[row] = x[k - 1];
  }
};

// Whether the first pass finds the entropy: of other weights it takes logarithms.
static inline bool spreads(const Problem& p) {
  return p.looking.entropy && p.norm == Norm::softmax && !p.dropout.lanes;
}

static inline bool uses_weights(const Problem& p) {
  const Looking& l = p.looking;
  return l.distance || l.received || l.mass || l.largest || (l.entropy && !spreads(p));
}

template <class T>
struct LookScratch {
  Arena arena;
  Logits<T> logits;
  int64_t held;  // blocks whose weights are kept from the first pass to the second
  T *tile, *kept, *strip, *peaks;
  Best<T> best;
  LookScratch(void* memory, const Problem& p)
      : arena(memory),
        logits(arena, p),
        held(uses_weights(p) ? p.strip : 0),
        tile(arena.take<T>(KEYS * ROWS)),
        kept(arena.take<T>(p.looking.k && p.dropout.lanes ? KEYS * ROWS : 0)),
        strip(arena.take<T>(held * KEYS * ROWS)),
        peaks(arena.take<T>(held * ROWS)),
        best(arena, p.looking.k) {}

  // The logits with those of dropped weights below all that are not hidden.
  const T* without_dropped(const Problem& p, const Visible<T>& v, const T* from) const {
    if (!p.dropout.lanes) return from;
    over(v, [&](int j, int place, int q) {
      const Vec<T> logit = load(from + place);
      const Bits<T> falls = (logits.drop_factor(p, v.column(j), q) == 0) & (logit != -INF<T>);
      store(kept + place, falls ? splat(Constants<T>::least) : logit);
    });
    return kept;
  }
};

// to[row] += the sum over a tile's keys of each(j, place, vector).
template <class T, class Each>
INLINE void add_to_rows(const Visible<T>& v, T* to, const Each& each) {
  for (int g = 0; g < v.GROUPS; ++g)
    for (int q = 0; q < v.vectors(); ++q) {
      const int vector = g * TILE_VECTORS + q, first = g * PANEL<T> + q * W<T>;
      Vec<T> sums[FEW] = {};
      few_sums(v.begin[g], v.end[g], [&](int j, int u) __attribute__((always_inline)) {
        sums[u] += each(j, first + j * GROUP<T>, vector);
      });
      store(to + vector * W<T>, load(to + vector * W<T>) + added_up<T>(sums));
    }
}

// to[column] += the sum over a tile's rows.
template <class T>
static void add_to_columns(const Visible<T>& v, const T* tile, T* to) {
  Vec<T> sums[KEYS] = {};
  over(v, [&](int j, int place, int) { sums[j] += load(tile + place); });
  for (int j = 0; j < v.count; j += W<T>) {
    const Vec<T> of_columns = sums_of_rows<T>(*reinterpret_cast<Vec<T>(*)[W<T>]>(sums + j));
    for (int u = 0; u < W<T> && j + u < v.count; ++u) to[v.first + j + u] += of_columns[u];
  }
}

// What is asked of the finished weights of one tile of rows.
template <class T>
struct Weighed {
  T size[ROWS] = {}, spread[ROWS] = {}, apart[ROWS] = {};  // sums of w, w log w, w times the distance
  T* received;
  T *mass, *largest;    // the cells of the piece of rows
  int64_t home[ROWS];   // of each row's first cell

  // first: of the piece that the rows belong to
  Weighed(const Problem& p, int64_t lane, int64_t chunk, int64_t first, int64_t row) {
    const Looking& l = p.looking;
    const int64_t down = (p.n + l.side - 1) / l.side, across = (p.m + l.side - 1) / l.side;
    const int64_t at = (lane * down + first / l.side) * across;
    received = l.received ? static_cast<T*>(l.received) + (chunk * p.lanes + lane) * p.m : nullptr;
    mass = l.mass ? static_cast<T*>(l.mass) + at : nullptr;
    largest = l.largest ? static_cast<T*>(l.largest) + at : nullptr;
    for (int i = 0; i < ROWS; ++i) home[i] = (row - first + i) / l.side * across;
  }

  // raw: weights without `factor` of their rows; tile: where the finished ones go
  void take(const Problem& p, const Logits<T>& logits, const Visible<T>& v, const T* raw,
            const T* factor, T* tile) {
    // A 0 stays 0 where pairs are hidden: those of a row that is not a number are none of its own.
    const bool hides = p.mask.present && !v.full;
    add_to_rows(v, size, [&](int j, int place, int q) __attribute__((always_inline)) {
      const Vec<T> one = load(raw + place);
      Vec<T> weight = one * load(factor + q * W<T>);
      if (hides) weight = one == 0 ? one : weight;
      if (p.dropout.lanes) weight *= logits.drop_factor(p, v.column(j), q);
      store(tile + place, weight);
      return weight;
    });
    if (p.looking.distance) {
      T position[ROWS];
      for (int i = 0; i < ROWS; ++i) position[i] = T(logits.row + i + p.looking.offset - v.first);
      add_to_rows(v, apart, [&](int j, int place, int q) __attribute__((always_inline)) {
        const Vec<T> far = load(position + q * W<T>) - T(j);
        return load(tile + place) * max(far, -far);
      });
    }
    if (p.looking.entropy && !spreads(p))
      add_to_rows(v, spread, [&](int, int place, int) __attribute__((always_inline)) {
        const Vec<T> weight = load(tile + place);
        return weight > 0 ? weight * log<T>(weight) : Vec<T>{};
      });
    if (received) add_to_columns(v, tile, received);
    if (mass || largest) pool(p, v, tile, logits.count);
  }

 private:
  void pool(const Problem& p, const Visible<T>& v, const T* tile, int64_t count) {
    const int64_t side = p.looking.side;
    for (int g = 0; g < v.GROUPS; ++g)
      for (int q = 0; q < v.vectors(); ++q) {
        const T* at = tile + g * PANEL<T> + q * W<T>;
        const int lane = g * GROUP<T> + q * W<T>;
        for (int j = v.begin[g]; j < v.end[g];) {
          const int64_t cell = (v.first + j) / side, left = (cell + 1) * side - v.first;
          const int stop = left < v.end[g] ? int(left) : v.end[g];
          Vec<T> sums[FEW] = {}, tops[FEW] = {};
          few_sums(j, stop, [&](int k, int u) __attribute__((always_inline)) {
            const Vec<T> weight = load(at + k * GROUP<T>);
            sums[u] += weight;
            if (largest) tops[u] = max(weight, tops[u]);
          });
          j = stop;
          const Vec<T> sum = added_up<T>(sums), top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
          for (int u = 0; u < W<T> && lane + u < count; ++u) {
            const int64_t to = home[lane + u] + cell;
            if (mass) mass[to] += sum[u];
            if (largest && top[u] > largest[to]) largest[to] = top[u];
          }
        }
      }
  }
};

// Rows of one piece of work: whole cells, so that no two pieces meet in one.
static inline int64_t look_rows(const Problem& p) {
  const int64_t side = p.looking.side;
  return side >= ROWS ? side : ROWS / side * side;
}

static inline int64_t look_pieces(const Problem& p) {
  const int64_t step = look_rows(p);
  return (p.n + step - 1) / step;
}

static inline int64_t look_chunks(const Problem& p) {
  const int64_t pieces = look_pieces(p);
  return p.chunks < pieces ? p.chunks : pieces;
}

static int64_t look_items(const Problem& p) { return p.lanes * look_chunks(p); }

// (log of the sum - sum of weight times log weight / sum), or a mean, of a row; 0 of a row without weight.
template <class T>
static inline T entropy_of(T size, T spread) {
  const T found = size == 0 ? 0 : T(__builtin_log(double(size))) - spread / size;
  return found < 0 ? 0 : found;
}

template <class T>
static void look_at(const Problem& p, LookScratch<T>& s, Weighed<T> weighed, int64_t lane, int64_t row,
                    int64_t count) {
  const Looking& l = p.looking;
  const int64_t at = lane * p.n + row;
  const auto home = [&](void* to) { return static_cast<T*>(to) + at; };
  s.logits.start(p, lane, row, count);
  s.best.start();
  State<T> state;
  state.start();
  Walk<T> walk(p, lane, row, count);
  int64_t block = 0;
  for (Visible<T> v; walk.next(v); ++block) {
    T* tile = block < s.held ? s.strip + block * KEYS * ROWS : s.tile;
    s.logits.tile(p, v, s.logits.keys(p, v, Read::rows), tile);
    if (l.k) s.best.take(v, s.without_dropped(p, v, tile));
    spreads(p) ? state.template absorb<true>(p, v, tile) : state.absorb(p, v, tile);
    if (block < s.held) __builtin_memcpy(s.peaks + block * ROWS, state.peak, sizeof state.peak);
  }
  T factor[ROWS], before[ROWS], own[ROWS];
  __builtin_memcpy(before, state.peak, sizeof before);
  __builtin_memcpy(own, state.total, sizeof own);
  state.absorb_constant(p, lane);
  for (int64_t i = 0; i < count; ++i) home(p.peak)[i] = state.peak[i], home(p.total)[i] = state.total[i];
  if (spreads(p)) {
    // A sink may leave a row without weight.
    state.factors(p, before, factor);
    for (int64_t i = 0; i < count; ++i)
      home(l.entropy)[i] = own[i] * factor[i] == 0 ? 0 : entropy_of(own[i], state.spread[i]);
  }
  if (l.k)
    s.best.write(p, Finished<T>(state), count, static_cast<T*>(l.values) + at * l.k, l.indices + at * l.k);
  if (!uses_weights(p)) return;
  State<T> again = state;
  Walk<T> second(p, lane, row, count);
  block = 0;
  for (Visible<T> v; second.next(v); ++block) {
    const bool held = block < s.held;
    if (!held) {
      s.logits.tile(p, v, s.logits.keys(p, v, Read::rows), s.tile);
      again.absorb(p, v, s.tile);  // the peak does not move any more
    }
    state.factors(p, held ? s.peaks + block * ROWS : state.peak, factor);
    weighed.take(p, s.logits, v, held ? s.strip + block * KEYS * ROWS : s.tile, factor, s.tile);
  }
  for (int64_t i = 0; i < count; ++i) {
    const T size = weighed.size[i];
    if (l.distance) home(l.distance)[i] = size == 0 ? 0 : weighed.apart[i] / size;
    if (l.entropy && !spreads(p)) home(l.entropy)[i] = entropy_of(size, weighed.spread[i]);
  }
}

template <class T>
static void look(const Problem& p, int64_t item, void* memory) {
  LookScratch<T> s(memory, p);
  const int64_t step = look_rows(p), chunks = look_chunks(p);
  const int64_t lane = item / chunks, chunk = item % chunks;
  // Under a causal mask the last rows are the longest: they begin first, and each chunk has some.
  for (int64_t piece = look_pieces(p) - 1 - chunk; piece >= 0; piece -= chunks) {
    const int64_t first = piece * step, end = first + step < p.n ? first + step : p.n;
    for (int64_t row = first; row < end; row += ROWS)
      look_at(p, s, Weighed<T>(p, lane, chunk, first, row), lane, row, end - row < ROWS ? end - row : ROWS);
  }
}

template <class T>
static size_t look_scratch(const Problem& p) {
  return LookScratch<T>(nullptr, p).arena.used;
}

}  // namespace regard::REGARD_ISA
