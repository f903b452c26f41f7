/** The compressed PLY of PlayCanvas and SuperSplat: 16 bytes a Gaussian, ranges by chunk of 256, optional SH in 8 bits. */
import { degreeOf, grouped, numbered, type Ply, startOf } from "./ply";
import { LOGITS } from "../scene";
import { BadFile, emptyScene, finished, type Loaded, SH_C0 } from "./reading";

const CHUNK = 256;
const PACKED = ["packed_position", "packed_rotation", "packed_scale", "packed_color"];
const xyz = (name: string): string[] => ["x", "y", "z"].map((axis) => `${name}_${axis}`);
const RANGES = [...xyz("min"), ...xyz("max"), ...xyz("min_scale"), ...xyz("max_scale")];
const COLOURS = ["min_r", "min_g", "min_b", "max_r", "max_g", "max_b"];

export function isCompressed(ply: Ply): boolean {
  return ply.elements.some((e) => e.name === "vertex" && e.types.has("packed_position"));
}

export async function readCompressedPly(ply: Ply): Promise<Loaded> {
  const { file } = ply;
  if (ply.ascii || !ply.little) throw new BadFile(file, "format", "a compressed PLY is binary_little_endian");
  const bytes = await ply.source.rest(), element = (name: string) => ply.elements.find((e) => e.name === name);
  const vertex = element("vertex")!, chunk = element("chunk"), sh = element("sh"), n = vertex.count;
  if (!chunk) throw new BadFile(file, "header", "no element chunk: the ranges of the packed numbers are missing");
  /** The numbers of an element whose properties are exactly `names`, in order, all of `type`. */
  const fields = (e: NonNullable<ReturnType<typeof element>>, names: string[], type: string) => {
    if (e.hasList || [...e.types.keys()].join() !== names.join() || [...e.types.values()].some((t) => t !== type)) throw new BadFile(file, `element ${e.name}`, `expected the properties ${names[0]} .. ${names[names.length - 1]} (${names.length}) of type ${type}, found ${[...e.types.keys()].slice(0, 4).join(", ")} (${e.types.size})`);
    const at = startOf(ply, e.name);
    return new DataView(bytes.buffer, bytes.byteOffset + at, e.count * names.length * Number(type[1]));
  };
  const coloured = chunk.types.has("min_r"), ranges = coloured ? [...RANGES, ...COLOURS] : RANGES;
  const limits = fields(chunk, ranges, "f4"), packed = fields(vertex, PACKED, "u4");
  if (chunk.count !== Math.ceil(n / CHUNK)) throw new BadFile(file, "element chunk", `${chunk.count} chunks for ${n} Gaussians; expected ${Math.ceil(n / CHUNK)}, one for each ${CHUNK}`);
  if (sh && sh.count !== n) throw new BadFile(file, "element sh", `${sh.count} rows for ${n} Gaussians`);
  const rest = sh ? grouped(file, sh, "f_rest") : 0, degree = degreeOf(file, rest), rests = sh ? fields(sh, numbered("f_rest", rest), "u1") : null;

  const scene = emptyScene(file, n, degree), bands = (degree + 1) ** 2, low = new Float64Array(9).fill(0), high = new Float64Array(9).fill(1), t = new Float64Array(9);
  for (let row = 0; row < n; row++) {
    if (row % CHUNK === 0) // the chunk's ranges: position, log scale, colour, of which the files keep all lows before all highs
      for (let i = 0; i < ranges.length / 2; i++) {
        const at = 4 * ((row / CHUNK) * ranges.length + 6 * Math.floor(i / 3) + (i % 3));
        low[i] = limits.getFloat32(at, true);
        high[i] = limits.getFloat32(at + 12, true);
      }
    const rotation = packed.getUint32(16 * row + 4, true), color = packed.getUint32(16 * row + 12, true);
    thirds(packed.getUint32(16 * row, true), t, 0);
    thirds(packed.getUint32(16 * row + 8, true), t, 3);
    for (let i = 0; i < 3; i++) t[6 + i] = ((color >>> (24 - 8 * i)) & 255) / 255;
    for (let i = 0; i < 9; i++) t[i] = low[i]! * (1 - t[i]!) + high[i]! * t[i]!;
    for (let i = 0; i < 3; i++) {
      scene.means[3 * row + i] = t[i]!;
      scene.logScales[3 * row + i] = t[3 + i]!;
      scene.sh[3 * bands * row + i] = (t[6 + i]! - 0.5) / SH_C0;
    }
    scene.logitOpacities[row] = LOGITS[color & 255]!;
    // Two bits say which of w, x, y, z is the largest; the others follow in order.
    const largest = rotation >>> 30;
    let sum = 0;
    for (let i = 0, shift = 20; i < 4; i++) {
      if (i === largest) continue;
      const value = (((rotation >>> shift) & 1023) / 1023 - 0.5) * Math.SQRT2;
      scene.quats[4 * row + i] = value;
      sum += value * value;
      shift -= 10;
    }
    scene.quats[4 * row + largest] = Math.sqrt(Math.max(0, 1 - sum));
    for (let i = 0; i < rest; i++) scene.sh[3 * (bands * row + 1 + (i % (bands - 1))) + Math.floor(i / (bands - 1))] = COEFFICIENTS[rests!.getUint8(rest * row + i)]!;
  }
  return finished(file, scene);
}

/** 11, 10 and 11 bits, each as a share of its range. */
function thirds(v: number, out: Float64Array, at: number): void {
  out[at] = (v >>> 21) / 2047;
  out[at + 1] = ((v >>> 11) & 1023) / 1023;
  out[at + 2] = (v & 2047) / 2047;
}

const COEFFICIENTS = Float64Array.from({ length: 256 }, (_, q) => 8 * ((q === 0 ? 0 : q === 255 ? 1 : (q + 0.5) / 256) - 0.5));
