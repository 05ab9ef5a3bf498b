// Moving numbers between tensors and tiles, and which pairs of a tile are visible.
#pragma once

#include "product.h"

namespace regard::REGARD_ISA {

// Hands out pieces of one block of memory; with null it only counts.
struct Arena {
  char* base;
  size_t used = 0;
  explicit Arena(void* memory) : base(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

static inline int64_t step_to(const Batch& p, const int64_t* axis, int64_t share, int64_t lane) {
  int64_t offset = 0;
  for (int a = p.axes - 1; a >= 0; --a) {
    const int64_t at = lane % p.size[a];
    lane /= p.size[a];
    offset += axis[a] * (a == p.axes - 1 ? at / share : at);
  }
  return offset;
}

static inline int64_t size_of(Kind kind) { return kind == Kind::f64 ? 8 : kind == Kind::f32 ? 4 : 2; }

static inline const char* row_of(const Batch& p, const Operand& x, int64_t lane, int64_t row) {
  return x.data + size_of(x.kind) * (step_to(p, x.axis, x.share, lane) + row * x.row);
}

template <class T>
constexpr Kind KIND = sizeof(T) == 4 ? Kind::f32 : Kind::f64;

// count numbers of any kind to T; `step` apart, where they do not follow one another.
template <class T>
static inline void read(T* to, const char* from, Kind kind, int64_t count, int64_t step = 1) {
  if (step == 1 && kind == KIND<T>) {
    __builtin_memcpy(to, from, size_t(count) * sizeof(T));
  } else if (step == 1 && kind == Kind::bf16 && sizeof(T) == 4) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(from);
    uint32_t* bits = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < count; ++i) bits[i] = uint32_t(x[i]) << 16;
  } else if (kind == Kind::f32) {
    const float* x = reinterpret_cast<const float*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = T(x[i * step]);
  } else if (kind == Kind::f64) {
    const double* x = reinterpret_cast<const double*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = T(x[i * step]);
  } else if (kind == Kind::bf16) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = uint32_t(x[i * step]) << 16;
      float wide;
      __builtin_memcpy(&wide, &bits, 4);
      to[i] = T(wide);
    }
  } else {
    const _Float16* x = reinterpret_cast<const _Float16*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = T(float(x[i * step]));
  }
}

template <class T>
static inline void write(char* to, Kind kind, const T* from, int64_t count) {
  if (kind == KIND<T>) {
    __builtin_memcpy(to, from, size_t(count) * sizeof(T));
  } else if (kind == Kind::f32) {
    float* x = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < count; ++i) x[i] = float(from[i]);
  } else if (kind == Kind::f64) {
    double* x = reinterpret_cast<double*>(to);
    for (int64_t i = 0; i < count; ++i) x[i] = double(from[i]);
  } else if (kind == Kind::bf16) {
    uint16_t* x = reinterpret_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) {
      const float wide = float(from[i]);
      uint32_t bits;
      __builtin_memcpy(&bits, &wide, 4);
      const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
      x[i] = uint16_t(wide == wide ? rounded : 0x7fc0);
    }
  } else {
    _Float16* x = reinterpret_cast<_Float16*>(to);
    for (int64_t i = 0; i < count; ++i) x[i] = _Float16(float(from[i]));
  }
}

// One number per lane, such as a sink.
template <class T>
static inline T number_of(const Batch& p, const Operand& x, int64_t lane) {
  T number;
  read(&number, row_of(p, x, lane, 0), x.kind, 1);
  return number;
}

// Rows of a tensor as a tile needs them, zero where there are none, both ways round.
template <class T>
struct Tile {
  int64_t width, padded;
  T *rows;     // panels [width / GROUP][ROWS][GROUP]
  T *columns;  // panels [ROWS / GROUP][padded][GROUP]
  Tile(Arena& arena, int64_t width)
      : width(width),
        padded(round_up(width, GROUP<T>)),
        rows(arena.take<T>(ROWS * padded)),
        columns(arena.take<T>(padded * ROWS)) {}

  void read_rows(const Batch& p, const Operand& x, int64_t lane, int64_t first, int64_t count,
                 double scale = 1) {
    const char* from = row_of(p, x, lane, first);
    const int64_t size = size_of(x.kind);
    // Pairs are not numbers: they are not touched.
    const auto scaled = [&](Vec<T> v) { return scale == 1 ? v : v * T(scale); };
    for (int64_t c = 0; c < padded; c += GROUP<T>) {
      const int64_t some = width - c < GROUP<T> ? width - c : GROUP<T>;
      T* to = rows + c * ROWS;
      for (int64_t r = 0; r < count; ++r, to += GROUP<T>) {
        const char* source = from + (r * x.row + c) * size;
        if (some == GROUP<T> && x.kind == KIND<T>) {
#pragma GCC unroll 2
          for (int q = 0; q < GROUP<T>; q += W<T>)
            store(to + q, scaled(load(reinterpret_cast<const T*>(source) + q)));
          continue;
        }
        for (int64_t k = some; k < GROUP<T>; ++k) to[k] = 0;
        read(to, source, x.kind, some);
        for (int q = 0; q < GROUP<T>; q += W<T>) store(to + q, scaled(load(to + q)));
      }
      for (const T* end = rows + (c + GROUP<T>) * ROWS; to < end; ++to) *to = 0;
    }
  }

  void rows_to_columns() {
    for (int64_t r = 0; r < ROWS; r += W<T>)
      for (int64_t c = 0; c < padded; c += W<T>)
        transpose_block(columns + r / GROUP<T> * padded * GROUP<T> + c * GROUP<T> + r % GROUP<T>,
                        GROUP<T>, rows + c / GROUP<T> * ROWS * GROUP<T> + r * GROUP<T> + c % GROUP<T>,
                        GROUP<T>);
  }

  void columns_to_rows() {
    for (int64_t r = 0; r < ROWS; r += W<T>)
      for (int64_t c = 0; c < padded; c += W<T>)
        transpose_block(rows + c / GROUP<T> * ROWS * GROUP<T> + r * GROUP<T> + c % GROUP<T>, GROUP<T>,
                        columns + r / GROUP<T> * padded * GROUP<T> + c * GROUP<T> + r % GROUP<T>,
                        GROUP<T>);
  }

  void write_rows(const Batch& p, const Operand& x, int64_t lane, int64_t first, int64_t count) {
    char* to = const_cast<char*>(row_of(p, x, lane, first));
    const int64_t size = size_of(x.kind);
    for (int64_t c = 0; c < width; c += GROUP<T>)
      for (int64_t r = 0; r < count; ++r) {
        char* home = to + (r * x.row + c) * size;
        const T* from = rows + c * ROWS + r * GROUP<T>;
        if (width - c >= GROUP<T> && x.kind == KIND<T>)
#pragma GCC unroll 2
          for (int q = 0; q < GROUP<T>; q += W<T>)
            store(reinterpret_cast<T*>(home) + q, load(from + q));
        else
          write(home, x.kind, from, width - c < GROUP<T> ? width - c : GROUP<T>);
      }
  }

  T* column_panel(int g) const { return columns + g * padded * GROUP<T>; }
  T* row_panel(int64_t c) const { return rows + c * ROWS; }
};

// Numbers from one row to the next of a packed block: an odd number of 64-byte lines, so that a
// column's lines fall into all sets of a cache.
template <class T>
constexpr int64_t packed_row(int64_t width) {
  constexpr int64_t LINE = 64 / sizeof(T);
  return ((width + LINE - 1) / LINE | 1) * LINE;
}

// Whether reading a block's columns in place would evict its own lines: a first cache of 64 sets
// and 8 ways keeps KEYS lines that are `row` numbers apart if they fall into at least 16 sets. At
// width 128 this is a quarter of the time.
template <class T>
static inline bool collides(int64_t row) {
  const int64_t bytes = row * int64_t(sizeof(T));
  return bytes % 64 == 0 && bytes / 64 % 8 == 0;
}

// Asks for a line of the next block while this one is used, into the second cache: a few queries are
// done with their keys sooner than these arrive, and the first cache has no room to spare.
INLINE void bring(const void* line) { __builtin_prefetch(line, 0, 2); }

enum class Read { rows, columns };

// A tile of numbers per pair is panels [ROWS / GROUP][KEYS][GROUP].
template <class T>
constexpr int PANEL = KEYS * GROUP<T>;

// A block of keys that a tile of rows sees.
template <class T>
struct Visible {
  static constexpr int GROUPS = ROWS / GROUP<T>;
  int64_t first = 0;  // of the block's keys
  int count = 0;
  bool gathered = false;  // the keys do not follow each other
  int32_t columns[KEYS];  // then, which they are
  int64_t after = 0;      // where the keys of the next block begin
  bool few = false;                // the tile's queries fit one vector
  bool full = true;                // every row of the tile sees every key
  uint64_t keep[KEYS];             // one bit per row, where not full
  int begin[GROUPS], end[GROUPS];  // the keys that any lane of a group sees

  int vectors() const { return few ? 1 : TILE_VECTORS; }
  int64_t column(int j) const { return gathered ? columns[j] : first + j; }
};

// Keys or values of a block: in place where their kind is that of the sums, they follow each other, and
// reading them so does not collide.
template <class T>
static inline Matrix<T> block_of(const Problem& p, const Operand& x, int64_t lane, const Visible<T>& v,
                                 int64_t width, T* space, Read how) {
  const char* from = row_of(p, x, lane, 0);
  const int64_t step = x.row * size_of(x.kind);
  if (x.kind == KIND<T> && !v.gathered && (how == Read::rows || !collides<T>(x.row)))
    return {reinterpret_cast<const T*>(from + v.first * step), x.row, 1};
  const int64_t row = packed_row<T>(width);
  for (int j = 0; j < v.count; ++j) read(space + j * row, from + v.column(j) * step, x.kind, width);
  return {space, row, 1};
}

// Walks over the blocks of keys that some rows see, in order.
template <class T>
class Walk {
 public:
  // from: the first key of the first block at the earliest
  Walk(const Problem& p, int64_t lane, int64_t row, int64_t rows, int64_t from = 0)
      : p(p), rows(int(rows)), from(from) {
    if (!p.mask.present) return;
    const int64_t line = step_to(p, p.mask.axis, 1, lane) + row;
    for (int r = 0; r < rows; ++r) {
      at[r] = p.mask.offsets ? p.mask.offsets[line + r] : line + r;
      end[r] = p.mask.offsets ? p.mask.offsets[line + r + 1]
                              : line + r + (p.mask.start[line + r] < p.mask.stop[line + r]);
    }
  }

  bool next(Visible<T>& v) {
    v.few = rows <= W<T> && p.left.kind == Kind::none;  // the backward pass reads whole panels
    v.gathered = false;
    const bool some = p.mask.present ? next_of_runs(v) : next_of_all(v);
    v.after = from;
    return some;
  }

 private:
  const Problem& p;
  int rows;
  int64_t from;
  int64_t at[ROWS], end[ROWS];

  bool next_of_all(Visible<T>& v) {
    return from < p.m && whole(v, from, p.m - from < KEYS ? p.m : from + KEYS);
  }

  // A block of keys that all rows see.
  bool whole(Visible<T>& v, int64_t begin, int64_t end) {
    v.first = begin;
    v.count = int(end - begin);
    from = end;
    v.full = rows == ROWS;
    const uint64_t all = rows == ROWS ? ~uint64_t(0) : (uint64_t(1) << rows) - 1;
    for (int j = 0; j < v.count && !v.full; ++j) v.keep[j] = all;
    for (int g = 0; g < v.GROUPS; ++g) {
      v.begin[g] = 0;
      v.end[g] = g * GROUP<T> < rows ? v.count : 0;
    }
    return true;
  }

  // Whether every row's next run covers [low, high).
  bool in_all_rows(int64_t low, int64_t high) const {
    for (int r = 0; r < rows; ++r)
      if (at[r] >= end[r] || p.mask.start[at[r]] > low || p.mask.stop[at[r]] < high) return false;
    return true;
  }

  bool next_of_runs(Visible<T>& v) {
    if (!begins(v.first)) return false;
    if (in_all_rows(v.first, limit(v.first))) return whole(v, v.first, limit(v.first));
    v.count = keys_from(v.first, v.keep);
    if (p.gathers && from < p.m) gather(v);
    for (int g = 0; g < v.GROUPS; ++g) v.begin[g] = v.end[g] = 0;
    constexpr uint64_t LANES = GROUP<T> == 64 ? ~uint64_t(0) : (uint64_t(1) << (GROUP<T> & 63)) - 1;
    uint64_t all = ~uint64_t(0);
    for (int j = 0; j < v.count; ++j) {
      all &= v.keep[j];
      for (int g = 0; g < v.GROUPS; ++g)
        if (v.keep[j] >> (g * GROUP<T>) & LANES) {
          if (!v.end[g]) v.begin[g] = j;
          v.end[g] = j + 1;
        }
    }
    v.full = all == ~uint64_t(0);
    return true;
  }

  int64_t limit(int64_t low) const { return p.m - low < KEYS ? p.m : low + KEYS; }

  // The first key from `from` on that some row sees, if there is one.
  bool begins(int64_t& low) {
    low = p.m;
    for (int r = 0; r < rows; ++r) {
      while (at[r] < end[r] && p.mask.stop[at[r]] <= from) ++at[r];
      if (at[r] < end[r] && p.mask.start[at[r]] < low) low = p.mask.start[at[r]];
    }
    if (low < from) low = from;
    return low < p.m;
  }

  // Which rows see the keys from `low` to the last that some row sees; returns how many keys.
  int keys_from(int64_t low, uint64_t* keep) {
    // Runs toggle a row's bit where they begin and end; the running exclusive or is the mask.
    uint64_t flip[KEYS + 1] = {}, now = 0;
    int64_t high = 0;
    for (int r = 0; r < rows; ++r)
      for (int64_t run = at[r]; run < end[r] && p.mask.start[run] < limit(low); ++run) {
        const int64_t start = p.mask.start[run], stop = p.mask.stop[run];
        const int64_t a = start < low ? low : start, b = stop < limit(low) ? stop : limit(low);
        flip[a - low] ^= uint64_t(1) << r;
        flip[b - low] ^= uint64_t(1) << r;
        if (b > high) high = b;
      }
    for (int64_t j = 0; j < high - low; ++j) keep[j] = now ^= flip[j];
    from = high;
    return int(high - low);
  }

  // Where most keys of a block are seen by no row, as in a graph, a block is made of those that are.
  void gather(Visible<T>& v) {
    int seen = 0;
    for (int j = 0; j < v.count; ++j) seen += v.keep[j] != 0;
    if (2 * seen > KEYS) return;
    v.gathered = true;
    int count = 0;
    uint64_t keep[KEYS];
    int64_t low = v.first;
    __builtin_memcpy(keep, v.keep, sizeof keep);
    for (int some = v.count; some; some = begins(low) ? keys_from(low, keep) : 0)
      for (int j = 0; j < some; ++j) {
        if (!keep[j]) continue;
        if (count == KEYS) {
          from = low + j;
          v.count = count;
          return;
        }
        v.columns[count] = int32_t(low + j), v.keep[count++] = keep[j];
      }
    v.count = count;
  }
};

}  // namespace regard::REGARD_ISA
