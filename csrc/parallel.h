// One parallel region on the threads that torch has: libgomp's on Linux, whichever compiler builds this.
#pragma once

#if defined(REGARD_GOMP)
// Where Clang's -fopenmp would call for a runtime, and a pool, of its own. libgomp's entry point has
// been the same since GCC 4.9.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
#endif

namespace regard {

// Runs body() once on each thread of a team; alone, where this was built without OpenMP.
template <class Body>
void parallel(int team, Body body) {
#if defined(REGARD_GOMP)
  GOMP_parallel([](void* data) { (*static_cast<Body*>(data))(); }, &body, unsigned(team), 0);
#else
#pragma omp parallel num_threads(team)
  body();
#endif
}

}  // namespace regard
