// One step of one number: Adam (Kingma & Ba 2015, algorithm 1), with the decoupled attribute decay of AdamW-GS (Ding et al. 2026).
#pragma once
#include "num.h"

namespace sk {

template <class S> struct AdamStep {
  S beta1, beta2, rest1, rest2, epsilon;   // rest = 1 - beta, taken in double
  S decay, decay_max;                      // strength of the decay, and the most that it adds to a step before the learning rate
};

// What is decayed: nothing, the opacity behind a logit, the scale behind a logarithm. slope() is d attribute / d parameter.
enum { PLAIN = 0, OPACITY = 1, SCALE = 2 };
template <int attribute, class T> SK_FN T slope(T param) {
  if (attribute == SCALE) return exp(clamp(param, splat_of<T>(-30), splat_of<T>(30)));
  const T e = exp(-abs(param)), whole = e + splat_of<T>(1);
  return e / (whole * whole);
}

// Both corrections of step t for one number that has taken t steps.
SK_FN void bias_corrections(double beta1, double beta2, int64_t t, double& correct1, double& correct2) {
  double power1 = 1, power2 = 1;
  for (; t > 0; t /= 2, beta1 *= beta1, beta2 *= beta2)
    if (t % 2) power1 *= beta1, power2 *= beta2;
  correct1 = 1 / (1 - power1);
  correct2 = 1 / sqrt(1 - power2);
}

// correct1 = 1 / (1 - beta1^t), correct2 = 1 / sqrt(1 - beta2^t) with t the steps that this number has taken, this one included. The decay
// is divided by the size of the photometric gradient, but never enters its moments.
template <int attribute, class T> SK_FN void adam(T& param, T grad, T& m, T& v, T learning_rate, T correct1, T correct2, const AdamStep<Scalar<T>>& s) {
  m = s.beta1 * m + s.rest1 * grad;
  v = s.beta2 * v + s.rest2 * (grad * grad);
  const T root = sqrt(v) * correct2 + s.epsilon;
  if (attribute == PLAIN)
    param = param - learning_rate * (m * correct1) / root;
  else
    param = param - learning_rate * (m * correct1 / root + min(s.decay * slope<attribute>(param) / root, splat_of<T>(s.decay_max)));
}

}  // namespace sk
