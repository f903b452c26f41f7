// A Gaussian as a viewer's wire has it: 17 bytes, quantised in the ranges of its chunk. splatkit/wire.py says what each byte means, and does the same in numpy.
#pragma once
#include "sk/vec.h"

namespace sk {

constexpr int PACKED_BYTES = 17, PACKED_HEADER = 88;
constexpr float PACKED_MAX = 1e30f, PACKED_LOG_SCALE_MAX = 30;   // what is beyond the first is for numpy; scales are clamped wherever they are used

// From values to whole numbers: those of `low` become 0, those of the highest value `most`.
struct Steps {
  float low, gain, most;
};
inline Steps steps_of(float low, float high, float most) {
  const double gain = low == high ? 0 : most / ((double)high - low);
  return {low, (float)min(gain, 3e38), most};
}

template <class T> using Int = typename Traits<T>::Int;

// The nearest whole number to 0 <= x < 2^22, of two the even one.
template <class T> SK_FN Int<T> nearest(T x) { return to_bits(x + 12582912.0f) & 0x3fffff; }

template <class T> SK_FN Int<T> quantised(T x, Steps s) { return nearest(min((x - s.low) * s.gain, splat_of<T>(s.most))); }

// The index of the largest component in two bits, then ten for each of the others in order, the largest being positive.
template <class T> SK_FN Int<T> packed_rotation(Quat<T> q) {
  const T w = abs(q.w), x = abs(q.x), y = abs(q.y), z = abs(q.z), zero = splat_of<T>(0), one = splat_of<T>(1);
  const auto second = less(w, x), fourth = less(y, z), upper = less(max(w, x), max(y, z));
  const T index = where(upper, where(fourth, splat_of<T>(3), splat_of<T>(2)), where(second, one, zero));
  const T largest = where(upper, where(fourth, q.z, q.y), where(second, q.x, q.w));
  const T inverse = one / where(less(zero, abs(largest)), largest, one);   // with its sign; zero is the identity
  const T a = where(less(index, splat_of<T>(0.5)), q.x, q.w) * inverse, b = where(less(index, splat_of<T>(1.5)), q.y, q.x) * inverse, c = where(less(index, splat_of<T>(2.5)), q.z, q.y) * inverse;
  const T scale = splat_of<T>(511.5 * 1.41421356237309504880) / sqrt(one + a * a + b * b + c * c);
  return shifted(nearest(index), 30) | shifted(nearest(a * scale + 511.5f), 20) | shifted(nearest(b * scale + 511.5f), 10) | nearest(c * scale + 511.5f);
}

template <class T> SK_FN Int<T> packed_opacity(T logit) {
  return nearest(splat_of<T>(255) / (exp(clamp(-logit, splat_of<T>(-80), splat_of<T>(80))) + 1.0f));
}

template <class T> struct Unpacked {
  Vec3<T> mean, log_scale, sh0;
  Quat<T> quat;
  T logit;
};
struct PackSteps {
  Steps mean[3], log_scale[3], sh0[3];
};
// The 17 bytes, four to a word, the last one by itself.
template <class T> struct PackedWords {
  Int<T> word[4], last;
};
template <class T> SK_FN PackedWords<T> packed(const Unpacked<T>& g, const PackSteps& s) {
  const T limit = splat_of<T>(PACKED_LOG_SCALE_MAX);
  const Int<T> rotation = packed_rotation(g.quat), first_scale = quantised(clamp(g.log_scale.x, -limit, limit), s.log_scale[0]);
  PackedWords<T> out;
  out.word[0] = quantised(g.mean.x, s.mean[0]) | shifted(quantised(g.mean.y, s.mean[1]), 16);
  out.word[1] = quantised(g.mean.z, s.mean[2]) | shifted(first_scale, 16) | shifted(quantised(clamp(g.log_scale.y, -limit, limit), s.log_scale[1]), 24);
  out.word[2] = quantised(clamp(g.log_scale.z, -limit, limit), s.log_scale[2]) | shifted(rotation, 8);
  out.word[3] = ((rotation >> 24) & 255) | shifted(packed_opacity(g.logit), 8) | shifted(quantised(g.sh0.x, s.sh0[0]), 16) | shifted(quantised(g.sh0.y, s.sh0[1]), 24);
  out.last = quantised(g.sh0.z, s.sh0[2]);
  return out;
}

}  // namespace sk
