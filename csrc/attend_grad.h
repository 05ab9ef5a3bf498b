// Gradients of sum_ij left_i weight_ij value_j; every tile is computed again, none of n x m is kept.
//
// dweight_ij = left_i . value_j            dvalue_j = sum_i weight_ij left_i
// softmax:  dlogit_ij = weight_ij (dweight_ij + drow_i),  drow_i = dtotal_i total_i - delta_i,
//           delta_i = sum_j weight_ij dweight_ij
// row_sum:  dlogit_ij = (dweight_ij + drow_i) / total_i
// dquery_i = sum_j dlogit_ij dscore/dquery_i, and so for keys, biases and the score's own weight.
//
// reference  regard/form/dense.py::product        forward  attend.h
// work       2 n m (3 d + 2 e) flops for the pairs in visited tiles, once more 2 n m (d + e) for
//            the keys of a row beyond `strip` blocks
//            (without values: only dvalue, the product with the transpose)
// scratch    2 strip KEYS ROWS numbers a thread and what attend.h needs
// after      Dao et al. 2022, arXiv:2205.14135, appendix B.2 (recomputed tiles)
//
// delta comes from the tiles' own dweights. The shorter way, delta_i = left_i . output_i, rounds
// apart from them, and gradients of biases, in which dlogits nearly cancel, had 3 to 6 times the
// error of dense. So the weights and dweights of a strip, all keys of ROWS queries, are kept until
// delta is known: 8 bytes a pair through the second cache, against 10 d flops.
#pragma once

#include "attend.h"
#include "bias_gradients.h"
#include "pair_gradients.h"

namespace regard::REGARD_ISA {

// Sums over so many keys are added up: one long chain would round as often as it has terms.
constexpr int SOME = 16;

template <class T>
struct GradScratch {
  static constexpr int64_t SIZE = KEYS * ROWS;
  Arena arena;
  Logits<T> logits;
  Tile<T> left, dquery;
  T *strip, *values_space, *keys_panels;
  T* scattered;  // of a block whose keys do not follow each other
  T *lanes, *left_rows, *query_rows;  // where pairs are multiplied: of a tile's lanes and of its rows
  Visible<T>* seen;
  GradScratch(void* memory, const Problem& p)
      : arena(memory),
        logits(arena, p),
        left(arena, factors_in<T>(p, p.e)),
        dquery(arena, p.d),
        strip(arena.take<T>(p.strip * (p.softcap ? 3 : 2) * SIZE)),
        values_space(arena.take<T>(KEYS * packed_row<T>(p.e))),
        keys_panels(arena.take<T>(p.pairs                  ? KEYS / 2 * packed_row<T>(p.d)
                                  : p.score == Score::dot ? 0
                                                          : KEYS * dquery.padded)),
        scattered(arena.take<T>(
            p.gathers ? KEYS * round_up(p.d > p.e ? p.d : p.e, GRADIENT_STEP) : 0)),
        lanes(arena.take<T>(p.pairs ? KEYS * ROWS / 2 : 0)),
        left_rows(arena.take<T>(p.pairs ? ROWS / 2 * round_up(p.e, GROUP<T>) : 0)),
        query_rows(arena.take<T>(p.pairs ? ROWS / 2 * round_up(p.d, GROUP<T>) : 0)),
        seen(arena.take<Visible<T>>(p.strip)) {}

  T* weights(const Problem& p, int64_t slot) { return strip + slot * (p.softcap ? 3 : 2) * SIZE; }
};

// One pass over the keys that a tile of queries sees, and where its gradients go.
template <class T>
class Backward {
 public:
  // part: the number of dkey and dvalue that this piece of work adds to
  Backward(const Problem& p, GradScratch<T>& s, int64_t chunk, int64_t part)
      : p(p),
        s(s),
        chunk(chunk),
        dkey(place<T>(p.dkey, part * p.m * round_up(p.d, GRADIENT_STEP))),
        dvalue(place<T>(p.dvalue, part * p.m * round_up(p.e, GRADIENT_STEP))) {}

  void tile(int64_t of_lane, int64_t first) {
    lane = of_lane, row = first, count = p.n - row < ROWS ? p.n - row : ROWS;
    s.logits.start(p, lane, row, count);
    s.left.read_rows(p, factors_of<T>(p, p.left), lane, row, count);
    s.left.rows_to_columns();
    if (in_pairs<T>(p)) {
      pair_rows(p, p.left, p.e, lane, row, count, s.left_rows);
      pair_rows(p, p.query, p.d, lane, row, count, s.query_rows);
    }
    for (int64_t c = 0; c < ROWS * s.dquery.padded; ++c) s.dquery.columns[c] = s.dquery.rows[c] = 0;
    const Finished<T> rows(p, lane, row, count);
    for (int i = 0; i < ROWS; ++i) {
      const int64_t at = lane * p.n + row + i;
      drow[i] = p.dtotal && i < count
                    ? static_cast<const T*>(p.dtotal)[at] * static_cast<const T*>(p.total)[at]
                    : 0;
    }
    const bool couples = p.norm == Norm::softmax || p.norm == Norm::row_sum;
    const bool coupled = couples && p.value.kind != Kind::none;
    const int64_t kept = coupled ? sum_delta(rows) : 0;
    for (int64_t slot = 0; slot < kept; ++slot) push(rows, s.seen[slot], slot);
    if (kept < blocks || !coupled) {
      const int64_t last = p.strip - 1;
      Visible<T>& v = s.seen[last];
      Walk<T> walk(p, lane, row, count, kept ? s.seen[kept - 1].after : 0);
      while (walk.next(v)) weigh(rows, v, last), push(rows, v, last);
    }
    if (!p.dquery.data) return;
    if (p.score == Score::dot) {
      s.dquery.columns_to_rows();
      for (int64_t c = 0; c < ROWS * s.dquery.padded; ++c) s.dquery.rows[c] *= T(p.scale);
    }
    s.dquery.write_rows(p, p.dquery, lane, row, count);
  }

 private:
  const Problem& p;
  GradScratch<T>& s;
  int64_t chunk, lane = 0, row = 0, count = 0, blocks = 0;
  T *dkey, *dvalue;
  T drow[ROWS];

  T* weights(int64_t slot) const { return s.weights(p, slot); }
  T* dweights(int64_t slot) const { return s.weights(p, slot) + s.SIZE; }
  T* slopes(int64_t slot) const { return p.softcap ? s.weights(p, slot) + 2 * s.SIZE : nullptr; }

  // Keeps what fits of weights and dweights, and turns drow into dtotal total - delta. Returns how
  // many blocks were kept.
  int64_t sum_delta(const Finished<T>& rows) {
    // delta_i = center_i + sum_j weight_ij (dweight_ij - center_i) / sum_j weight_ij, where no sink
    // takes weight: so dlogits sum to 0 even where the weights sum to 1 up to rounding only.
    T delta[ROWS] = {}, center[ROWS] = {}, whole[ROWS] = {};
    bool centered[Visible<T>::GROUPS] = {};
    blocks = 0;
    Walk<T> walk(p, lane, row, count);
    for (int64_t slot = 0; walk.next(s.seen[slot]); slot = blocks < p.strip ? blocks : p.strip - 1) {
      ++blocks;
      const Visible<T>& v = s.seen[slot];
      weigh(rows, v, slot);
      const T *w = weights(slot), *dw = dweights(slot);
      for (int g = 0; g < v.GROUPS; ++g) {
        if (v.begin[g] == v.end[g]) continue;
        for (int q = 0; q < v.vectors(); ++q) {
          const int lanes = g * GROUP<T> + q * W<T>, at = g * PANEL<T> + q * W<T>;
          if (!centered[g]) store(center + lanes, load(dw + at + v.begin[g] * GROUP<T>));
          const Vec<T> middle = load(center + lanes);
          Vec<T> sum{}, one{};
          for (int from = v.begin[g]; from < v.end[g]; from += SOME) {
            const int to = from + SOME < v.end[g] ? from + SOME : v.end[g];
            Vec<T> some{}, ones{};
            for (int j = from; j < to; ++j) {
              const Vec<T> weight = load(w + at + j * GROUP<T>);
              some += weight * (load(dw + at + j * GROUP<T>) - middle);
              ones += weight;
            }
            sum += some, one += ones;
          }
          store(delta + lanes, load(delta + lanes) + sum);
          store(whole + lanes, load(whole + lanes) + one);
        }
        centered[g] = true;
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      if (rows.inverse[i] == 0) continue;  // a row without keys
      if (p.norm == Norm::row_sum) {
        // Weights of both signs may sum to anything, but with that of eps to 1 up to rounding: so
        // the products of logits and dlogits sum to what eps leaves of them.
        const T spare = T(p.norm_bias) * rows.inverse[i];
        delta[i] = center[i] + (delta[i] - center[i] * spare) / (whole[i] + spare);
      } else {
        T of_keys = 1;  // what the weights should sum to
        if (p.sink.data)
          of_keys -=
              exp<T>(splat(number_of<T>(p, p.sink, lane) - rows.peak[i]))[0] * rows.inverse[i];
        const T ratio = whole[i] > 0 ? of_keys / whole[i] : 0;
        delta[i] = delta[i] * ratio + center[i] * of_keys;
      }
      drow[i] -= delta[i];
    }
    if (p.delta)
      for (int i = 0; i < count; ++i) static_cast<T*>(p.delta)[lane * p.n + row + i] = delta[i];
    return blocks <= p.strip ? blocks : p.strip - 1;
  }

  // Weights and dweights of a block, dropout's factors in the latter.
  void weigh(const Finished<T>& rows, const Visible<T>& v, int64_t slot) {
    T *w = weights(slot), *dw = dweights(slot);
    s.logits.tile(p, v, s.logits.keys(p, v, Read::rows), w, slopes(slot));
    over(v, [&](int, int at, int q) { store(w + at, rows.weight(p, load(w + at), q)); });
    if (p.value.kind == Kind::none) return;
    const Matrix<T> values =
        block_of(p, factors_of<T>(p, p.value), lane, v, s.left.width, s.values_space, Read::rows);
    for (int g = 0; g < v.GROUPS; ++g)
      multiply<TILE_VECTORS>(v.end[g] - v.begin[g], dw + g * PANEL<T> + v.begin[g] * GROUP<T>, GROUP<T>,
                             Matrix<T>{values.at + v.begin[g] * values.row, values.row, 1},
                             s.left.column_panel(g), s.left.width, false);
    if (!p.e) over(v, [&](int, int at, int) { store(dw + at, Vec<T>{}); });
    if (p.dropout.lanes) s.logits.drop(p, v, dw);
  }

  // Adds what a block contributes to every gradient. Its dweights become dlogits.
  void push(const Finished<T>& rows, const Visible<T>& v, int64_t slot) {
    T *w = weights(slot), *dw = dweights(slot);
    if (p.value.kind == Kind::none) {  // only dvalue is wanted, as by the product with the transpose
      if (p.dropout.lanes) s.logits.drop(p, v, w);
      clear_outside(v, w);
      return add_to_keys(v, w, 1, s.left.rows, p.e, dvalue);
    }
    over(v, [&](int j, int at, int q) {
      const Vec<T> weight = load(w + at), dweight = load(dw + at);
      Vec<T> dlogit;
      if (p.norm == Norm::softmax)
        dlogit = weight * (dweight + load(drow + q * W<T>));
      else if (p.norm == Norm::sigmoid)
        dlogit = dweight * weight * (1 - weight);
      else if (p.norm == Norm::row_sum)
        dlogit = (dweight + load(drow + q * W<T>)) * load(rows.inverse + q * W<T>);
      else if (p.norm == Norm::identity)
        dlogit = dweight;
      else
        dlogit = weight > 0 ? dweight * (p.mean ? load(rows.inverse + q * W<T>) : splat(T(1))) : Vec<T>{};
      if (p.norm == Norm::row_sum || p.norm == Norm::identity)
        dlogit = rows.absent(weight) ? Vec<T>{} : dlogit;
      store(dw + at, dlogit);
      if (p.dropout.lanes) store(w + at, weight * s.logits.drop_factor(p, v.column(j), q));
    });
    clear_outside(v, w);
    clear_outside(v, dw);
    if (dvalue) add_to_keys(v, w, 1, in_pairs<T>(p) ? s.left_rows : s.left.rows, p.e, dvalue);
    add_to_biases(p, s.logits, chunk, v, dw);
    if (p.softcap)
      over(v, [&](int, int at, int) { store(dw + at, load(dw + at) * load(slopes(slot) + at)); });
    if (!p.d) return;
    if (p.score != Score::dot) return add_pair_by_pair(v, dw, s.logits.keys(p, v, Read::columns));
    if (dkey)  // queries that are not pairs have the scale in them
      add_to_keys(v, dw, p.scale, in_pairs<T>(p) ? s.query_rows : s.logits.query.rows, p.d, dkey);
    if (p.dquery.data) add_to_queries(v, dw);
  }

  template <int Q>
  void multiply(int64_t rows, T* c, int64_t ldc, Matrix<T> a, const T* b, int64_t products, bool add) {
    if (in_pairs<T>(p))
      panel_product<Q>(MultiplyPairs{}, rows, c, ldc, a, b, products, add);
    else
      panel_product<Q>(Multiply{}, rows, c, ldc, a, b, products, add);
  }

  void add_to_queries(const Visible<T>& v, T* dlogits) {
    uint64_t any = 0;
    if (in_pairs<T>(p)) pair_weights(v, dlogits);
    const Matrix<T> keys = in_pairs<T>(p) ? pair_keys(p, p.key, p.d, v, lane, s.keys_panels, any)
                                          : s.logits.keys(p, v, Read::columns);
    const int step = in_pairs<T>(p) ? 2 : 1;
    for (int g = 0; g < v.GROUPS; ++g) {
      const int begin = v.begin[g] / step, products = (v.end[g] + step - 1) / step - begin;
      multiply<TILE_VECTORS>(p.d, s.dquery.column_panel(g), GROUP<T>,
                             Matrix<T>{keys.at + begin * keys.row, 1, keys.row},
                             dlogits + g * PANEL<T> + begin * GROUP<T>, products, true);
    }
  }

  // Products over queries read whole panels: pairs that no lane of a group sees count as 0.
  void clear_outside(const Visible<T>& v, T* tile) {
    for (int g = 0; g < v.GROUPS; ++g)
      for (int j = 0; j < v.count; ++j) {
        if (j == v.begin[g] && v.begin[g] < v.end[g]) j = v.end[g];
        if (j < v.count)
          for (int q = 0; q < GROUP<T>; ++q) tile[g * PANEL<T> + j * GROUP<T> + q] = 0;
      }
  }

  // to[key][width] += factor times the sum over queries of tile[key][query] rows[query][width]; `rows`
  // are panels, and have the factor in them where they are not pairs.
  void add_to_keys(const Visible<T>& v, const T* tile, double factor, const T* rows, int64_t width, T* to) {
    constexpr int STEP = 24;  // a multiple of every register tile's rows
    const int64_t ldc = round_up(width, GRADIENT_STEP), step = in_pairs<T>(p) ? 2 : 1;
    T* const home = to;
    if (v.gathered)
      for (int64_t x = 0; x < v.count * ldc; ++x) s.scattered[x] = 0;
    to = v.gathered ? s.scattered : to + v.first * ldc;
    if (in_pairs<T>(p)) pair_lanes(v, tile, factor, s.lanes);
    for (int64_t c = 0; c < width; c += GROUP<T>)
      for (int j = 0; j < v.count; j += v.full ? KEYS : STEP) {
        // Only the panels of queries that see one of these keys.
        const int stop = v.full || j + STEP > v.count ? v.count : j + STEP;
        int low = 0, high = v.GROUPS;
        while (low < high && !(v.begin[low] < stop && v.end[low] > j)) ++low;
        while (low < high && !(v.begin[high - 1] < stop && v.end[high - 1] > j)) --high;
        const Matrix<T> numbers{tile + low * PANEL<T> + j * GROUP<T>, GROUP<T>, 1, GROUP<T>, PANEL<T>};
        const Matrix<T> pairs{s.lanes + j * (ROWS / 2) + low * W<T>, ROWS / 2, 1};
        const Matrix<T> a = in_pairs<T>(p) ? pairs : numbers;
        const T* b = rows + (c * ROWS + low * GROUP<T> * GROUP<T>) / step;
        const int64_t products = (high - low) * GROUP<T> / step;
        if (width - c > W<T>)
          multiply<TILE_VECTORS>(stop - j, to + j * ldc + c, ldc, a, b, products, true);
        else
          multiply<1>(stop - j, to + j * ldc + c, ldc, a, b, products, true);
      }
    for (int j = 0; v.gathered && j < v.count; ++j)
      for (int64_t c = 0; c < ldc; c += W<T>) {
        T* sum = home + v.column(j) * ldc + c;
        store(sum, load(sum) + load(to + j * ldc + c));
      }
  }

  void add_pair_by_pair(const Visible<T>& v, const T* dlogits, Matrix<T> keys) {
    switch (p.score) {
      case Score::distance:
        return pairs<DistanceGradient>(v, dlogits, keys);
      case Score::leaky:
        return pairs<LeakyGradient>(v, dlogits, keys);
      case Score::reciprocal:
        return pairs<ReciprocalGradient>(v, dlogits, keys);
      default:
        return pairs<TanhGradient>(v, dlogits, keys);
    }
  }

  // Lanes are channels here: query and key gradients are sums of whole vectors.
  template <class Gradient>
  void pairs(const Visible<T>& v, const T* dlogits, Matrix<T> keys) {
    constexpr int R = 4;
    const Tile<T>& query = s.logits.query;
    T* packed = s.keys_panels;
    for (int j = 0; j < v.count; ++j)
      for (int64_t c = 0; c < query.padded; ++c)
        packed[j * query.padded + c] = c < p.d ? keys.at[j * keys.row + c] : 0;
    // Channels beyond the width have weight 0; 1 instead keeps a quotient of them a number.
    if (p.score == Score::reciprocal)
      for (int64_t c = p.d; c < query.padded; ++c) s.logits.weight[c] = 1;
    T unused[W<T>] = {};
    T* dweight = of_lane<T>(p, p.dweight, chunk, lane, round_up(p.d, GRADIENT_STEP));
    for (int64_t c = 0; c < p.d; c += W<T>) {
      const int64_t panel = c / GROUP<T> * ROWS * GROUP<T> + c % GROUP<T>;
      const Vec<T> w = p.weight.data ? load(s.logits.weight + c) : Vec<T>{};
      Vec<T> dw{};
      for (int i = 0; i < count; i += R) {
        const int g = i / GROUP<T>;
        Vec<T> q[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) q[r] = load(query.rows + panel + (i + r) * GROUP<T>);
        for (int from = v.begin[g]; from < v.end[g]; from += SOME) {
          const int to = from + SOME < v.end[g] ? from + SOME : v.end[g];
          Vec<T> dq[R] = {}, dw_of_few{};
          for (int j = from; j < to; ++j) {
            T* home = dkey ? dkey + v.column(j) * round_up(p.d, GRADIENT_STEP) + c : unused;
            const Vec<T> k = load(packed + j * query.padded + c);
            Vec<T> dk{};
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              const T dlogit = dlogits[g * PANEL<T> + j * GROUP<T> + i % GROUP<T> + r];
              Gradient::template call<T>(p, splat(dlogit), q[r], k, w, dq[r], dk, dw_of_few);
            }
            store(home, load(home) + dk);
          }
          dw += dw_of_few;
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            T* home = s.dquery.rows + panel + (i + r) * GROUP<T>;
            store(home, load(home) + dq[r]);
          }
        }
      }
      if (dweight) store(dweight + c, load(dweight + c) + dw);
    }
  }
};

template <class T>
static void attend_grad(const Problem& p, int64_t item, void* memory) {
  GradScratch<T> s(memory, p);
  const int64_t groups = p.lanes / p.group, tiles = (p.n + ROWS - 1) / ROWS;
  // Work is split by keys' groups of heads and then by chunks of queries; a bias that lanes share
  // belongs to its rows, so there a chunk does all lanes.
  const int64_t chunk = p.by_rows ? item : item / groups;
  const int64_t first = p.by_rows ? 0 : item % groups, last = p.by_rows ? groups : first + 1;
  for (int64_t group = first; group < last; ++group) {
    Backward<T> backward(p, s, chunk, chunk * groups + group);
    for (int64_t lane = group * p.group; lane < (group + 1) * p.group; ++lane)
      for (int64_t tile = chunk; tile < tiles; tile += p.chunks) backward.tile(lane, tile * ROWS);
  }
}

template <class T>
static size_t attend_grad_scratch(const Problem& p) {
  return GradScratch<T>(nullptr, p).arena.used;
}

static int64_t attend_grad_items(const Problem& p) {
  return p.chunks * (p.by_rows ? 1 : p.lanes / p.group);
}

}  // namespace regard::REGARD_ISA
