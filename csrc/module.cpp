// The Python module: fills in a Problem, picks a build of the kernels, runs it on OpenMP's pool.
//
// Tensors come as addresses, shapes and strides, so nothing here links to libtorch and one build
// serves every torch. The dynamic libgomp that torch has loaded is used: one pool, one number of
// threads. A second pool would spin against torch's on the same cores.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <pthread.h>
#ifdef REGARD_X86
#include <cpuid.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"
#include "problem.h"
#include "scratch.h"

namespace nb = nanobind;

namespace regard {

namespace base {
extern const Kernels kernels;
}
#ifdef REGARD_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

// Builds that this machine can run, the fastest first.
std::vector<const Kernels*> builds() {
  std::vector<const Kernels*> all;
#ifdef REGARD_X86
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;  // Clang's __builtin_cpu_supports knows no f16c before version 19
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
#ifdef REGARD_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) all.push_back(&avx512_bf16::kernels);
#endif
  if (avx512) all.push_back(&avx512::kernels);
  if (avx2) all.push_back(&avx2::kernels);
#endif
  all.push_back(&base::kernels);
  return all;
}

const Kernels* selected = nullptr;

const Kernels* find(const std::string& name) {
  std::string known;
  for (const Kernels* build : builds()) {
    if (name == build->name) return build;
    known += (known.empty() ? "" : ", ") + std::string(build->name);
  }
  throw std::invalid_argument("REGARD_ISA is '" + name + "'; this machine runs: " + known + ".");
}

const Kernels& kernels() {
  if (!selected) {
    const char* name = std::getenv("REGARD_ISA");
    selected = name && *name ? find(name) : builds().front();
  }
  return *selected;
}

// GNU's OpenMP does not survive a fork: its threads are gone in the child, and a parallel region
// there would wait for them for ever. A child works alone, as torch's data loaders do.
bool forked = false;

template <class P>
void run(const KernelOf<P>& kernel, const P& p, int threads) {
  const int64_t items = kernel.items(p);
  if (!items) return;
  const size_t bytes = kernel.scratch(p);
  const int team = int(std::min<int64_t>(forked ? 1 : threads, items));
  if (team == 1) {  // a region of one thread costs a small call a microsecond
    void* memory = scratch_of_thread.at_least(bytes);
    if (bytes && !memory) throw std::bad_alloc();
    for (int64_t item = 0; item < items; ++item) run_one(kernel, p, item, memory, bytes);
    return;
  }
  std::atomic<bool> starved = false;
  std::atomic<int64_t> next = 0;
  parallel(team, [&] {
    void* memory = scratch_of_thread.at_least(bytes);
    if (bytes && !memory) {
      starved = true;
      return;
    }
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;)
      run_one(kernel, p, item, memory, bytes);
  });
  if (starved) throw std::bad_alloc();
}

// Whether pairs are multiplied wherever they may be, or nowhere, whatever is faster; for tests.
std::optional<bool> chosen_pairs;

// Whether rows of bfloat16 numbers are rows of pairs of them.
bool lies_in_pairs(const Problem& p, const Operand& x, int64_t width) {
  bool even = x.kind == Kind::bf16 && width % 2 == 0 && x.row % 2 == 0 &&
              reinterpret_cast<uintptr_t>(x.data) % 4 == 0;
  for (int a = 0; a < p.axes; ++a) even &= x.axis[a] % 2 == 0;
  return even;
}

// Weights of both signs may cancel, which rounded ones do not.
bool multiplies_pairs(const Problem& p) {
  const bool positive = p.norm == Norm::softmax || p.norm == Norm::sigmoid || p.norm == Norm::relu;
  return chosen_pairs.value_or(kernels().pairs) && p.score == Score::dot && positive &&
         p.compute == Kind::f32 && p.value.kind == Kind::bf16 && lies_in_pairs(p, p.query, p.d) &&
         lies_in_pairs(p, p.key, p.d);
}

bool may_gather(const Problem& p) {
  return p.mask.present && !p.toeplitz.data && !p.bias.data && !p.band.data;
}

void attend(Problem p, int threads) {
  p.gathers = may_gather(p);
  p.pairs = multiplies_pairs(p);
  run(kernels().attend, p, threads);
}

void attend_grad(Problem p, int threads) {
  p.gathers = may_gather(p);
  p.pairs = multiplies_pairs(p) && lies_in_pairs(p, p.value, p.e) && lies_in_pairs(p, p.left, p.e);
  run(kernels().attend_grad, p, threads);
}

Kind kind_of(int code) { return static_cast<Kind>(code); }

// A number of a shape or of strides, which torch gives as tuples: small calls are made of these, and
// nanobind's own way takes four times as long.
int64_t entry(nb::handle tuple, size_t at) {
  return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), Py_ssize_t(at)));
}

// Strides of an operand along the problem's batch and head axes; axes of size 1 do not move.
Operand operand(const Batch& p, uintptr_t data, int kind, nb::tuple shape, nb::tuple strides,
                int trailing) {
  Operand x;
  x.data = reinterpret_cast<char*>(data);
  x.kind = kind_of(kind);
  const int own = int(shape.size()) - trailing;
  for (int a = 0; a < own; ++a) {
    const int at = p.axes - own + a;
    const int64_t size = entry(shape, size_t(a));
    if (at < 0 || size <= 1) continue;
    x.axis[at] = entry(strides, size_t(a));
    if (at == p.axes - 1 && size != p.size[at]) x.share = p.size[at] / size;
  }
  auto step = [&](int from_end) {
    const size_t at = shape.size() - size_t(from_end);
    return entry(shape, at) == 1 ? 0 : entry(strides, at);
  };
  if (trailing == 2) x.row = step(2);
  if (trailing >= 1) x.column = step(1);
  return x;
}

Operand& named(Problem& p, const std::string& name) {
  static const std::pair<const char*, Operand Problem::*> all[] = {
      {"query", &Problem::query},     {"key", &Problem::key},         {"value", &Problem::value},
      {"weight", &Problem::weight},   {"toeplitz", &Problem::toeplitz}, {"bias", &Problem::bias},
      {"band", &Problem::band},       {"sink", &Problem::sink},       {"output", &Problem::output},
      {"left", &Problem::left},       {"dband", &Problem::dband},
      {"dquery", &Problem::dquery},   {"dkey", &Problem::dkey},       {"dvalue", &Problem::dvalue},
      {"dweight", &Problem::dweight}, {"dtoeplitz", &Problem::dtoeplitz}, {"dbias", &Problem::dbias},
  };
  for (const auto& [known, member] : all)
    if (name == known) return p.*member;
  throw std::invalid_argument("no operand is called '" + name + "'.");
}

void set_axes(Batch& p, nb::tuple batch) {
  if (batch.size() > size_t(AXES)) throw std::invalid_argument("too many batch axes.");
  p.axes = int(batch.size());
  p.lanes = 1;
  for (int a = 0; a < p.axes; ++a) p.lanes *= p.size[a] = entry(batch, size_t(a));
}

Problem make(nb::tuple batch, int64_t n, int64_t m, int64_t d, int64_t e, int compute) {
  Problem p;
  set_axes(p, batch);
  p.n = n, p.m = m, p.d = d, p.e = e;
  p.compute = kind_of(compute);
  return p;
}

void set_mask(Problem& p, uintptr_t offsets, uintptr_t start, uintptr_t stop, nb::tuple batch) {
  p.mask.present = true;
  p.mask.offsets = reinterpret_cast<const int64_t*>(offsets);
  p.mask.start = reinterpret_cast<const int32_t*>(start);
  p.mask.stop = reinterpret_cast<const int32_t*>(stop);
  int64_t lines = p.n;
  for (int a = int(batch.size()) - 1, at = p.axes - 1; a >= 0; --a, --at) {
    const int64_t size = entry(batch, size_t(a));
    p.mask.axis[at] = size == 1 ? 0 : lines;
    lines *= size;
  }
}

// softmax(scale query key^T) value in one call: for small matrices the calls would cost more.
void attend_plain(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t output, int kind,
                  nb::tuple shapes, nb::tuple strides, double scale, int threads) {
  auto part = [](nb::tuple& whole, int k) {
    return nb::borrow<nb::tuple>(PyTuple_GET_ITEM(whole.ptr(), k));
  };
  auto last = [](nb::tuple t, size_t from_end) { return entry(t, t.size() - from_end); };
  const nb::tuple q = part(shapes, 0), k = part(shapes, 1), v = part(shapes, 2);
  Problem p;
  p.axes = int(q.size()) - 2;
  p.lanes = 1;
  for (int a = 0; a < p.axes; ++a) p.lanes *= p.size[a] = entry(q, size_t(a));
  p.n = last(q, 2), p.m = last(k, 2), p.d = last(q, 1), p.e = last(v, 1);
  p.compute = kind_of(kind) == Kind::f64 ? Kind::f64 : Kind::f32;
  p.scale = scale;
  const uintptr_t data[] = {query, key, value, output};
  Operand* const homes[] = {&p.query, &p.key, &p.value, &p.output};
  for (int x = 0; x < 4; ++x)
    *homes[x] = operand(p, data[x], kind, part(shapes, x), part(strides, x), 2);
  nb::gil_scoped_release free;
  attend(p, threads);
}

// Tensors of a recurrence by place: (address, shape, strides) each, or None.
constexpr Operand Recurrence::*const HOMES[] = {
    &Recurrence::query,  &Recurrence::key,    &Recurrence::value,  &Recurrence::decay,
    &Recurrence::read,   &Recurrence::write,  &Recurrence::state,  &Recurrence::output,
    &Recurrence::after,  &Recurrence::left,   &Recurrence::dafter, &Recurrence::dquery,
    &Recurrence::dkey,   &Recurrence::dvalue, &Recurrence::ddecay, &Recurrence::dread,
    &Recurrence::dwrite, &Recurrence::dstate,
};

Recurrence recurrence(nb::tuple batch, nb::tuple sizes, int kind, std::optional<double> eps,
                      bool elu, nb::tuple tensors) {
  Recurrence p;
  set_axes(p, batch);
  p.compute = kind_of(kind);
  p.n = entry(sizes, 0), p.d = entry(sizes, 1), p.e = entry(sizes, 2);
  p.pieces = entry(sizes, 3);
  p.sums = eps.has_value();
  p.eps = eps.value_or(0);
  p.elu = elu;
  for (size_t k = 0; k < tensors.size(); ++k) {
    const nb::handle given = tensors[k];
    if (given.is_none()) continue;
    const nb::tuple tensor = nb::cast<nb::tuple>(given);
    p.*HOMES[k] = operand(p, uintptr_t(entry(tensor, 0)), kind, nb::cast<nb::tuple>(tensor[1]),
                          nb::cast<nb::tuple>(tensor[2]), 2);
  }
  return p;
}

void recur(Recurrence& p, uintptr_t total, uintptr_t kept, uintptr_t sketch, int threads) {
  p.total = reinterpret_cast<void*>(total), p.kept = reinterpret_cast<void*>(kept);
  p.sketch = reinterpret_cast<void*>(sketch);
  const bool back = p.left.data || p.dafter.data;
  const ChunkKernels& of = *kernels().chunks;
  if (p.read.data || (p.decay.data && p.decay.column))
    return run(back ? of.delta_grad : of.delta, p, threads);
  if (p.pieces > 1) run(back ? of.sketch_grad : of.sketch, p, threads);
  run(back ? of.recur_grad : of.recur, p, threads);
}

double peak_flops(int threads, double seconds) {
  const Kernels& k = kernels();
  const int64_t rounds = 1 << 20;
  std::atomic<double> flops = 0;
  const auto begin = std::chrono::steady_clock::now();
  std::chrono::duration<double> spent{};
  do {
    parallel(threads, [&] { flops += k.peak(rounds); });
    spent = std::chrono::steady_clock::now() - begin;
  } while (spent.count() < seconds);
  return flops / spent.count();
}

}  // namespace

NB_MODULE(_cpu, module) {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });

  nb::class_<Problem>(module, "Problem")
      .def_static("of", &make)
      .def("operand",
           [](Problem& p, const std::string& name, uintptr_t data, int kind, nb::tuple shape,
              nb::tuple strides, int trailing) {
             named(p, name) = operand(p, data, kind, shape, strides, trailing);
           })
      .def("band",
           [](Problem& p, int64_t left, int64_t width, int64_t offset) {
             p.band_left = left, p.band_width = width, p.band_offset = offset;
           })
      .def("mask", &set_mask)
      .def("rows",
           [](Problem& p, uintptr_t peak, uintptr_t total, uintptr_t delta, uintptr_t dtotal) {
             p.peak = reinterpret_cast<void*>(peak), p.total = reinterpret_cast<void*>(total);
             p.delta = reinterpret_cast<void*>(delta);
             p.dtotal = reinterpret_cast<const void*>(dtotal);
           })
      .def("dropout",
           [](Problem& p, uintptr_t lanes, int64_t seed, uint32_t threshold, double factor) {
             p.dropout = {reinterpret_cast<const int64_t*>(lanes), seed, threshold, factor};
           })
      .def("score",
           [](Problem& p, int score, double scale, double softcap, double slope) {
             p.score = static_cast<Score>(score);
             p.scale = scale, p.softcap = softcap, p.slope = slope;
           })
      .def("norm",
           [](Problem& p, int norm, double bias, bool mean) {
             p.norm = static_cast<Norm>(norm);
             p.norm_bias = bias, p.mean = mean;
           })
      .def("look",
           [](Problem& p, int64_t k, int64_t side, int64_t offset, const std::vector<uintptr_t>& homes) {
             const auto home = [&](size_t at) { return reinterpret_cast<void*>(homes.at(at)); };
             p.looking = {k,       side,    offset,  home(0), home(1), home(2),
                          static_cast<int64_t*>(home(3)), home(4), home(5), home(6)};
           })
      .def("split", [](Problem& p, int64_t chunks, int64_t group, int64_t strip, bool by_rows) {
        p.chunks = chunks, p.group = group, p.strip = strip, p.by_rows = by_rows;
      });

  nb::class_<Recurrence>(module, "Recurrence")
      .def_static("of", &recurrence, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
                  nb::arg())
      .def("state_numbers", [](const Recurrence& p) { return kernels().chunks->state_numbers(p); });

  const auto free_of_gil = nb::call_guard<nb::gil_scoped_release>();
  module.def("attend", &attend, free_of_gil);
  module.def("attend_plain", &attend_plain);
  module.def("attend_grad", &attend_grad, free_of_gil);
  module.def("look", [](const Problem& p, int threads) { run(kernels().look, p, threads); },
             free_of_gil);
  module.def("recur", &recur, free_of_gil);
  module.attr("ROWS") = ROWS;
  module.attr("KEYS") = KEYS;
  module.attr("GRADIENT_STEP") = GRADIENT_STEP;
  module.def("isa", [] { return std::string(kernels().name); });
  module.def("select_isa", [](const std::string& name) { selected = find(name); });
  module.def("select_pairs", [](std::optional<bool> pairs) { chosen_pairs = pairs; },
             nb::arg().none());
  module.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* build : builds()) names.emplace_back(build->name);
    return names;
  });
  module.def("peak_flops", &peak_flops, free_of_gil);
}

}  // namespace regard
