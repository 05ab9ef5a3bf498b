// Gradients of biases: what the dlogits of one tile add to those of a vector by distance, of a dense
// bias and of a band (regard/form/operands.py says which position parts are which).
#pragma once

#include "parts.h"

namespace regard::REGARD_ISA {

template <class T>
static T* place(const Operand& x, int64_t offset) {
  return x.data ? reinterpret_cast<T*>(x.data) + offset : nullptr;
}

// The numbers of a lane in a gradient of which every chunk has its own.
template <class T>
static T* of_lane(const Problem& p, const Operand& x, int64_t chunk, int64_t lane, int64_t numbers) {
  return place<T>(x, (chunk * p.lanes + lane) * numbers);
}

template <class T>
static T sum_of(const T* from, int64_t count) {
  Vec<T> some{};
  int64_t j = 0;
  for (; j + W<T> <= count; j += W<T>) some += load(from + j);
  T total = sum<T>(some);
  for (; j < count; ++j) total += from[j];
  return total;
}

// A tail of the band takes the sum over its keys, the others one number each.
template <class T>
static void add_to_band(const Problem& p, const Logits<T>& of_tile, const Visible<T>& v, const T* dlogits) {
  const Overlap of = of_tile.overlap(p, v);
  T* to = reinterpret_cast<T*>(const_cast<char*>(row_of(p, p.dband, of_tile.lane, of_tile.row)));
  if (of.before() || of.behind(of_tile.count)) {
    T* tail = to + (of.before() ? 0 : of.last);
    for (int g = 0; g < v.GROUPS; ++g)
      for (int lanes = 0; lanes < GROUP<T>; lanes += W<T>) {
        Vec<T> some{};
        for (int j = v.begin[g]; j < v.end[g]; ++j)
          some += load(dlogits + g * PANEL<T> + j * GROUP<T> + lanes);
        const int64_t first = g * GROUP<T> + lanes;
        for (int k = 0; k < W<T> && first + k < of_tile.count; ++k)
          tail[(first + k) * p.dband.row] += some[k];
      }
    return;
  }
  T* across = of_tile.bias_space;
  for (int64_t r = 0; r < of_tile.count; r += W<T>)
    for (int64_t c = 0; c < v.count; c += W<T>)
      transpose_block(across + r * KEYS + c, KEYS,
                      dlogits + r / GROUP<T> * PANEL<T> + c * GROUP<T> + r % GROUP<T>, GROUP<T>);
  for (int64_t r = 0; r < of_tile.count; ++r) {
    const int64_t begin = of.begin(r), end = of.end(r);
    const T* from = across + r * KEYS;
    T *home = to + r * p.dband.row, *inside = home - r + of.shift;
    home[0] += sum_of(from, begin);
    for (int64_t j = begin; j < end; ++j) inside[j] += from[j];
    home[of.last] += sum_of(from + end, v.count - end);
  }
}

template <class T>
static void add_to_biases(const Problem& p, const Logits<T>& of_tile, int64_t chunk, const Visible<T>& v,
                          const T* dlogits) {
  const int64_t lane = of_tile.lane, row = of_tile.row;
  if (p.dband.data) add_to_band(p, of_tile, v, dlogits);
  if (p.dtoeplitz.data) {
    T* to = of_lane<T>(p, p.dtoeplitz, chunk, lane, p.n + p.m - 1 + ROWS) + row + p.m - 1 - v.first;
    over(v, [&](int j, int at, int q) {
      store(to - j + q * W<T>, load(to - j + q * W<T>) + load(dlogits + at));
    });
  }
  if (!p.dbias.data) return;
  if (p.bias.row == 0) {
    T* to = of_lane<T>(p, p.dbias, chunk, lane, p.m) + v.first;
    over(v, [&](int j, int at, int) { to[j] += sum<T>(load(dlogits + at)); });
    return;
  }
  T* to = reinterpret_cast<T*>(const_cast<char*>(row_of(p, p.dbias, lane, row))) + v.first;
  over(v, [&](int j, int at, int q) {
    const Vec<T> each = load(dlogits + at);
    for (int k = 0; k < W<T> && q * W<T> + k < of_tile.count; ++k)
      to[(q * W<T> + k) * p.dbias.row + j * p.dbias.column] += each[k];
  });
}

}  // namespace regard::REGARD_ISA
