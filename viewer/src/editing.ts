/** Which Gaussians are shown: deletions with undo and redo, a crop box over them, and the PLY of what is left. */
import type { Box } from "./overlay";
import { DEFAULT_HEADER, bandsOf, type SplatScene } from "./scene";

export class Edits {
  private deleted = new Uint8Array(0);
  private done: Uint32Array[] = []; // rows of each deletion
  private undone: Uint32Array[] = [];
  crop: Box | null = null; // shown as if all outside were deleted

  reset(count: number): void {
    [this.deleted, this.done, this.undone, this.crop] = [new Uint8Array(count), [], [], null];
  }
  get count(): number {
    return this.done.reduce((sum, rows) => sum + rows.length, 0);
  }
  get canUndo(): boolean {
    return this.done.length > 0;
  }
  get canRedo(): boolean {
    return this.undone.length > 0;
  }

  /** Deletes the rows that are shown and chosen; gives how many. */
  remove(chosen: (row: number) => boolean): number {
    const rows: number[] = [];
    for (let i = 0; i < this.deleted.length; i++) if (!this.deleted[i] && chosen(i)) rows.push(i);
    if (!rows.length) return 0;
    for (const i of rows) this.deleted[i] = 1;
    this.done.push(Uint32Array.from(rows));
    this.undone = [];
    return rows.length;
  }
  undo(): void {
    const rows = this.done.pop();
    if (!rows) return;
    for (const i of rows) this.deleted[i] = 0;
    this.undone.push(rows);
  }
  redo(): void {
    const rows = this.undone.pop();
    if (!rows) return;
    for (const i of rows) this.deleted[i] = 1;
    this.done.push(rows);
  }

  /** One byte a row, or null where every row is shown. */
  visible(scene: SplatScene): Uint8Array | null {
    if (!this.done.length && !this.crop) return null;
    const out = new Uint8Array(scene.count);
    for (let i = 0; i < scene.count; i++) out[i] = this.deleted[i] || (this.crop && !inside(this.crop, scene.means, i)) ? 0 : 1;
    return out;
  }
}

export function inside(box: Box, means: Float32Array, row: number): boolean {
  for (let k = 0; k < 3; k++) {
    const v = means[3 * row + k]!;
    if (!(v >= box.low[k]! && v <= box.high[k]!)) return false;
  }
  return true;
}

/** The box of all rows but the outermost thousandth on every side. */
export function boxOf(scene: SplatScene): Box {
  const low = [0, 0, 0], high = [0, 0, 0], every = Math.max(1, Math.floor(scene.count / 100_000));
  for (let k = 0; k < 3; k++) {
    const values: number[] = [];
    for (let i = 0; i < scene.count; i += every) if (Number.isFinite(scene.means[3 * i + k])) values.push(scene.means[3 * i + k]!);
    values.sort((a, b) => a - b);
    const cut = Math.floor(values.length / 1000);
    [low[k], high[k]] = [values[cut] ?? -1, values[values.length - 1 - cut] ?? 1];
  }
  return { low: low as Box["low"], high: high as Box["high"] };
}

/** The rows that are shown, as splatkit's own PLY: every viewer reads the columns, splatkit also how to draw them. */
export function toPly(scene: SplatScene, visible: Uint8Array | null): Blob {
  const bands = bandsOf(scene.shDegree), rest = 3 * (bands - 1), f = scene.features;
  const many = (name: string, n: number) => Array.from({ length: n }, (_, i) => `${name}_${i}`);
  const names = ["x", "y", "z", "nx", "ny", "nz", ...many("f_dc", 3), ...many("f_rest", rest), "opacity", ...many("scale", 3), ...many("rot", 4), ...many("feat", f?.channels ?? 0)];
  const rows: number[] = [];
  for (let i = 0; i < scene.count; i++) if (!visible || visible[i]) rows.push(i);
  const settings: Record<string, number | boolean | string> = {};
  for (const key of ["near", "blur_px2", "antialias", "alpha_min", "alpha_max", "transmittance_min", "fov_margin"] as const) if (scene.header[key] !== DEFAULT_HEADER[key]) settings[key] = scene.header[key] === Infinity ? "inf" : scene.header[key];
  const header = { settings, up: scene.header.up, metric: false, source: "", step: scene.header.step ?? 0 };
  const ascii = JSON.stringify(header).replace(/[^\x20-\x7e]/g, "?");
  const text = ["ply", "format binary_little_endian 1.0", `comment splatkit ${ascii}`, ...(scene.header.antialias ? ["comment SplatRenderMode: mip"] : []),
    `element vertex ${rows.length}`, ...names.map((n) => `property float ${n}`), "end_header\n"].join("\n");
  const parts: BlobPart[] = [text], atOnce = 16_384, width = names.length;
  for (let start = 0; start < rows.length; start += atOnce) {
    const some = rows.slice(start, start + atOnce), out = new DataView(new ArrayBuffer(4 * width * some.length));
    some.forEach((row, r) => {
      let at = 4 * width * r;
      const put = (v: number) => {
        out.setFloat32(at, v, true);
        at += 4;
      };
      for (let k = 0; k < 3; k++) put(scene.means[3 * row + k]!);
      at += 12;
      for (let k = 0; k < 3; k++) put(scene.sh[3 * bands * row + k]!);
      for (let c = 0; c < 3; c++) for (let k = 1; k < bands; k++) put(scene.sh[3 * (bands * row + k) + c]!);
      put(scene.logitOpacities[row]!);
      for (let k = 0; k < 3; k++) put(scene.logScales[3 * row + k]!);
      for (let k = 0; k < 4; k++) put(scene.quats[4 * row + k]!);
      if (f) for (let k = 0; k < f.channels; k++) put(f.int8[f.channels * row + k]! * f.scale[k]! + f.offset[k]!);
    });
    parts.push(out.buffer as ArrayBuffer);
  }
  return new Blob(parts, { type: "application/octet-stream" });
}
