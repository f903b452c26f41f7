/** Per-Gaussian numbers that a pass blends in place of colour: heat, the colours of features, likeness to a query. */
import type { View } from "./pose";
import { ABSENT, type SplatScene } from "./scene";
import type { Pca } from "./wire";

/** Three numbers a Gaussian: `values` in the first, or the features' three main directions as colours, the same from every view. */
export function attributeOf(values: Float32Array): Float32Array;
export function attributeOf(values: null, scene: SplatScene, pca: Pca): Float32Array;
export function attributeOf(values: Float32Array | null, scene?: SplatScene, pca?: Pca): Float32Array {
  if (values) {
    const out = new Float32Array(3 * values.length);
    values.forEach((v, i) => (out[3 * i] = v));
    return out;
  }
  const f = scene!.features!, out = new Float32Array(3 * scene!.count);
  for (let k = 0; k < 3; k++) {
    // (q scale + offset - mean) . basis, as one dot product with the quantised numbers.
    const basis = pca!.basis[k]!, weights = Float32Array.from(basis, (b, c) => b * f.scale[c]!), start = basis.reduce((sum, b, c) => sum + b * (f.offset[c]! - pca!.mean[c]!), 0);
    const low = pca!.low[k]!, gain = 1 / Math.max(pca!.high[k]! - low, 1e-30);
    for (let i = 0; i < scene!.count; i++) {
      let sum = start;
      for (let c = 0, at = f.channels * i; c < f.channels; c++) sum += weights[c]! * f.int8[at + c]!;
      out[3 * i + k] = Math.min(Math.max((sum - low) * gain, 0), 1);
    }
  }
  return out;
}

/** The three directions in which the features of a sample of the scene vary most, by opacity, with the range along each: for files, which come without. */
export function pcaOf(scene: SplatScene): Pca {
  const f = scene.features!, C = f.channels, every = Math.max(1, Math.floor(scene.count / 5000)), rows: Float64Array[] = [], weights: number[] = [];
  for (let i = 0; i < scene.count; i += every) {
    rows.push(Float64Array.from({ length: C }, (_, c) => f.int8[C * i + c]! * f.scale[c]! + f.offset[c]!));
    weights.push(1 / (1 + Math.exp(-scene.logitOpacities[i]!)));
  }
  const total = weights.reduce((a, b) => a + b, 0) || 1, mean = Array.from({ length: C }, (_, c) => rows.reduce((sum, r, i) => sum + weights[i]! * r[c]!, 0) / total);
  for (const r of rows) mean.forEach((m, c) => (r[c]! -= m));
  const basis: number[][] = [], low: number[] = [], high: number[] = [];
  for (let k = 0; k < 3; k++) {
    // Power iteration on what the directions before leave.
    let v = mean.map((_, c) => Math.cos(1 + c * (k + 1.7)));
    for (let turn = 0; turn < 30; turn++) {
      const next = new Array<number>(C).fill(0);
      rows.forEach((r, i) => {
        const along = weights[i]! * r.reduce((sum, x, c) => sum + x * v[c]!, 0);
        for (let c = 0; c < C; c++) next[c]! += along * r[c]!;
      });
      for (const b of basis) {
        const along = next.reduce((sum, x, c) => sum + x * b[c]!, 0);
        b.forEach((x, c) => (next[c]! -= along * x));
      }
      const length = Math.hypot(...next);
      v = next.map((x) => (length > 0 ? x / length : 0));
    }
    basis.push(v);
    const along = rows.map((r) => r.reduce((sum, x, c) => sum + x * v[c]!, 0));
    low.push(quantile(along, 0.01));
    high.push(quantile(along, 0.99));
  }
  return { mean, basis, low, high };
}

/** Cosine of each Gaussian's features with the query, from 0 (the rest) to 1 (the most alike): 0 at the median, nothing below. */
export function similarityTo(scene: SplatScene, query: Float32Array): Float32Array {
  const f = scene.features!, out = new Float32Array(scene.count), length = Math.hypot(...query) || 1;
  for (let i = 0; i < scene.count; i++) {
    let dot = 0, own = 0;
    for (let c = 0, at = f.channels * i; c < f.channels; c++) {
      const v = f.int8[at + c]! * f.scale[c]! + f.offset[c]!;
      dot += v * query[c]!;
      own += v * v;
    }
    out[i] = own > 0 ? dot / (Math.sqrt(own) * length) : 0;
  }
  const middle = Math.min(quantile(out, 0.5), 0.9);
  return out.map((v) => Math.min(Math.max((v - middle) / (1 - middle), 0), 1));
}

/** Depths between which most of the scene lies. */
export function depthRange(scene: SplatScene, view: View): [number, number] {
  const { worldToCam: w } = view, every = Math.max(1, Math.floor(scene.count / 20_000)), depths: number[] = [];
  for (let i = 0; i < scene.count; i += every) {
    const z = w[8]! * scene.means[3 * i]! + w[9]! * scene.means[3 * i + 1]! + w[10]! * scene.means[3 * i + 2]! + w[11]!;
    if (z > scene.header.near && scene.logitOpacities[i]! > ABSENT) depths.push(z);
  }
  const low = quantile(depths, 0.02), high = quantile(depths, 0.95);
  return high > low ? [low, high] : [0, 1];
}

export function quantile(values: ArrayLike<number>, share: number): number {
  const every = Math.max(1, Math.floor(values.length / 50_000)), some: number[] = [];
  for (let i = 0; i < values.length; i += every) if (Number.isFinite(values[i])) some.push(values[i]!);
  some.sort((a, b) => a - b);
  return some[Math.min(Math.floor(share * some.length), some.length - 1)] ?? 0;
}
