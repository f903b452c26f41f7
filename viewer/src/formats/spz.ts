/** SPZ of Niantic, versions 2 and 3 (gzip). Axes are turned from right-up-back to the right-down-front of the PLY form. */
import { DEFAULT_HEADER, LOGITS } from "../scene";
import { BadFile, type Degree, emptyScene, finished, type Loaded } from "./reading";
import { joined } from "./source";

const HEADER = 16;
const DEFLATE_MAX = 1032; // bytes out of one byte in, at the very most
const COLOR_SCALE = 0.15;
const ANTIALIASED = 1, EXTENSIONS = 2; // flags
// What turning y and z does to the coefficients of bands 1 to 3.
const SH_SIGN = [-1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1];

export const isSpz4 = (bytes: Uint8Array): boolean => bytes.length >= 4 && bytes[0] === 0x4e && bytes[1] === 0x47 && bytes[2] === 0x53 && bytes[3] === 0x50; // NGSP, not gzipped
export const isGzip = (bytes: Uint8Array): boolean => bytes.length >= 2 && bytes[0] === 0x1f && bytes[1] === 0x8b;

export async function readSpz(file: string, bytes: Uint8Array): Promise<Loaded> {
  if (isSpz4(bytes)) throw new BadFile(file, "version", "SPZ version 4 (zstd) is not read here; convert it first, to a .ply or an SPZ of version 3");
  if (!isGzip(bytes)) throw new BadFile(file, "byte 0", bytes.length ? "not an SPZ file: no gzip stream" : "the file is empty");
  const unpacked = await gunzip(file, bytes, (head) => {
    const view = new DataView(head.buffer, head.byteOffset, HEADER), version = view.getUint32(4, true), n = view.getUint32(8, true), degree = view.getUint8(12);
    if (view.getUint32(0, true) !== 0x5053474e) throw new BadFile(file, "magic", "not an SPZ file: a gzip stream of something else");
    if (version !== 2 && version !== 3) throw new BadFile(file, "version", `SPZ version ${version}; versions 2 and 3 are read here`);
    if (degree > 3) throw new BadFile(file, "header", `SH degree ${degree}; expected 0 to 3`);
    if (view.getUint8(13) > 24) throw new BadFile(file, "header", `${view.getUint8(13)} fractional bits; a position has 24`);
    const size = HEADER + n * (9 + 1 + 3 + 3 + (version === 2 ? 3 : 4) + 3 * ((degree + 1) ** 2 - 1));
    if (size > DEFLATE_MAX * bytes.length) throw new BadFile(file, "header", `${n} Gaussians cannot be in a file of ${bytes.length} bytes`);
    return { size, more: (view.getUint8(14) & EXTENSIONS) !== 0 };
  });
  const view = new DataView(unpacked.buffer, unpacked.byteOffset, unpacked.length), n = view.getUint32(8, true), degree = view.getUint8(12) as Degree, bands = (degree + 1) ** 2;
  const small = view.getUint32(4, true) === 3, step = 2 ** -view.getUint8(13);
  const scene = emptyScene(file, n, degree, { ...DEFAULT_HEADER, antialias: (view.getUint8(14) & ANTIALIASED) !== 0 });
  const positions = HEADER, alphas = positions + 9 * n, colors = alphas + n, scales = colors + 3 * n, rotations = scales + 3 * n, rests = rotations + (small ? 4 : 3) * n;
  const q = new Float64Array(4);
  for (let row = 0; row < n; row++) {
    for (let i = 0; i < 3; i++) {
      const at = positions + 9 * row + 3 * i, fixed = ((unpacked[at]! << 8) | (unpacked[at + 1]! << 16) | (unpacked[at + 2]! << 24)) >> 8;
      scene.means[3 * row + i] = (i ? -1 : 1) * fixed * step;
      scene.logScales[3 * row + i] = unpacked[scales + 3 * row + i]! / 16 - 10;
      scene.sh[3 * bands * row + i] = ((unpacked[colors + 3 * row + i]! / 255 - 0.5) / COLOR_SCALE);
    }
    scene.logitOpacities[row] = LOGITS[unpacked[alphas + row]!]!;
    if (small) smallestThree(view.getUint32(rotations + 4 * row, true), q);
    else firstThree(unpacked, rotations + 3 * row, q);
    scene.quats.set([q[3]!, q[0]!, -q[1]!, -q[2]!], 4 * row);
    for (let k = 0; k < bands - 1; k++)
      for (let c = 0; c < 3; c++) scene.sh[3 * (bands * row + 1 + k) + c] = (SH_SIGN[k]! * (unpacked[rests + 3 * ((bands - 1) * row + k) + c]! - 128)) / 128;
  }
  return finished(file, scene);
}

/** x, y, z in 8 bits each; w is the positive rest. */
function firstThree(bytes: Uint8Array, at: number, q: Float64Array): void {
  for (let i = 0; i < 3; i++) q[i] = bytes[at + i]! / 127.5 - 1;
  q[3] = Math.sqrt(Math.max(0, 1 - q[0]! ** 2 - q[1]! ** 2 - q[2]! ** 2));
}

/** Which of x, y, z, w is the largest in the top two bits; the others, last one lowest, in sign and 9 bits of size. */
function smallestThree(packed: number, q: Float64Array): void {
  const largest = packed >>> 30;
  let sum = 0;
  for (let i = 3; i >= 0; i--) {
    if (i === largest) continue;
    q[i] = ((packed & 512 ? -1 : 1) * Math.SQRT1_2 * (packed & 511)) / 511;
    sum += q[i]! ** 2;
    packed >>>= 10;
  }
  q[largest] = Math.sqrt(Math.max(0, 1 - sum));
}

/** Unpacks as many bytes as the header asks for, and never more than one piece beyond. */
async function gunzip(file: string, bytes: Uint8Array, sizeOf: (head: Uint8Array) => { size: number; more: boolean }): Promise<Uint8Array> {
  const reader = new Blob([bytes as Uint8Array<ArrayBuffer>]).stream().pipeThrough(new DecompressionStream("gzip")).getReader(), pieces: Uint8Array[] = [];
  let held = 0, wanted: { size: number; more: boolean } | null = null;
  for (;;) {
    let next;
    try {
      next = await reader.read();
    } catch {
      throw new BadFile(file, `byte ${bytes.length}`, "the gzip stream is damaged or cut");
    }
    if (next.done) break;
    pieces.push(next.value);
    held += next.value.length;
    try {
      if (!wanted && held >= HEADER) wanted = sizeOf(joined(pieces, HEADER));
      if (wanted && held > wanted.size && !wanted.more) throw new BadFile(file, "header", `asks for ${wanted.size} bytes of data, but more follow`);
    } catch (why) {
      reader.cancel().catch(() => undefined);
      throw why;
    }
    if (wanted && held > wanted.size) { // extensions: not read
      reader.cancel().catch(() => undefined);
      break;
    }
  }
  if (!wanted || held < wanted.size) throw new BadFile(file, `byte ${held} of the unpacked data`, `the file ends early: ${wanted ? wanted.size : HEADER} bytes expected`);
  return joined(pieces, wanted.size);
}
