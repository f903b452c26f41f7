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

// Transmittance in front of the next Gaussian. `running` becomes 0 once a pixel has stopped, `left` keeps its last true value.
template <class T> struct Ray {
  T running, left;
};

// The weight of a Gaussian with this alpha, 0 where the pixel has stopped; `going` tells where it has not.
template <class T> SK_FN T blend_step(Ray<T>& ray, T alpha, T transmittance_min, Mask<T>& going) {
  const T weight = alpha * ray.running;
  const T next = ray.running - weight;
  going = at_least(next, transmittance_min);
  ray.left = where(going, next, ray.left);
  const T zero = splat_of<T>(0);
  ray.running = where(going, next, zero);
  return where(going, weight, zero);
}

// How fast the light from behind shrinks as the natural exponent grows: alpha / (1 - alpha).
template <class T> SK_FN T dimming(T alpha) { return alpha * reciprocal(splat_of<T>(1) - alpha); }

// Derivative of the loss by the natural exponent of one Gaussian at one pixel, from its weighted colour . v_colour and what Gaussians
// behind it and the background contribute.
template <class T> SK_FN T exponent_vjp(T weighted, T dimming, T behind) { return weighted - dimming * behind; }

// Where the quadratic form peaks along a line: x = x_per_y dy on a horizontal one, y = y_per_x dx on a vertical one.
template <class T> struct Ridges {
  T x_per_y, y_per_x;
};
template <class T> SK_FN Ridges<T> ridges(const Gaussian2D<T>& g) { return {-g.b / g.a, -g.a * g.b / (g.b * g.b + g.c * g.c)}; }

// Upper bound of log2 alpha over the pixel centres x0..x1, y0..y1: exact maximum of the quadratic form over that rectangle.
template <class T> SK_FN T peak_in_block(const Gaussian2D<T>& g, const Ridges<T>& r, T x0, T x1, T y0, T y1) {
  const T lx = x0 - g.x, hx = x1 - g.x, ly = y0 - g.y, hy = y1 - g.y, zero = splat_of<T>(0);
  // The maximum lies at the centre or on the vertical or horizontal side that faces it.
  const T dx = clamp(zero, lx, hx), dy = clamp(zero, ly, hy);
  return max(exponent_at(g, dx, clamp(r.y_per_x * dx, ly, hy)), exponent_at(g, clamp(r.x_per_y * dy, lx, hx), dy));
}

}  // namespace sk
