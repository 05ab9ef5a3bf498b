// What a kernel is asked to do: plain numbers and pointers, filled in by module.cpp.
//
// No function lives here: this header is read by every instruction set's build, and a function that
// two builds share could be linked from the one that the machine cannot run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace regard {

constexpr int AXES = 6;   // batch and head axes, heads last
constexpr int ROWS = 64;  // queries of a tile: one bit each of a 64-bit word
constexpr int KEYS = 96;  // keys of a block: a multiple of every register tile's rows
constexpr int GRADIENT_STEP = 16;  // rows of dkey, dvalue and dweight are padded to this many numbers

enum class Kind : int { none, f32, f64, bf16, f16 };
enum class Score : int { dot, distance, leaky, reciprocal, tanh };
enum class Norm : int { softmax, sigmoid, relu, row_sum, identity };

// Numbers [*batch, heads, rows, columns] somewhere in memory; strides count elements.
struct Operand {
  char* data = nullptr;
  Kind kind = Kind::none;
  int64_t axis[AXES] = {};
  int64_t share = 1;  // how many heads of the matrix read one head of this
  int64_t row = 0, column = 1;
};

// Runs of [start, stop) columns. Row i of lane l is line l * axis + i; its runs are
// offsets[line]..offsets[line + 1], or the one run `line` where offsets is null.
struct Mask {
  bool present = false;
  const int64_t* offsets = nullptr;
  const int32_t *start = nullptr, *stop = nullptr;
  int64_t axis[AXES] = {};  // strides in lines
};

struct Dropout {
  const int64_t* lanes = nullptr;  // the number of each lane, or null without dropout
  int64_t seed = 0;
  uint32_t threshold = 0;  // a pair falls where its 24 bits are below
  double factor = 1;       // of the others
};

// What looks.h is asked for: where it goes, null where it is not wanted. Numbers are T.
struct Looking {
  int64_t k = 0, side = 1;  // of the largest weights; of a cell
  int64_t offset = 0;       // of the rows, for distances
  void *entropy = nullptr, *distance = nullptr;  // [lanes, n]
  void* values = nullptr;                        // the k largest, [lanes, n, k]
  int64_t* indices = nullptr;                    // and their columns
  void* received = nullptr;                      // sums of columns, [chunks, lanes, m], zeros before
  void *mass = nullptr, *largest = nullptr;      // of cells, [lanes, n / side, m / side], zeros before
};

// Batch and head axes: a lane is one place on all of them.
struct Batch {
  int axes = 0;
  int64_t size[AXES] = {};
  int64_t lanes = 0;
};

struct Problem : Batch {
  Kind compute = Kind::f32;
  Score score = Score::dot;
  Norm norm = Norm::softmax;
  int64_t n = 0, m = 0, d = 0, e = 0;
  double scale = 1, softcap = 0, slope = 0;
  double norm_bias = 0;  // sigmoid: added to logits; row_sum: added to the sum
  bool mean = false;  // relu: divide by the number of visible keys

  Operand query, key, value;
  bool pairs = false;  // these and `left` are bfloat16, and are multiplied in pairs (pairs.h)
  Operand weight;    // additive: one row of d numbers (see parts.h)
  Operand toeplitz;  // bias by i - j + m - 1: rows of n + m - 1 + ROWS numbers
  Operand bias;      // bias by (i, j)
  // Bias by a row's own band: entry clip(j - (i + band_offset) + band_left, 0, band_width - 1).
  Operand band;
  int64_t band_left = 0, band_width = 0, band_offset = 0;
  Operand sink;      // one number per lane
  Mask mask;
  bool gathers = false;  // blocks may hold keys from anywhere: nothing else depends on their places
  Dropout dropout;

  // Forward: output and the statistics of rows, [lanes, n] each (null where they are not wanted).
  Operand output;
  void *peak = nullptr, *total = nullptr;

  // Backward: what came in, and what goes out (data is null where it is not wanted).
  Operand left;                   // multiplies weights from the left: [.., n, e]
  const void* dtotal = nullptr;   // [lanes, n]
  void* delta = nullptr;          // [lanes, n]: sum_j weight_ij dweight_ij
  // dquery has query's kind; the others T. dkey, dvalue: [chunks, lanes / group, m, padded width];
  // dweight: [chunks, lanes, padded d]; dtoeplitz: [chunks, lanes, n + m - 1 + ROWS]; dbias:
  // [chunks, lanes, m] where the bias has one row, else of the bias's own shape; dband: of band's.
  Operand dquery, dkey, dvalue, dweight, dtoeplitz, dbias, dband;
  int64_t chunks = 1;             // pieces of the queries that have sums over rows of their own
  int64_t group = 1;              // heads whose keys' gradients are summed here
  int64_t strip = 1;              // blocks of keys that a strip holds
  bool by_rows = false;           // a chunk does its rows of all lanes

  Looking looking;
};

// A recurrence in chunks of ROWS tokens (chunk.h). Numbers are of the kind `compute` and rows lie in one
// piece; a state has e + sums columns.
struct Recurrence : Batch {
  Kind compute = Kind::f32;
  int64_t n = 0, d = 0, e = 0;
  bool sums = false;  // whether outputs are divided by the same recurrence of ones, and eps
  double eps = 0;
  bool elu = false;  // whether queries and keys are given before elu(x) + 1
  Operand query;              // null where the state alone is wanted
  Operand key, value, decay;  // decay: [.., n or 1, 1 or d], null without
  Operand read, write;        // what is erased: a and b of delta.h, null without
  Operand state, after;       // the state before and after all tokens, [.., d, e + sums]
  Operand output;
  void* total = nullptr;  // [lanes, n]: what outputs are divided by
  void* kept = nullptr;   // the state before each chunk, as chunk.h has it, or null

  // Pieces of a lane's chunks that are done side by side; `sketch` has for each half of one what it does to
  // a state. In delta.h pieces of its columns of values.
  int64_t pieces = 1;
  void* sketch = nullptr;

  // Backward: what came in, and what goes out for each lane (data is null where it is not wanted).
  Operand left, dafter;
  Operand dquery, dkey, dvalue, ddecay, dread, dwrite, dstate;
};

// One build of the kernels: `items` pieces of work, each with `scratch` bytes of its own.
template <class P>
struct KernelOf {
  int64_t (*items)(const P&);
  size_t (*scratch)(const P&);
  void (*run)(const P&, int64_t item, void* scratch);
};
using Kernel = KernelOf<Problem>;

struct ChunkKernels {
  KernelOf<Recurrence> sketch, recur, sketch_grad, recur_grad;  // chunk.h
  KernelOf<Recurrence> delta, delta_grad;                       // delta.h
  int64_t (*state_numbers)(const Recurrence&);  // of a state as these have it
};

struct Kernels {
  const char* name;
  bool pairs;  // whether they multiply pairs of bfloat16 numbers
  Kernel attend, attend_grad, look;
  const ChunkKernels* chunks;
  double (*peak)(int64_t rounds);  // flops done
};

}  // namespace regard
