/** A scene as the page holds it, and how it must be drawn. */

/** The values of SceneHeader and RasterSettings (splatkit/capture.py, splatkit/raster/types.py) that a picture depends on, by their names there. */
export interface SceneHeader {
  near: number;
  blur_px2: number;
  antialias: boolean;
  alpha_min: number;
  alpha_max: number;
  transmittance_min: number;
  fov_margin: number;
  up: [number, number, number];
  step: number | null;
  name: string;
}

export interface Features {
  channels: number;
  int8: Int8Array; // N x channels; value = int8 * scale + offset
  scale: Float32Array;
  offset: Float32Array;
}

/** N Gaussians. Every finite value is valid; spaces and units are those of splatkit.Scene. */
export interface SplatScene {
  count: number;
  shDegree: 0 | 1 | 2 | 3;
  means: Float32Array; // 3N
  quats: Float32Array; // 4N, w x y z, any length; zero is the identity
  logScales: Float32Array; // 3N
  logitOpacities: Float32Array; // N
  sh: Float32Array; // N x K x 3, K = (degree + 1)^2
  features?: Features;
  header: SceneHeader;
}

/** What a file means that says nothing about how to draw it. */
export const DEFAULT_HEADER: SceneHeader = {
  near: 0.01, blur_px2: 0.3, antialias: false, alpha_min: 1 / 255, alpha_max: 0.99, transmittance_min: 1e-4, fov_margin: 0.3, up: [0, -1, 0], step: null, name: "",
};

/** Beyond it neither textures nor chunks of this page reach. */
export const COUNT_MAX = 16_000_000;
/** Logit of a Gaussian that is not there yet. */
export const ABSENT = -100;

/** Opacities of 8 bits as logits. 0 and 255 are taken half a step inside, where logits are finite. */
export const LOGITS = Float64Array.from({ length: 256 }, (_, q) => {
  const opacity = Math.min(Math.max(q, 0.5), 254.5) / 255;
  return Math.log(opacity / (1 - opacity));
});

export const bandsOf = (shDegree: number): number => (shDegree + 1) ** 2;

/** The arrays of a scene, and how many numbers a Gaussian has in each. */
export const PARTS = ["means", "quats", "logScales", "logitOpacities", "sh"] as const;
export type Part = (typeof PARTS)[number];
export type Rows = Record<Part, Float32Array>;
export const widthsOf = (shDegree: number): Record<Part, number> => ({ means: 3, quats: 4, logScales: 3, logitOpacities: 1, sh: 3 * bandsOf(shDegree) });

/** A scene of `count` transparent Gaussians, to be filled by chunks. */
export function blankScene(count: number, shDegree: 0 | 1 | 2 | 3, header: SceneHeader): SplatScene {
  return {
    count, shDegree, header, means: new Float32Array(3 * count), quats: new Float32Array(4 * count), logScales: new Float32Array(3 * count).fill(-5),
    logitOpacities: new Float32Array(count).fill(ABSENT), sh: new Float32Array(3 * bandsOf(shDegree) * count),
  };
}

/** Where most of the opacity is: the weighted median of the means and the radius that holds 4/5 of it; a sample of at most 4,000 rows. */
export function whereabouts(scene: SplatScene): { centre: [number, number, number]; radius: number } {
  const every = Math.max(1, Math.ceil(scene.count / 4000)), rows: number[] = [];
  for (let i = 0; i < scene.count; i += every) if (scene.logitOpacities[i]! > ABSENT && finite(scene.means, i)) rows.push(i);
  if (!rows.length) return { centre: [0, 0, 0], radius: 1 };
  const weights = rows.map((i) => 1 / (1 + Math.exp(-scene.logitOpacities[i]!))), total = weights.reduce((sum, w) => sum + w, 0);
  const quantile = (value: (i: number) => number, share: number): number => {
    const values = Float64Array.from(rows, value), order = Uint32Array.from(rows.keys()).sort((a, b) => values[a]! - values[b]!);
    let sum = 0;
    for (const k of order) if ((sum += weights[k]!) >= share * total) return values[k]!;
    return values[order.at(-1)!]!;
  };
  const centre = [0, 1, 2].map((k) => quantile((i) => scene.means[3 * i + k]!, 0.5)) as [number, number, number];
  const distance = (i: number) => Math.hypot(...[0, 1, 2].map((k) => scene.means[3 * i + k]! - centre[k]!));
  return { centre, radius: quantile(distance, 0.8) || Math.exp(scene.logScales[3 * rows[0]!]!) || 1 };
}

function finite(means: Float32Array, i: number): boolean {
  return Number.isFinite(means[3 * i]! + means[3 * i + 1]! + means[3 * i + 2]!);
}
