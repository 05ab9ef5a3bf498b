// The kernels of recurrences for one instruction set: beside isa.cpp, so that both compile at once.
#include "delta_grad.h"

namespace regard::REGARD_ISA {

template <auto F32, auto F64>
static void run(const Recurrence& p, int64_t item, void* scratch) {
  p.compute == Kind::f64 ? F64(p, item, scratch) : F32(p, item, scratch);
}

template <auto F32, auto F64, class N>
static N numbers(const Recurrence& p) {
  return p.compute == Kind::f64 ? F64(p) : F32(p);
}

constexpr auto of_recur = numbers<recur_scratch<float>, recur_scratch<double>, size_t>;
constexpr auto of_grad = numbers<recur_grad_scratch<float>, recur_grad_scratch<double>, size_t>;

// A decay of each channel, or one: two kernels.
template <auto F32, auto F64, auto CHANNELS32, auto CHANNELS64>
static void run_delta(const Recurrence& p, int64_t item, void* scratch) {
  decays_by_channel(p) ? run<CHANNELS32, CHANNELS64>(p, item, scratch) : run<F32, F64>(p, item, scratch);
}

template <auto F32, auto F64, auto CHANNELS32, auto CHANNELS64>
static size_t of_delta(const Recurrence& p) {
  return decays_by_channel(p) ? numbers<CHANNELS32, CHANNELS64, size_t>(p) : numbers<F32, F64, size_t>(p);
}

template <class T>
static int64_t state_of(const Recurrence& p) {
  return p.read.data || decays_by_channel(p) ? delta_state_numbers<T>(p) : state_numbers<T>(p);
}

#define REGARD_DELTA(F, KIND)                                                                    \
  F<float, Token##KIND<float>>, F<double, Token##KIND<double>>, F<float, Channel##KIND<float>>, \
      F<double, Channel##KIND<double>>

extern const ChunkKernels chunk_kernels;
const ChunkKernels chunk_kernels = {
    {sketch_items, of_recur, run<sketch<float>, sketch<double>>},
    {recur_items, of_recur, run<recur<float>, recur<double>>},
    {sketch_items, of_grad, run<sketch_grad<float>, sketch_grad<double>>},
    {recur_items, of_grad, run<recur_grad<float>, recur_grad<double>>},
    {delta_items, of_delta<REGARD_DELTA(delta_scratch, Decays)>, run_delta<REGARD_DELTA(delta, Decays)>},
    {delta_items, of_delta<REGARD_DELTA(delta_grad_scratch, Slopes)>,
     run_delta<REGARD_DELTA(delta_grad, Slopes)>},
    numbers<state_of<float>, state_of<double>, int64_t>,
};

}  // namespace regard::REGARD_ISA
