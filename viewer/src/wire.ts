/** What the server sends (splatkit/wire.py): manifests, chunks of Gaussians in planes, messages of the socket. Anything that does not fit is refused in one line. */
import { COUNT_MAX, DEFAULT_HEADER, LOGITS, PARTS, bandsOf, blankScene, widthsOf, type SceneHeader, type SplatScene } from "./scene";

export const PLANES = ["core", "sh", "features", "float32", "heat"] as const;
export type Plane = (typeof PLANES)[number];

export interface CaptureCamera {
  name: string;
  width: number;
  height: number;
  world_to_cam: number[];
  K: number[];
  photo: number | null;
  loss: number | null;
}

export interface Pca {
  mean: number[];
  basis: number[][];
  low: number[];
  high: number[];
}

export interface Manifest {
  id: string;
  name: string;
  count: number;
  sh_degree: 0 | 1 | 2 | 3;
  chunk_size: number;
  header: SceneHeader;
  step: number | null;
  live: boolean;
  revision: number;
  chunks: { count: number; version: number }[];
  features: { channels: number; pca: Pca | null } | null;
  background: [number, number, number];
  cameras: CaptureCamera[];
  heat: string[];
}

export interface ChunkMessage {
  frame: number;
  chunk: number;
  version: number;
  revision: number;
  plane: Plane;
  data: Uint8Array;
}

export class BadData extends Error {}

function refuse(what: string, found: unknown, expected: string): never {
  throw new BadData(`${what}: ${String(JSON.stringify(found)).slice(0, 60)}; expected ${expected}`);
}

const whole = (x: unknown, low: number, high: number): x is number => Number.isInteger(x) && (x as number) >= low && (x as number) <= high;
const numbers = (x: unknown, n: number): x is number[] => Array.isArray(x) && x.length === n && x.every((v) => typeof v === "number" && Number.isFinite(v));
const record = (x: unknown): x is Record<string, unknown> => typeof x === "object" && x !== null && !Array.isArray(x);
const text = (x: unknown, otherwise: string): string => (typeof x === "string" ? x.slice(0, 300) : otherwise);

export function readManifest(json: unknown): Manifest {
  if (!record(json) || json.format !== "splatkit-scene") refuse("the scene's manifest", json, "an object of format splatkit-scene");
  if (json.version !== 1) refuse("the manifest's version", json.version, "1; this page is older than the server");
  const { count, sh_degree, chunk_size } = json;
  if (!whole(count, 0, COUNT_MAX)) refuse("manifest.count", count, `a whole number up to ${COUNT_MAX}`);
  if (!whole(sh_degree, 0, 3)) refuse("manifest.sh_degree", sh_degree, "0 to 3");
  if (!whole(chunk_size, 1, COUNT_MAX)) refuse("manifest.chunk_size", chunk_size, "a positive whole number");
  const chunks = json.chunks;
  if (!Array.isArray(chunks) || chunks.length !== Math.ceil(count / chunk_size)) refuse("manifest.chunks", chunks, `${Math.ceil(count / chunk_size)} chunks`);
  chunks.forEach((c: unknown, k) => {
    const n = Math.min(chunk_size, count - k * chunk_size);
    if (!record(c) || c.count !== n || !whole(c.version, 0, 2 ** 32 - 1)) refuse(`manifest.chunks[${k}]`, c, `a count of ${n} and a version`);
  });
  const cameras = Array.isArray(json.cameras) ? json.cameras.slice(0, 20_000).map(readCamera) : [];
  return {
    id: text(json.id, "0"), name: text(json.name, "scene"), count, sh_degree: sh_degree as 0 | 1 | 2 | 3, chunk_size, header: readHeader(json.header, text(json.name, "")),
    step: whole(json.step, 0, 2 ** 40) ? json.step : null, live: json.live === true, revision: whole(json.revision, 0, 2 ** 40) ? json.revision : 0,
    background: numbers(json.background, 3) ? (json.background as [number, number, number]) : [0, 0, 0],
    chunks: chunks as Manifest["chunks"], features: readFeatures(json.features), cameras,
    heat: Array.isArray(json.heat) ? json.heat.filter((h): h is string => typeof h === "string").slice(0, 16) : [],
  };
}

export function readHeader(json: unknown, name: string): SceneHeader {
  const out: SceneHeader = { ...DEFAULT_HEADER, name };
  if (!record(json)) return out;
  const ranges: [keyof SceneHeader, number, number][] = [["near", 1e-30, 1e30], ["blur_px2", 0, 1e6], ["alpha_min", 0, 1], ["alpha_max", 0, 1], ["transmittance_min", 0, 1], ["fov_margin", 0, Infinity]];
  for (const [key, low, high] of ranges) {
    const value = key === "fov_margin" && json[key] === "inf" ? Infinity : json[key];
    if (value === undefined) continue;
    if (typeof value !== "number" || !(value >= low && value <= high)) refuse(`header.${key}`, value, `a number from ${low} to ${high}`);
    (out as unknown as Record<string, number>)[key] = value;
  }
  out.antialias = json.antialias === true;
  if (numbers(json.up, 3) && Math.hypot(...json.up) > 1e-6) out.up = json.up as [number, number, number];
  if (whole(json.step, 0, 2 ** 40)) out.step = json.step;
  return out;
}

function readCamera(json: unknown, i: number): CaptureCamera {
  if (!record(json)) refuse(`cameras[${i}]`, json, "an object");
  const { width, height, world_to_cam, K } = json;
  if (!whole(width, 1, 65_536) || !whole(height, 1, 65_536)) refuse(`cameras[${i}]`, [width, height], "a width and a height");
  if (!numbers(world_to_cam, 16)) refuse(`cameras[${i}].world_to_cam`, world_to_cam, "16 finite numbers");
  if (!numbers(K, 9) || !(K[0]! > 0 && K[4]! > 0)) refuse(`cameras[${i}].K`, K, "9 finite numbers, focal lengths above 0");
  return { name: text(json.name, `camera ${i}`), width, height, world_to_cam, K, photo: whole(json.photo, 0, 2 ** 31) ? json.photo : null,
    loss: typeof json.loss === "number" && Number.isFinite(json.loss) ? json.loss : null };
}

function readFeatures(json: unknown): Manifest["features"] {
  if (!record(json)) return null;
  const channels = json.channels;
  if (!whole(channels, 1, 4096)) refuse("features.channels", channels, "1 to 4096");
  const p = json.pca;
  const fits = record(p) && numbers(p.mean, channels) && Array.isArray(p.basis) && p.basis.length === 3 && p.basis.every((b) => numbers(b, channels)) && numbers(p.low, 3) && numbers(p.high, 3);
  return { channels, pca: fits ? (p as unknown as Pca) : null };
}

/** A plane of a chunk, checked against what it says of itself; little-endian. */
class Reader {
  private at = 8;
  private readonly view: DataView;
  readonly count: number;

  constructor(private readonly bytes: Uint8Array, magic: string, rows: number) {
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const found = bytes.byteLength >= 8 ? String.fromCharCode(...bytes.subarray(0, 4)) : "";
    if (found !== magic) refuse("a chunk begins with", found, magic);
    this.count = this.view.getUint32(4, true);
    if (this.count !== rows) refuse("a chunk's rows", this.count, `${rows} as in the manifest`);
  }
  u32(): number {
    this.at += 4;
    if (this.at > this.bytes.byteLength) refuse("a chunk's bytes", this.bytes.byteLength, "more");
    return this.view.getUint32(this.at - 4, true);
  }
  raw(n: number): Uint8Array {
    if (this.at + n > this.bytes.byteLength) refuse("a chunk's bytes", this.bytes.byteLength, `${this.at + n} or more`);
    this.at += n;
    return this.bytes.subarray(this.at - n, this.at);
  }
  floats(n: number): Float32Array {
    const raw = this.raw(4 * n), out = new Float32Array(n);
    new Uint8Array(out.buffer).set(raw);
    for (let i = 0; i < n; i++) if (!Number.isFinite(out[i])) refuse("a chunk's number", String(out[i]), "a finite one");
    return out;
  }
  end(): void {
    if (this.at !== this.bytes.byteLength) refuse("a chunk's bytes", this.bytes.byteLength, `${this.at}`);
  }
}

/** Writes a chunk of `rows` Gaussians that begins at row `first` into the scene. Nothing is written when the chunk does not fit. */
export function writeChunk(scene: SplatScene, plane: Plane, first: number, rows: number, bytes: Uint8Array): void {
  if (plane === "core") writeCore(scene, first, rows, bytes);
  else if (plane === "sh") writeSh(scene, first, rows, bytes);
  else if (plane === "float32") writeFloat32(scene, first, rows, bytes);
  else if (plane === "features") writeFeatures(scene, first, rows, bytes);
}

const ROTATION = Float64Array.from({ length: 1024 }, (_, q) => ((q / 1023) * 2 - 1) / Math.SQRT2);

function writeCore(scene: SplatScene, first: number, rows: number, bytes: Uint8Array): void {
  const r = new Reader(bytes, "SKC1", rows), range = r.floats(20), raw = r.raw(17 * rows), stride = 3 * bandsOf(scene.shDegree);
  r.end();
  const { means, quats, logScales, logitOpacities, sh } = scene, step = (k: number, most: number) => (range[k + 3]! - range[k]!) / most;
  const [x, y, z] = [step(0, 65_535), step(1, 65_535), step(2, 65_535)], [sx, sy, sz] = [step(6, 255), step(7, 255), step(8, 255)], [red, green, blue] = [step(12, 255), step(13, 255), step(14, 255)];
  for (let i = 0, at = 0; i < rows; i++, at += 17) {
    const row = first + i, three = 3 * row, four = 4 * row, color = stride * row;
    means[three] = range[0]! + (raw[at]! | (raw[at + 1]! << 8)) * x;
    means[three + 1] = range[1]! + (raw[at + 2]! | (raw[at + 3]! << 8)) * y;
    means[three + 2] = range[2]! + (raw[at + 4]! | (raw[at + 5]! << 8)) * z;
    logScales[three] = range[6]! + raw[at + 6]! * sx;
    logScales[three + 1] = range[7]! + raw[at + 7]! * sy;
    logScales[three + 2] = range[8]! + raw[at + 8]! * sz;
    // 2 bits: which is the largest; then 10 for each of the others.
    const [q0, q1, q2, q3] = [raw[at + 9]!, raw[at + 10]!, raw[at + 11]!, raw[at + 12]!], largest = q3 >>> 6;
    const a = ROTATION[((q3 & 63) << 4) | (q2 >>> 4)]!, b = ROTATION[((q2 & 15) << 6) | (q1 >>> 2)]!, c = ROTATION[((q1 & 3) << 8) | q0]!, d = Math.sqrt(Math.max(1 - a * a - b * b - c * c, 0));
    quats[four] = largest === 0 ? d : a;
    quats[four + 1] = largest === 0 ? a : largest === 1 ? d : b;
    quats[four + 2] = largest < 2 ? b : largest === 2 ? d : c;
    quats[four + 3] = largest === 3 ? d : c;
    logitOpacities[row] = LOGITS[raw[at + 13]!]!;
    sh[color] = range[12]! + raw[at + 14]! * red;
    sh[color + 1] = range[13]! + raw[at + 15]! * green;
    sh[color + 2] = range[14]! + raw[at + 16]! * blue;
  }
}

function writeSh(scene: SplatScene, first: number, rows: number, bytes: Uint8Array): void {
  const r = new Reader(bytes, "SKH1", rows), above = bandsOf(scene.shDegree) - 1, found = r.u32();
  if (found !== above) refuse("a chunk's SH coefficients", found, `${above} as in the manifest`);
  const low = r.floats(3 * above), high = r.floats(3 * above), q = r.raw(3 * above * rows);
  r.end();
  const step = low.map((v, k) => (high[k]! - v) / 255), stride = 3 * (above + 1), n = 3 * above;
  for (let i = 0; i < rows; i++) for (let k = 0; k < n; k++) scene.sh[stride * (first + i) + 3 + k] = low[k]! + q[n * i + k]! * step[k]!;
}

function writeFloat32(scene: SplatScene, first: number, rows: number, bytes: Uint8Array): void {
  const r = new Reader(bytes, "SKX1", rows), bands = bandsOf(scene.shDegree), found = r.u32();
  if (found !== bands) refuse("a chunk's SH coefficients", found, `${bands} as in the manifest`);
  const widths = widthsOf(scene.shDegree), parts = PARTS.map((name) => r.floats(widths[name] * rows));
  r.end();
  PARTS.forEach((name, k) => scene[name].set(parts[k]!, first * widths[name]));
}

/** Every chunk has a scale of its own: values are brought to the scale of the first chunk that came, which then widens where it must. */
function writeFeatures(scene: SplatScene, first: number, rows: number, bytes: Uint8Array): void {
  const r = new Reader(bytes, "SKF1", rows), channels = r.u32();
  if (!whole(channels, 1, 4096) || channels * scene.count > 2 ** 31) refuse("a chunk's feature channels", channels, "1 to 4096, in all at most 2 GB");
  if (scene.features && scene.features.channels !== channels) refuse("a chunk's feature channels", channels, `${scene.features.channels}`);
  const scale = r.floats(channels), offset = r.floats(channels), raw = r.raw(channels * rows);
  r.end();
  const values = new Int8Array(raw.buffer, raw.byteOffset, raw.length);
  const f = (scene.features ??= { channels, int8: new Int8Array(channels * scene.count), scale: scale.slice(), offset: offset.slice() });
  for (let c = 0; c < channels; c++) {
    const low = Math.min(f.offset[c]! - 127 * f.scale[c]!, offset[c]! - 127 * scale[c]!), high = Math.max(f.offset[c]! + 127 * f.scale[c]!, offset[c]! + 127 * scale[c]!);
    const newScale = (high - low) / 254, newOffset = (high + low) / 2;
    if (newScale > f.scale[c]! * (1 + 1e-6)) {
      for (let i = c; i < f.int8.length; i += channels) f.int8[i] = Math.round((f.int8[i]! * f.scale[c]! + f.offset[c]! - newOffset) / newScale);
      [f.scale[c], f.offset[c]] = [newScale, newOffset];
    }
    const gain = f.scale[c] ? scale[c]! / f.scale[c]! : 0, shift = f.scale[c] ? (offset[c]! - f.offset[c]!) / f.scale[c]! : 0;
    for (let i = 0; i < rows; i++) f.int8[channels * (first + i) + c] = Math.round(values[channels * i + c]! * gain + shift);
  }
}

/** Values of one heat channel of a chunk. */
export function readHeat(rows: number, bytes: Uint8Array): { channels: number; values: Float32Array } {
  const r = new Reader(bytes, "SKT1", rows), channels = r.u32();
  if (!whole(channels, 0, 16)) refuse("a chunk's heat channels", channels, "at most 16");
  const low = r.floats(channels), high = r.floats(channels), q = r.raw(channels * rows);
  r.end();
  return { channels, values: Float32Array.from(q, (v, i) => low[i % channels]! + ((high[i % channels]! - low[i % channels]!) * v) / 255) };
}

/** A binary message of the socket. */
export function readMessage(buffer: ArrayBuffer): ChunkMessage {
  if (buffer.byteLength < 24) refuse("a message's bytes", buffer.byteLength, "24 or more");
  const view = new DataView(buffer), magic = String.fromCharCode(...new Uint8Array(buffer, 0, 4)), plane = PLANES[view.getUint8(20)];
  if (magic !== "SKM1" || !plane) refuse("a message", [magic, view.getUint8(20)], "SKM1 and a plane that this page knows");
  return { frame: view.getUint32(4, true), chunk: view.getUint32(8, true), version: view.getUint32(12, true), revision: view.getUint32(16, true), plane, data: new Uint8Array(buffer, 24) };
}

/** What an exported page carries: u32 length and manifest, then u32 length and bytes of core and sh for each chunk. */
export function readContainer(bytes: Uint8Array): { manifest: Manifest; scene: SplatScene } {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 0;
  const part = (): Uint8Array => {
    if (at + 4 > bytes.byteLength || at + 4 + view.getUint32(at, true) > bytes.byteLength) refuse("the scene in this page", bytes.byteLength, "more bytes: the file is cut off");
    const from = at + 4;
    at = from + view.getUint32(at, true);
    return bytes.subarray(from, at);
  };
  let json: unknown;
  try {
    json = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(part()));
  } catch (why) {
    throw why instanceof BadData ? why : new BadData("the manifest in this page is no JSON");
  }
  const manifest = readManifest(json);
  if (bytes.byteLength < 17 * manifest.count) refuse("the scene in this page", bytes.byteLength, `17 bytes or more for each of ${manifest.count} Gaussians`);
  const scene = blankScene(manifest.count, manifest.sh_degree, manifest.header);
  manifest.chunks.forEach((chunk, k) => {
    const first = k * manifest.chunk_size;
    writeChunk(scene, "core", first, chunk.count, part());
    const sh = part();
    if (manifest.sh_degree > 0) writeChunk(scene, "sh", first, chunk.count, sh);
  });
  if (at !== bytes.byteLength) refuse("the scene in this page", bytes.byteLength, `${at} bytes`);
  return { manifest, scene };
}
