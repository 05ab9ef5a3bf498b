// Looking at the matrix: each weight is made again from its row's statistics, used, and dropped.
//
// reference  regard/form/looks.py
// work       2 n m d flops for the pairs in visited tiles, and a few per pair
// scratch    KEYS ROWS numbers a thread and what attend.h needs; k more per row for topk
// precision  everything in T
#pragma once

#include "attend.h"

namespace regard::REGARD_ISA {

// The k largest weights of each row of a tile, in descending order.
template <class T>
struct Best {
  int64_t k;
  T* weights;      // [ROWS][k]
  int64_t* columns;
  T least[ROWS];   // the smallest weight of a full list

  Best(Arena& arena, int64_t k)
      : k(k), weights(arena.take<T>(ROWS * k)), columns(arena.take<int64_t>(ROWS * k)) {}

  void start() {
    for (int64_t x = 0; x < ROWS * k; ++x) weights[x] = -INF<T>, columns[x] = -1;
    for (T& one : least) one = k ? -INF<T> : INF<T>;  // hidden pairs come as -inf
  }

  // Lanes whose largest weight of a block does not enter the list are not looked at further.
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

 private:
  void insert(int row, T weight, int64_t column) {
    T* w = weights + row * k;
    int64_t* c = columns + row * k;
    int64_t place = k - 1;
    for (; place > 0 && w[place - 1] < weight; --place) w[place] = w[place - 1], c[place] = c[place - 1];
    w[place] = weight, c[place] = column;
    if (w[k - 1] > least[row]) least[row] = w[k - 1];
  }
};

template <class T>
struct LookScratch {
  Arena arena;
  Logits<T> logits;
  T* tile;
  Best<T> best;
  LookScratch(void* memory, const Problem& p)
      : arena(memory),
        logits(arena, p),
        tile(arena.take<T>(KEYS * ROWS)),
        best(arena, p.looking.what == Look::topk ? p.looking.number : 0) {}
};

// Sums of |w| and of what is asked, per row.
template <class T>
struct RowSums {
  T size[ROWS] = {}, spread[ROWS] = {};

  void take(const Problem& p, const Finished<T>& rows, const LookScratch<T>& s, const Visible<T>& v) {
    T position[ROWS], constant[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      position[i] = T(s.logits.row + i + p.looking.offset - v.first);
      constant[i] = rows.inverse[i] > 0 ? -rows.peak[i] + T(__builtin_log(double(rows.inverse[i]))) : 0;
    }
    for (int g = 0; g < v.GROUPS; ++g)
      for (int u = 0; u < v.vectors(); ++u) {
        const int q = g * TILE_VECTORS + u;
        const T* at = s.tile + g * PANEL<T> + u * W<T>;
        Vec<T> sum{}, other{};
        for (int j = v.begin[g]; j < v.end[g]; ++j) {
          const Vec<T> logit = load(at + j * GROUP<T>);
          Vec<T> weight = rows.weight(p, logit, q);
          if (p.dropout.lanes) weight *= s.logits.drop_factor(p, v.first + j, q);
          weight = max(weight, -weight);
          sum += weight;
          if (p.looking.what == Look::entropy) {
            // log of a weight without a logarithm; of a weight 0 it counts as 0.
            const Vec<T> log = logit + load(constant + q * W<T>);
            other += weight > 0 ? weight * log : Vec<T>{};
          } else {
            const Vec<T> apart = load(position + q * W<T>) - T(j);
            other += weight * max(apart, -apart);
          }
        }
        store(size + q * W<T>, load(size + q * W<T>) + sum);
        store(spread + q * W<T>, load(spread + q * W<T>) + other);
      }
  }
};

// Adds a tile's weights to cells of side x side pairs: to[row / side][column / side].
template <class T>
static void pool(const Problem& p, const LookScratch<T>& s, const Visible<T>& v, T* to, int64_t* seen,
                 int64_t row) {
  const int64_t side = p.looking.number, across = (p.m + side - 1) / side;
  const bool most = p.looking.what == Look::pool_max;
  for (int g = 0; g < v.GROUPS; ++g)
    for (int q = 0; q < v.vectors(); ++q) {
      const T* at = s.tile + g * PANEL<T> + q * W<T>;
      for (int j = v.begin[g]; j < v.end[g];) {
        const int64_t cell = (v.first + j) / side, stop = (cell + 1) * side - v.first, start = j;
        Vec<T> gathered = splat(most ? -INF<T> : 0);
        for (; j < v.end[g] && j < stop; ++j) {
          const Vec<T> weight = load(at + j * GROUP<T>);
          gathered = most ? max(weight, gathered) : gathered + weight;
        }
        const int lane = g * GROUP<T> + q * W<T>;
        for (int u = 0; u < W<T> && lane + u < s.logits.count; ++u) {
          const int64_t place = (row + lane + u) / side * across + cell;
          T& home = to[place];
          if (seen) seen[place] += j - start;
          home = most ? (gathered[u] > home ? gathered[u] : home) : home + gathered[u];
        }
      }
    }
}

// Rows of one piece of work: whole cells, so that no two pieces meet in one.
static inline int64_t look_rows(const Problem& p) {
  const bool pools = p.looking.what == Look::pool_mean || p.looking.what == Look::pool_max;
  const int64_t side = pools ? p.looking.number : 1;
  return side >= ROWS ? side : ROWS / side * side;
}

static int64_t look_items(const Problem& p) {
  const int64_t step = look_rows(p);
  return p.lanes * ((p.n + step - 1) / step);
}

template <class T>
static void look(const Problem& p, int64_t item, void* memory) {
  LookScratch<T> s(memory, p);
  const int64_t step = look_rows(p), pieces = (p.n + step - 1) / step;
  const int64_t lane = item / pieces, begin = (pieces - 1 - item % pieces) * step;
  const int64_t end = begin + step < p.n ? begin + step : p.n, k = p.looking.number;
  T *first = static_cast<T*>(p.looking.first), *second = static_cast<T*>(p.looking.second);
  for (int64_t row = begin; row < end; row += ROWS) {
    const int64_t count = end - row < ROWS ? end - row : ROWS, at = lane * p.n + row;
    s.logits.start(p, lane, row, count);
    const Finished<T> rows(p, lane, row, count);
    RowSums<T> sums;
    s.best.start();
    Walk<T> walk(p, lane, row, count);
    for (Visible<T> v; walk.next(v);) {
      s.logits.tile(p, v, s.logits.keys(p, v, Read::rows), s.tile);
      if (p.looking.what == Look::entropy || p.looking.what == Look::distance) {
        sums.take(p, rows, s, v);
        continue;
      }
      const T hidden = p.looking.what == Look::topk ? -INF<T> : 0;
      over(v, [&](int j, int place, int q) {
        const Vec<T> logit = load(s.tile + place);
        Vec<T> weight = rows.weight(p, logit, q);
        if (p.dropout.lanes) weight *= s.logits.drop_factor(p, v.first + j, q);
        store(s.tile + place, logit == -INF<T> ? splat(hidden) : weight);
      });
      if (p.looking.what == Look::topk) {
        s.best.take(v, s.tile);
        continue;
      }
      const int64_t place = (lane * ((p.n + k - 1) / k) + begin / k) * ((p.m + k - 1) / k);
      int64_t* seen = static_cast<int64_t*>(p.looking.second);
      pool(p, s, v, first + place, seen ? seen + place : nullptr, row - begin);
    }
    if (p.looking.what == Look::topk) {
      for (int64_t x = 0; x < count * k; ++x) {
        first[at * k + x] = s.best.columns[x] < 0 ? 0 : s.best.weights[x];
        static_cast<int64_t*>(p.looking.second)[at * k + x] = s.best.columns[x];
      }
    } else if (p.looking.what == Look::entropy || p.looking.what == Look::distance) {
      for (int64_t i = 0; i < count; ++i) first[at + i] = sums.size[i], second[at + i] = sums.spread[i];
    }
  }
}

template <class T>
static size_t look_scratch(const Problem& p) {
  return LookScratch<T>(nullptr, p).arena.used;
}

}  // namespace regard::REGARD_ISA
