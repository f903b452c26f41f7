/** What the decoders of splat files share: their error, the arrays that they fill, and the check at the end. */
import { DEFAULT_HEADER, PARTS, widthsOf, type Rows, type SceneHeader, type SplatScene } from "../scene";

/** Anything that is wrong with a file, in one line: file, place, reason and where possible the cure. */
export class BadFile extends Error {
  constructor(readonly file: string, readonly where: string, readonly why: string) {
    super([file, where, why].filter(Boolean).join(": ").replace(/[\p{C}\p{Z}]+/gu, " ").slice(0, 400)); // a file's own words may hold control and direction characters
    this.name = "BadFile";
  }
}

/** A decoded file; `note` says in one line what was left out, else it is null. */
export interface Loaded {
  scene: SplatScene;
  note: string | null;
}

export const SH_C0 = 0.28209479177387814; // f_dc = (colour - 1/2) / SH_C0
const DECODED_MAX = 2 ** 31; // bytes of one scene in a page
const NON_FINITE_MAX = 0.1; // more such rows than this share: the file is damaged, or it is something else

export type Degree = 0 | 1 | 2 | 3;

/** Arrays for n Gaussians; call this only once the file is known to hold as many. */
export function emptyScene(file: string, n: number, degree: Degree, header: SceneHeader = DEFAULT_HEADER): SplatScene {
  const bands = (degree + 1) ** 2, bytes = 4 * n * (11 + 3 * bands);
  if (bytes > DECODED_MAX) throw new BadFile(file, "", `${n} Gaussians of SH degree ${degree} take ${(bytes / 2 ** 30).toFixed(1)} GB, and a page holds 2 GB; open it with: splatkit view`);
  return {
    count: n, shDegree: degree, means: new Float32Array(3 * n), quats: new Float32Array(4 * n), logScales: new Float32Array(3 * n),
    logitOpacities: new Float32Array(n), sh: new Float32Array(3 * bands * n), header: { ...header, name: header.name || file },
  };
}

/** The rows without those that hold a NaN or an infinity; more than a tenth of them refuses the file. */
export function finished(file: string, scene: SplatScene): Loaded {
  const n = scene.count, widths = widthsOf(scene.shDegree);
  if (PARTS.every((name) => allFinite(scene[name]))) return { scene, note: null };
  const bad = new Uint8Array(n);
  for (const name of PARTS) {
    const array = scene[name], width = widths[name];
    for (let row = 0, at = 0; row < n; row++) {
      let sum = 0;
      for (let c = 0; c < width; c++) sum += 0 * array[at++]!;
      if (sum !== 0) bad[row] = 1;
    }
  }
  const dropped = bad.reduce((sum, b) => sum + b, 0);
  if (dropped > NON_FINITE_MAX * n) throw new BadFile(file, `Gaussian ${bad.indexOf(1)}`, `${dropped} of ${n} Gaussians hold a NaN or an infinity`);
  const kept = <A extends Float32Array | Int8Array>(array: A, width: number): A => {
    const out = array.slice(0, width * (n - dropped)) as A;
    for (let row = 0, to = 0; row < n; row++) if (!bad[row]) out.set(array.subarray(row * width, (row + 1) * width) as never, width * to++);
    return out;
  };
  const f = scene.features, rows = Object.fromEntries(PARTS.map((name) => [name, kept(scene[name], widths[name])])) as Rows;
  return {
    scene: {
      ...scene, count: n - dropped, ...rows, ...(f ? { features: { ...f, int8: kept(f.int8, f.channels) } } : {}),
    },
    note: `${dropped} of ${n} Gaussians held a NaN or an infinity and were left out`,
  };
}

function allFinite(array: Float32Array): boolean {
  const whole = array.length & ~3;
  let a = 0, b = 0, c = 0, d = 0; // four sums: no addition waits for the one before
  for (let i = 0; i < whole; i += 4) {
    a += 0 * array[i]!;
    b += 0 * array[i + 1]!;
    c += 0 * array[i + 2]!;
    d += 0 * array[i + 3]!;
  }
  for (let i = whole; i < array.length; i++) a += 0 * array[i]!;
  return a + b + c + d === 0;
}
