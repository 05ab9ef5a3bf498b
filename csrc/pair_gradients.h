// Derivatives of scores that compare a query and a key channel by channel; lanes are channels.
//
// Each adds what one pair with gradient `dlogit` gives to the gradients of its query q, its key k and
// the score's own weight w (regard/score.py has the formulas).
#pragma once

#include "vec.h"

namespace regard::REGARD_ISA {

struct DistanceGradient {
  template <class T>
  INLINE void call(const Problem&, Vec<T> dlogit, Vec<T> q, Vec<T> k, Vec<T> w, Vec<T>& dq,
                   Vec<T>& dk, Vec<T>& dw) {
    const Vec<T> x = q - k, g = dlogit * x;
    dq += g * (w + w);
    dk -= g * (w + w);
    dw += g * x;
  }
};

struct LeakyGradient {
  template <class T>
  INLINE void call(const Problem& p, Vec<T> dlogit, Vec<T> q, Vec<T> k, Vec<T> w, Vec<T>& dq,
                   Vec<T>& dk, Vec<T>& dw) {
    const Vec<T> x = q + k, one = splat(T(1));
    const Vec<T> g = dlogit * (x > 0 ? one : one * T(p.slope));
    dq += g * w;
    dk += g * w;
    dw += g * x;
  }
};

struct TanhGradient {
  template <class T>
  INLINE void call(const Problem&, Vec<T> dlogit, Vec<T> q, Vec<T> k, Vec<T> w, Vec<T>& dq,
                   Vec<T>& dk, Vec<T>& dw) {
    const Vec<T> t = tanh<T>(q + k), g = dlogit * (1 - t * t) * w;
    dq += g;
    dk += g;
    dw += dlogit * t;
  }
};

// Of tables (regard/form/separable.py): r = 1 / (1 + e^(2 q + 2 k)), whose r (1 - r) is a quarter of
// tanh's derivative. The factors that belong to a channel are left to the caller.
struct ReciprocalGradient {
  template <class T>
  INLINE void call(const Problem&, Vec<T> dlogit, Vec<T> q, Vec<T> k, Vec<T> w, Vec<T>& dq,
                   Vec<T>& dk, Vec<T>& dw) {
    const Vec<T> r = w / (w + q * k), g = dlogit * (r - r * r);
    dq += g;
    dk += g;
    dw += dlogit - dlogit * (r + r);
  }
};

}  // namespace regard::REGARD_ISA
