// Blending of projected Gaussians at pixels, front to back, its derivative, and the test that skips blocks of pixels.
#pragma once
#include "num.h"

namespace sk {

// One projected Gaussian as the pixel loops read it: log2 alpha = logo - (a dx + b dy)^2 - (c dy)^2.
template <class T> struct Gaussian2D {
  T x, y, a, b, c, logo;
};

template <class T> SK_FN T exponent_at(const Gaussian2D<T>& g, T dx, T dy) {
  const T u = g.a * dx + g.b * dy, v = g.c * dy;
  return g.logo - u * u - v * v;
}

// Its coefficients of dx^2, dx dy and dy^2.
template <class T> SK_FN void conic_of(T a, T b, T c, T& xx, T& xy, T& yy) {
  xx = -a * a;
  xy = (Scalar<T>)-2 * a * b;
  yy = -(b * b + c * c);
}

template <class T> struct AlphaAt {
  T alpha;                // 0 where the Gaussian does not touch the pixel
  Mask<T> free;           // touched and below the cap: alpha follows the Gaussian there
};

// dx, dy: pixel centre minus the Gaussian's place.
template <class T> SK_FN AlphaAt<T> alpha_at(const Gaussian2D<T>& g, T dx, T dy, T cut, T alpha_max) {
  AlphaAt<T> o;
  const T e = exponent_at(g, dx, dy);
  const auto touched = at_least(e, cut);
  const T raw = exp2_in_range(e);
  o.alpha = where(touched, min(raw, alpha_max), splat_of<T>(0));
  o.free = both(touched, less(raw, alpha_max));
  return o;
}

// What a Gaussian of this alpha does to a pixel that `left` of the light still reaches: its weight and what is left behind it, if
// the pixel is `going` on; a pixel that is not has stopped in front of this Gaussian.
template <class T> struct Step {
  T weight, left;
  Mask<T> going;
};
template <class T> SK_FN Step<T> blend_step(T left, T alpha, T transmittance_min) {
  const T next = left * (splat_of<T>(1) - alpha);   // not left - weight: the next Gaussian waits for one product only
  return {alpha * left, next, at_least(next, transmittance_min)};
}

// How fast the light from behind shrinks as the natural exponent grows: alpha / (1 - alpha).
template <class T> SK_FN T dimming(T alpha) { return alpha * reciprocal(splat_of<T>(1) - alpha); }

// Derivative of the loss by the natural exponent of one Gaussian at one pixel, from its weighted colour . v_colour and what Gaussians
// behind it and the background contribute.
template <class T> SK_FN T exponent_vjp(T weighted, T dimming, T behind) { return weighted - dimming * behind; }

// Upper bound of log2 alpha over a rectangle of pixel centres: the exact maximum, which lies at the Gaussian's place or on the
// vertical or horizontal side that faces it. In parts, for a grid of rectangles shares columns and rows.
template <class T> struct Column {       // centres lx..hx, as distances from the Gaussian
  T u, y, u_low, u_high;                 // on the side that faces it: a dx, and the dy of the maximum; a lx, a hx
};
template <class T> SK_FN Column<T> column_of(const Gaussian2D<T>& g, T y_per_x, T lx, T hx) {
  const T dx = clamp(splat_of<T>(0), lx, hx);
  return {g.a * dx, y_per_x * dx, g.a * lx, g.a * hx};
}
// Along a vertical line, where the maximum lies: dy = y_per_x dx.
template <class T> SK_FN T y_per_x_of(const Gaussian2D<T>& g) { return -g.a * g.b * reciprocal(g.b * g.b + g.c * g.c); }
template <class T> struct Row {          // centres ly..hy
  T ly, hy, u, peak;                     // on the side that faces it: b dy, logo - (c dy)^2
};
template <class T> SK_FN Row<T> row_of(const Gaussian2D<T>& g, T ly, T hy) {
  const T dy = clamp(splat_of<T>(0), ly, hy), v = g.c * dy;
  return {ly, hy, g.b * dy, g.logo - v * v};
}
template <class T> SK_FN T peak_in(const Gaussian2D<T>& g, const Column<T>& c, const Row<T>& r) {
  const T dy = clamp(c.y, r.ly, r.hy), u1 = c.u + g.b * dy, v1 = g.c * dy;
  const T u2 = clamp(splat_of<T>(0), c.u_low + r.u, c.u_high + r.u);
  return max(g.logo - u1 * u1 - v1 * v1, r.peak - u2 * u2);
}

}  // namespace sk
