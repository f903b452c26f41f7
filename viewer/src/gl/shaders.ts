/** The arithmetic of cuda/include/sk/project.h, sh.h and blend.h for WebGL2, in the same steps. */

/** Draws a triangle that covers the target. */
export const FULL = `#version 300 es
void main() { gl_Position = vec4(gl_VertexID == 1 ? 3.0 : -1.0, gl_VertexID == 2 ? 3.0 : -1.0, 0.0, 1.0); }`;

/** One fragment for each Gaussian: its record on the screen. Rows of the scene lie in texels of a width of 2048. */
export const PROJECT = `#version 300 es
precision highp float;
precision highp int;
precision highp sampler2DArray;
uniform sampler2DArray base;      // 0: mean, logit; 1: quaternion w x y z; 2: log scales; 3: SH band 0
uniform sampler2DArray bands;     // SH above band 0, four numbers a layer
uniform sampler2D instead;        // what is blended in place of colour
uniform vec3 row0, row1, row2, centre;   // world_to_cam without translation, the camera's place
uniform vec4 lens;                // fx, fy, and the principal point from the picture's centre
uniform vec4 limits;              // of x/z (low, high) and y/z where the Jacobian is taken
uniform vec4 settings;            // blur, log2 alpha_min, antialias, near
uniform int count, degree, kind;  // kind 0: colour, 1: attribute, 2: normal
layout(location = 0) out vec4 place;    // x, y, a, b
layout(location = 1) out vec4 shape;    // c, log2 opacity, reach (negative: not drawn), depth
layout(location = 2) out vec4 blended;
const float HALF_LOG2E = 0.72134752044, LOG2E = 1.44269504089;

vec3 above(int k, ivec2 at) {      // coefficient k >= 1
  int i = 3 * (k - 1);
  vec4 a = texelFetch(bands, ivec3(at, i >> 2), 0), b = texelFetch(bands, ivec3(at, (i >> 2) + 1), 0);
  int s = i & 3;
  return s == 0 ? a.xyz : s == 1 ? a.yzw : s == 2 ? vec3(a.zw, b.x) : vec3(a.w, b.xy);
}

vec3 colour(ivec2 at, vec3 d) {
  vec3 c = 0.5 + 0.28209479177387814 * texelFetch(base, ivec3(at, 3), 0).xyz;
  if (degree > 0) c += 0.4886025119029199 * (d.z * above(2, at) - d.y * above(1, at) - d.x * above(3, at));
  if (degree > 1) {
    float xx = d.x * d.x, yy = d.y * d.y, zz = d.z * d.z;
    c += 1.0925484305920792 * (d.x * d.y * above(4, at) - d.y * d.z * above(5, at) - d.x * d.z * above(7, at))
       + 0.31539156525252005 * (2.0 * zz - xx - yy) * above(6, at) + 0.5462742152960396 * (xx - yy) * above(8, at);
    if (degree > 2) {
      float four = 4.0 * zz - xx - yy;
      c += -0.5900435899266435 * d.y * (3.0 * xx - yy) * above(9, at) + 2.890611442640554 * d.x * d.y * d.z * above(10, at)
         - 0.4570457994644658 * four * (d.y * above(11, at) + d.x * above(13, at)) + 0.3731763325901154 * d.z * (2.0 * zz - 3.0 * xx - 3.0 * yy) * above(12, at)
         + 1.445305721320277 * d.z * (xx - yy) * above(14, at) - 0.5900435899266435 * d.x * (xx - 3.0 * yy) * above(15, at);
    }
  }
  return max(c, 0.0);
}

void main() {
  ivec2 at = ivec2(gl_FragCoord.xy);
  place = shape = blended = vec4(0.0);
  shape.z = -1.0;
  if (at.y * 2048 + at.x >= count) return;
  vec4 ml = texelFetch(base, ivec3(at, 0), 0), q = texelFetch(base, ivec3(at, 1), 0), sm = texelFetch(base, ivec3(at, 2), 0);
  vec3 d = ml.xyz - centre, t = vec3(dot(row0, d), dot(row1, d), dot(row2, d));
  if (!(t.z > 0.5 * settings.w)) return;      // the exact near plane is the order's
  float largest = max(max(abs(q.x), abs(q.y)), max(abs(q.z), abs(q.w)));
  q = largest > 0.0 ? normalize(q / largest) : vec4(1.0, 0.0, 0.0, 0.0);
  float w = q.x, x = q.y, y = q.z, z = q.w;
  vec3 s = exp(clamp(sm.xyz, -30.0, 30.0));
  vec3 axis0 = vec3(1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y + w * z), 2.0 * (x * z - w * y));
  vec3 axis1 = vec3(2.0 * (x * y - w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z + w * x));
  vec3 axis2 = vec3(2.0 * (x * z + w * y), 2.0 * (y * z - w * x), 1.0 - 2.0 * (x * x + y * y));
  vec3 n0 = axis0 * s.x, n1 = axis1 * s.y, n2 = axis2 * s.z;
  vec3 p0 = vec3(dot(row0, n0), dot(row0, n1), dot(row0, n2)), p1 = vec3(dot(row1, n0), dot(row1, n1), dot(row1, n2)), p2 = vec3(dot(row2, n0), dot(row2, n1), dot(row2, n2));
  float iz = 1.0 / t.z;
  vec2 uv = clamp(t.xy * iz, limits.xz, limits.yw);
  vec3 j0 = lens.x * iz * (p0 - uv.x * p2), j1 = lens.y * iz * (p1 - uv.y * p2);
  float a = dot(j0, j0), b = dot(j0, j1), c = dot(j1, j1), blur = settings.x;
  vec3 normal = cross(j0, j1);
  float det0 = dot(normal, normal), det = det0 + blur * (a + c + blur), inv = 1.0 / det;
  float logo = ml.w > 0.0 ? -log2(1.0 + exp(-ml.w)) : ml.w * LOG2E - log2(1.0 + exp(ml.w));
  if (settings.z > 0.5) logo += 0.5 * log2(max(det0 * inv, 1e-37));
  float room = logo - settings.y, a2 = sqrt(HALF_LOG2E * (c + blur) * inv), c2 = sqrt(HALF_LOG2E / (c + blur));
  if (!(room >= 0.0 && det > 0.0 && det < 1e30 && a2 > 0.0 && a2 < 1e30 && c2 < 1e30)) return;
  place = vec4(t.xy * iz * lens.xy + lens.zw, a2, -HALF_LOG2E * b * inv / a2);
  shape = vec4(c2, logo, sqrt(room), t.z);
  if (kind == 0) blended.rgb = colour(at, normalize(d));
  else if (kind == 1) blended.rgb = texelFetch(instead, at, 0).rgb;
  else {
    vec3 axis = s.x <= s.y && s.x <= s.z ? axis0 : s.y <= s.z ? axis1 : axis2;   // the thinnest
    blended.rgb = dot(axis, d) > 0.0 ? -axis : axis;
  }
}`;

/** Four vertices for each Gaussian, 2048 Gaussians an instance, farthest first. The parallelogram in which (a dx + b dy, c dy) is within the reach touches the ellipse of alpha_min. */
export const SPLAT_VERTEX = `#version 300 es
precision highp float;
precision highp int;
precision highp usampler2D;
uniform usampler2D order;
uniform sampler2D place, shape, blended;
uniform vec2 half_size, shift;    // in pixels
uniform int drawn, depth;
out vec2 uv;
flat out vec4 splat;              // what is blended, log2 opacity
void main() {
  int slot = gl_InstanceID * 2048 + (gl_VertexID >> 2);
  gl_Position = vec4(2.0, 2.0, 2.0, 1.0);
  uv = vec2(0.0);
  splat = vec4(0.0);
  if (slot >= drawn) return;
  slot = drawn - 1 - slot;
  int row = int(texelFetch(order, ivec2(slot & 2047, slot >> 11), 0).x);
  ivec2 at = ivec2(row & 2047, row >> 11);
  vec4 s = texelFetch(shape, at, 0);
  if (s.z < 0.0) return;
  vec4 p = texelFetch(place, at, 0), c = texelFetch(blended, at, 0);
  uv = s.z * vec2(((gl_VertexID & 1) == 0) == (p.w > 0.0) ? 1.0 : -1.0, (gl_VertexID & 2) == 0 ? -1.0 : 1.0);   // the triangles meet in the shorter diagonal
  float dy = uv.y / s.x, dx = (uv.x - p.w * dy) / p.z;
  gl_Position = vec4((p.xy + vec2(dx, dy) + shift) / half_size * vec2(1.0, -1.0), 0.0, 1.0);
  splat = vec4(depth != 0 ? vec3(s.w, 0.0, 0.0) : c.rgb, s.y);
}`;

/** Software renderers take a tenth of a fragment's time for exp2: without `exact` a polynomial to the power of 8, within 6e-5 where log2 alpha is above -8, and falling to 0 below. */
export const splatFragment = (exact: boolean): string => `#version 300 es
precision highp float;
in vec2 uv;
flat in vec4 splat;
uniform vec2 cut;                 // log2 alpha_min, alpha_max
out vec4 color;
float power(float e) {
  ${exact ? "return exp2(e);" : `float t = max(0.99999319 + e * (0.0865888132 + e * (0.00368828585 + e * 8.59901103e-5)), 0.0);
  t *= t; t *= t;
  return t * t;`}
}
void main() {
  float e = splat.w - dot(uv, uv);
  if (e < cut.x) discard;
  float alpha = min(power(e), cut.y);
  color = vec4(splat.rgb * alpha, alpha);
}`;

/** What the sums mean to the eye; mapping.ts has the same for the picture of the WebAssembly path. */
export const RESOLVE = `#version 300 es
precision highp float;
uniform sampler2D sums, ramp;
uniform vec3 background;
uniform vec2 range;               // low, and 1 / (high - low)
uniform int look;                 // 0: colour, 1: alpha, 2: by a ramp, mean value, 3: normal
out vec4 color;
void main() {
  vec4 s = texelFetch(sums, ivec2(gl_FragCoord.xy), 0);
  vec3 c = s.rgb + (1.0 - s.a) * background;
  if (look == 1) c = vec3(s.a);
  else if (look == 2) {
    float v = clamp((s.r / max(s.a, 1e-6) - range.x) * range.y, 0.0, 1.0);
    c = mix(background, texture(ramp, vec2(v * (255.0 / 256.0) + 0.5 / 256.0, 0.5)).rgb, s.a);
  } else if (look == 3) c = mix(background, dot(s.rgb, s.rgb) > 0.0 ? 0.5 + 0.5 * normalize(s.rgb) : vec3(0.5), s.a);
  color = vec4(c, 1.0);
}`;
