// One Adam step of one number (Kingma & Ba 2015, algorithm 1).
#pragma once
#include "num.h"

namespace sk {

template <class S> struct AdamStep {
  S beta1, beta2, rest1, rest2, epsilon, correct1, correct2;   // rest = 1 - beta, taken in double; correct1 = 1 / (1 - beta1^t), correct2 = 1 / sqrt(1 - beta2^t)
};

template <class T> SK_FN void adam(T& param, T grad, T& m, T& v, T learning_rate, const AdamStep<Scalar<T>>& s) {
  m = s.beta1 * m + s.rest1 * grad;
  v = s.beta2 * v + s.rest2 * (grad * grad);
  param = param - learning_rate * (m * s.correct1) / (sqrt(v) * s.correct2 + s.epsilon);
}

}  // namespace sk
