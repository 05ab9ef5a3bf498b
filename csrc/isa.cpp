// One build of all kernels for one instruction set: compiled once with each set's flags.
#include "attend_grad.h"
#include "looks.h"

#ifndef REGARD_ISA
#error "define REGARD_ISA: base, avx2, avx512 or avx512_bf16"
#endif

namespace regard::REGARD_ISA {

template <void (*F32)(const Problem&, int64_t, void*), void (*F64)(const Problem&, int64_t, void*)>
static void run(const Problem& p, int64_t item, void* scratch) {
  p.compute == Kind::f64 ? F64(p, item, scratch) : F32(p, item, scratch);
}

template <size_t (*F32)(const Problem&), size_t (*F64)(const Problem&)>
static size_t scratch(const Problem& p) {
  return p.compute == Kind::f64 ? F64(p) : F32(p);
}

// Multiply-adds on registers alone: what the machine can do at most. Returns the flops done.
static double peak(int64_t rounds) {
  constexpr int CHAINS = 10;
  Vec<float> sums[CHAINS], x = splat(0.999f), y = splat(0.001f);
#pragma GCC unroll 10
  for (int c = 0; c < CHAINS; ++c) sums[c] = splat(float(c));
  for (int64_t k = 0; k < rounds; ++k)
#pragma GCC unroll 10
    for (int c = 0; c < CHAINS; ++c) {
      sums[c] = sums[c] * x + y;
      asm volatile("" : "+v"(sums[c]));  // or the compiler solves the recurrence
    }
  return 2.0 * CHAINS * W<float> * double(rounds);
}

#define REGARD_STRING(x) #x
#define REGARD_NAME(x) REGARD_STRING(x)

extern const ChunkKernels chunk_kernels;  // isa_chunks.cpp
extern const Kernels kernels;
const Kernels kernels = {
    REGARD_NAME(REGARD_ISA),
    FAST_PAIRS,
    {attend_items, scratch<attend_scratch<float>, attend_scratch<double>>,
     run<attend<float>, attend<double>>},
    {attend_grad_items, scratch<attend_grad_scratch<float>, attend_grad_scratch<double>>,
     run<attend_grad<float>, attend_grad<double>>},
    {look_items, scratch<look_scratch<float>, look_scratch<double>>, run<look<float>, look<double>>},
    &chunk_kernels,
    peak,
};

}  // namespace regard::REGARD_ISA
