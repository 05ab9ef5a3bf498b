// The kernels of recurrences for one instruction set: beside isa.cpp, so that both compile at once.
#include "chunk_grad.h"

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

extern const ChunkKernels chunk_kernels;
const ChunkKernels chunk_kernels = {
    {sketch_items, of_recur, run<sketch<float>, sketch<double>>},
    {recur_items, of_recur, run<recur<float>, recur<double>>},
    {sketch_items, of_grad, run<sketch_grad<float>, sketch_grad<double>>},
    {recur_items, of_grad, run<recur_grad<float>, recur_grad<double>>},
    numbers<state_numbers<float>, state_numbers<double>, int64_t>,
};

}  // namespace regard::REGARD_ISA
