// Memory for a piece of work: each thread keeps the most that it has needed.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

class Scratch {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size) {
      std::free(memory);
      memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      size = memory ? bytes : 0;
    }
    return memory;
  }
  ~Scratch() { std::free(memory); }

 private:
  void* memory = nullptr;
  size_t size = 0;
};
thread_local Scratch scratch_of_thread;

// Tests under sanitizers begin each piece with NaNs there, so that what is read before it is written shows.
template <class Kernel, class P>
void run_one(const Kernel& kernel, const P& p, int64_t item, void* memory, [[maybe_unused]] size_t bytes) {
#ifdef REGARD_SANITIZE
  if (bytes) std::memset(memory, 0xff, bytes);
#endif
  kernel.run(p, item, memory);
}

}  // namespace
