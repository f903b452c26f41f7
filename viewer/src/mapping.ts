/** What is shown of a scene, and how numbers become colours: the same in the shader RESOLVE and here. */

export const LOOKS = ["colour", "depth", "normal", "alpha", "heat", "features", "similarity"] as const;
export type Look = (typeof LOOKS)[number];
export type Rgb = [number, number, number];

/** How the sums of a pass are read: as colours, by a ramp over `range`, or as directions. */
export interface Reading {
  mode: "colour" | "alpha" | "ramp" | "normal";
  range: [number, number];
}

export function readingOf(look: Look, range: [number, number]): Reading {
  return { mode: look === "alpha" ? "alpha" : look === "normal" ? "normal" : look === "depth" || look === "heat" || look === "similarity" ? "ramp" : "colour", range };
}

// Dark blue over teal and gold to near white: rises in lightness all the way, so that it reads in grey too.
const STOPS: Rgb[] = [[24, 15, 61], [46, 44, 122], [44, 84, 150], [38, 122, 152], [42, 157, 143], [98, 189, 116], [172, 211, 92], [240, 221, 100], [255, 246, 196]];

/** 256 colours of 4 bytes. */
export const RAMP: Uint8Array = (() => {
  const out = new Uint8Array(4 * 256);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (STOPS.length - 1), k = Math.min(Math.floor(at), STOPS.length - 2), t = at - k;
    for (let c = 0; c < 3; c++) out[4 * i + c] = Math.round(STOPS[k]![c]! * (1 - t) + STOPS[k + 1]![c]! * t);
    out[4 * i + 3] = 255;
  }
  return out;
})();

/** 8-bit pixels of a picture: `color` without a background, premultiplied; `value` is what a ramp reads, already divided by alpha. */
export function toPixels(reading: Reading, color: Float32Array, alpha: Float32Array, value: Float32Array | null, background: Rgb): Uint8ClampedArray<ArrayBuffer> {
  const n = alpha.length, out = new Uint8ClampedArray(4 * n), [low, high] = reading.range, gain = 255 / Math.max(high - low, 1e-30);
  for (let i = 0, j = 0, k = 0; i < n; i++, j += 3, k += 4) {
    const a = alpha[i]!;
    out[k + 3] = 255;
    if (reading.mode === "alpha") out[k] = out[k + 1] = out[k + 2] = 255 * a;
    else if (reading.mode === "ramp") {
      const v = value ? value[i]! : color[j]! / Math.max(a, 1e-6), at = 4 * Math.round(Math.min(Math.max((v - low) * gain, 0), 255));
      for (let c = 0; c < 3; c++) out[k + c] = a * RAMP[at + c]! + (1 - a) * 255 * background[c]!;
    } else if (reading.mode === "normal") {
      const length = Math.hypot(color[j]!, color[j + 1]!, color[j + 2]!) || Infinity;
      for (let c = 0; c < 3; c++) out[k + c] = 255 * (a * (0.5 + (0.5 * color[j + c]!) / length) + (1 - a) * background[c]!);
    } else for (let c = 0; c < 3; c++) out[k + c] = 255 * (color[j + c]! + (1 - a) * background[c]!);
  }
  return out;
}

/** The thinnest axis of each Gaussian, turned towards the camera: what the shader PROJECT makes for normals. */
export function normalsTowards(scene: { count: number; means: Float32Array; quats: Float32Array; logScales: Float32Array }, camera: [number, number, number]): Float32Array {
  const out = new Float32Array(3 * scene.count), { means, quats, logScales } = scene;
  for (let i = 0; i < scene.count; i++) {
    const q = quats.subarray(4 * i, 4 * i + 4), length = Math.hypot(q[0]!, q[1]!, q[2]!, q[3]!), [w, x, y, z] = length > 0 ? [q[0]! / length, q[1]! / length, q[2]! / length, q[3]! / length] : [1, 0, 0, 0];
    const [s0, s1, s2] = [logScales[3 * i]!, logScales[3 * i + 1]!, logScales[3 * i + 2]!];
    const n = s0 <= s1 && s0 <= s2 ? [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)]
      : s1 <= s2 ? [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)] : [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)];
    const towards = n[0]! * (means[3 * i]! - camera[0]) + n[1]! * (means[3 * i + 1]! - camera[1]) + n[2]! * (means[3 * i + 2]! - camera[2]);
    for (let k = 0; k < 3; k++) out[3 * i + k] = towards > 0 ? -n[k]! : n[k]!;
  }
  return out;
}
