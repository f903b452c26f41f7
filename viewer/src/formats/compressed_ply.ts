/** The compressed PLY of PlayCanvas and SuperSplat: 16 bytes a Gaussian, ranges by chunk of 256, optional SH in 8 bits. */
import { degreeOf, grouped, numbered, type Ply, startOf } from "./ply";
import { BadFile, emptyScene, finished, type Loaded, logitOfByte, SH_C0 } from "./reading";

const CHUNK = 256;
const PACKED = ["packed_position", "packed_rotation", "packed_scale", "packed_color"];
const xyz = (name: string): string[] => ["x", "y", "z"].map((axis) => `${name}_${axis}`);
const RANGES = [...xyz("min"), ...xyz("max"), ...xyz("min_scale"), ...xyz("max_scale")];
const COLOURS = ["min_r", "min_g", "min_b", "max_r", "max_g", "max_b"];

export function isCompressed(ply: Ply): boolean {
  return ply.elements.some((e) => e.name === "vertex" && e.types.has("packed_position"));
}

export function readCompressedPly(ply: Ply): Loaded {
  const { file, bytes } = ply;
  if (ply.ascii || !ply.little) throw new BadFile(file, "format", "a compressed PLY is binary_little_endian");
  const element = (name: string) => ply.elements.find((e) => e.name === name);
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

  const scene = emptyScene(file, n, degree), bands = (degree + 1) ** 2;
  const limit = (row: number, k: number) => limits.getFloat32(4 * (Math.floor(row / CHUNK) * ranges.length + k), true);
  const between = (row: number, low: number, high: number, t: number) => limit(row, low) * (1 - t) + limit(row, high) * t;
  const thirds = (v: number): [number, number, number] => [(v >>> 21) / 2047, ((v >>> 11) & 1023) / 1023, (v & 2047) / 2047];
  for (let row = 0; row < n; row++) {
    const [position, rotation, scale, color] = [0, 4, 8, 12].map((at) => packed.getUint32(16 * row + at, true)) as [number, number, number, number];
    thirds(position).forEach((t, i) => (scene.means[3 * row + i] = between(row, i, 3 + i, t)));
    thirds(scale).forEach((t, i) => (scene.logScales[3 * row + i] = between(row, 6 + i, 9 + i, t)));
    // Two bits say which of w, x, y, z is the largest; the others follow in order.
    const largest = rotation >>> 30, others = [20, 10, 0].map((shift) => (((rotation >>> shift) & 1023) / 1023 - 0.5) * Math.SQRT2);
    const missing = Math.sqrt(Math.max(0, 1 - others.reduce((sum, v) => sum + v * v, 0)));
    for (let i = 0, next = 0; i < 4; i++) scene.quats[4 * row + i] = i === largest ? missing : others[next++]!;
    for (let i = 0; i < 3; i++) {
      const t = ((color >>> (24 - 8 * i)) & 255) / 255;
      scene.sh[3 * bands * row + i] = ((coloured ? between(row, 12 + i, 15 + i, t) : t) - 0.5) / SH_C0;
    }
    scene.logitOpacities[row] = logitOfByte(color & 255);
    for (let i = 0; i < rest; i++) {
      const q = rests!.getUint8(rest * row + i), t = q === 0 ? 0 : q === 255 ? 1 : (q + 0.5) / 256;
      scene.sh[3 * (bands * row + 1 + (i % (bands - 1))) + Math.floor(i / (bands - 1))] = 8 * (t - 0.5);
    }
  }
  return finished(file, scene);
}
