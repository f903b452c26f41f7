/** PLY in the layout of Kerbl et al. 2023 (INRIA): any order and type of properties, degrees 0 to 3, ASCII and both byte orders. */
import { DEFAULT_HEADER, type SceneHeader } from "../scene";
import { headerOfJson } from "./header";
import { BadFile, type Degree, emptyScene, finished, type Loaded } from "./reading";
import type { Source } from "./source";

const HEADER_MAX = 64 * 1024; // bytes
const ROWS_AT_ONCE = 1024; // column after column within so many rows: they stay in the cache

type Type = "i1" | "u1" | "i2" | "u2" | "i4" | "u4" | "f4" | "f8";
const TYPES: Record<string, Type> = {
  char: "i1", int8: "i1", uchar: "u1", uint8: "u1", short: "i2", int16: "i2", ushort: "u2", uint16: "u2",
  int: "i4", int32: "i4", uint: "u4", uint32: "u4", float: "f4", float32: "f4", double: "f8", float64: "f8",
};
const READ: Record<Type, (v: DataView, at: number, little: boolean) => number> = {
  i1: (v, at) => v.getInt8(at), u1: (v, at) => v.getUint8(at), i2: (v, at, e) => v.getInt16(at, e), u2: (v, at, e) => v.getUint16(at, e),
  i4: (v, at, e) => v.getInt32(at, e), u4: (v, at, e) => v.getUint32(at, e), f4: (v, at, e) => v.getFloat32(at, e), f8: (v, at, e) => v.getFloat64(at, e),
};

interface Element {
  name: string;
  count: number;
  types: Map<string, Type>; // of a list, the type of its length
  hasList: boolean;
}

/** A PLY file whose header was read and whose data are known to be there. */
export interface Ply {
  file: string;
  source: Source; // from the file's beginning
  ascii: boolean;
  little: boolean;
  elements: Element[];
  comments: string[];
  start: number; // of the data
}

const bytesOf = (e: Element): number => [...e.types.values()].reduce((sum, t) => sum + Number(t[1]), 0);

export function isPly(bytes: Uint8Array): boolean {
  return latin1(bytes.subarray(0, 4)) === "ply\n" || latin1(bytes.subarray(0, 5)) === "ply\r\n";
}

/** Reads the header and checks that the data it asks for can be there. */
export async function openPly(source: Source): Promise<Ply> {
  const { name: file, size } = source, bytes = await source.peek(HEADER_MAX);
  if (!isPly(bytes)) throw new BadFile(file, "byte 0", bytes.length ? "not a PLY file" : "the file is empty");
  const head = latin1(bytes), end = /\nend_header[ \t]*\r?\n/.exec(head);
  if (!end) throw new BadFile(file, "header", `no end_header line in the first ${head.length} bytes`);
  let order = "";
  const elements: Element[] = [], comments: string[] = [];
  head.slice(0, end.index).split("\n").slice(1).forEach((line, i) => {
    const where = `line ${i + 2}`, words = line.trim().split(/\s+/), last = elements[elements.length - 1];
    const [kind, a = "", b = ""] = words;
    if (kind === "comment" || kind === "obj_info") comments.push(line.trim().slice(kind.length + 1));
    else if (kind === "format" && !order && words.length === 3 && b === "1.0" && ["ascii", "binary_little_endian", "binary_big_endian"].includes(a)) order = a;
    else if (kind === "element" && words.length === 3 && /^[0-9]{1,15}$/.test(b)) {
      if (elements.some((e) => e.name === a)) throw new BadFile(file, where, `element ${a.slice(0, 40)} is declared twice`);
      elements.push({ name: a, count: Number(b), types: new Map(), hasList: false });
    } else if (kind === "property" && last && (words.length === 3 ? a in TYPES : words.length === 5 && a === "list" && b in TYPES && words[3]! in TYPES)) {
      const name = words[words.length - 1]!;
      if (last.types.has(name)) throw new BadFile(file, where, `property ${name.slice(0, 40)} is declared twice`);
      last.types.set(name, TYPES[words.length === 3 ? a : b]!);
      last.hasList ||= words.length === 5;
    } else throw new BadFile(file, where, `not a PLY header line: ${line.trim().slice(0, 80)}`);
  });
  if (!order) throw new BadFile(file, "header", "no format line");
  const ascii = order === "ascii", start = end.index + end[0].length, left = size - start;
  // No file can hold an element in less: a list may be empty, a number in ASCII takes a digit and a separator.
  const needed = elements.reduce((sum, e) => sum + e.count * (ascii ? 2 * e.types.size : bytesOf(e)), 0);
  if (needed > left) throw new BadFile(file, `byte ${size}`, `the file ends early: the header asks for at least ${needed} bytes of data, ${left} follow`);
  return { file, source, ascii, little: order !== "binary_big_endian", elements, comments, start };
}

export async function readPly(ply: Ply): Promise<Loaded> {
  const { file } = ply, vertex = ply.elements.find((e) => e.name === "vertex");
  if (!vertex) throw new BadFile(file, "header", "no element vertex");
  if (vertex.hasList) throw new BadFile(file, "element vertex", "has a list property; expected one number per property");
  for (const name of ["x", "y", "z", ...numbered("f_dc", 3), "opacity", ...numbered("scale", 3), ...numbered("rot", 4)])
    if (!vertex.types.has(name)) throw new BadFile(file, "header", `no property ${name}: not a Gaussian splat scene`);
  const rest = grouped(file, vertex, "f_rest"), channels = grouped(file, vertex, "feat"), degree = degreeOf(file, rest);
  const header = headerOf(file, ply.comments), n = vertex.count, scene = emptyScene(file, n, degree, header), bands = (degree + 1) ** 2;
  // Where every number goes: property, array, numbers a row, place in the row.
  const features = channels ? new Float32Array(n * channels) : null;
  const targets: [string, Float32Array, number, number][] = [
    ...["x", "y", "z"].map((name, i): [string, Float32Array, number, number] => [name, scene.means, 3, i]),
    ...numbered("rot", 4).map((name, i): [string, Float32Array, number, number] => [name, scene.quats, 4, i]),
    ...numbered("scale", 3).map((name, i): [string, Float32Array, number, number] => [name, scene.logScales, 3, i]),
    ["opacity", scene.logitOpacities, 1, 0],
    ...numbered("f_dc", 3).map((name, i): [string, Float32Array, number, number] => [name, scene.sh, 3 * bands, i]),
    // Channel by channel in the file, coefficient by coefficient in a scene.
    ...numbered("f_rest", rest).map((name, i): [string, Float32Array, number, number] => [name, scene.sh, 3 * bands, 3 * (1 + (i % (bands - 1))) + Math.floor(i / (bands - 1))]),
    ...(features ? numbered("feat", channels).map((name, i): [string, Float32Array, number, number] => [name, features, channels, i]) : []),
  ];
  await (ply.ascii ? readAscii : readBinary)(ply, vertex, targets);
  features?.forEach((value, i) => {
    if (!Number.isFinite(value)) scene.means[3 * Math.floor(i / channels)] = NaN; // so that the row is left out: 8 bits have no NaN
  });
  if (features) scene.features = quantised(features, n, channels);
  return finished(file, scene);
}

type Targets = [name: string, array: Float32Array, width: number, place: number][];

/** Byte at which a binary element begins. */
export function startOf(ply: Ply, name: string): number {
  let at = ply.start;
  for (const e of ply.elements) {
    if (e.name === name) break;
    if (e.hasList) throw new BadFile(ply.file, `element ${e.name}`, `has a list property and stands before ${name}, so where that begins is unknown`);
    at += e.count * bytesOf(e);
  }
  return at;
}

async function readBinary(ply: Ply, vertex: Element, targets: Targets): Promise<void> {
  const stride = bytesOf(vertex), n = vertex.count, offsets = new Map<string, number>();
  let at = 0;
  for (const [name, type] of vertex.types) offsets.set(name, at), (at += Number(type[1]));
  const bytes = new Uint8Array(ROWS_AT_ONCE * stride), view = new DataView(bytes.buffer);
  const floats = ply.little && littleMachine && [...vertex.types.values()].every((t) => t === "f4") ? new Float32Array(bytes.buffer) : null; // read as they lie
  await ply.source.skip(startOf(ply, "vertex"));
  for (let first = 0; first < n; first += ROWS_AT_ONCE) {
    const rows = Math.min(ROWS_AT_ONCE, n - first);
    await ply.source.fill(bytes.subarray(0, rows * stride));
    for (const [name, array, width, place] of targets) {
      const offset = offsets.get(name)!, read = READ[vertex.types.get(name)!];
      if (floats) takeColumn(floats, offset / 4, stride / 4, array, first * width + place, width, rows);
      else for (let row = 0; row < rows; row++) array[(first + row) * width + place] = read(view, row * stride + offset, ply.little);
    }
  }
}

function takeColumn(block: Float32Array, at: number, stride: number, out: Float32Array, to: number, width: number, rows: number): void {
  for (let row = 0; row < rows; row++, at += stride, to += width) out[to] = block[at]!;
}

const DECIMAL = /^[-+.\deE]+$/; // what Number() takes of these characters alone is a decimal number

/** One line per row, as every writer does it. */
async function readAscii(ply: Ply, vertex: Element, targets: Targets): Promise<void> {
  const { file } = ply, bytes = await ply.source.rest(), index = [...vertex.types.keys()], columns = index.length;
  let skip = 0, at = ply.start, cut = false;
  for (const e of ply.elements) {
    if (e.name === "vertex") break;
    if (e.types.size) skip += e.count;
  }
  const next = (): string[] | null => {
    while (at < bytes.length) {
      const found = bytes.indexOf(10, at), end = found < 0 ? bytes.length : found, words = latin1(bytes.subarray(at, end)).trim().split(/\s+/);
      at = end + 1;
      cut = found < 0;
      if (words[0]) return words;
    }
    return null;
  };
  for (; skip > 0; skip--) next();
  const places = targets.map(([name, array, width, place]) => ({ column: index.indexOf(name), array, width, place }));
  for (let row = 0; row < vertex.count; row++) {
    const words = next();
    if (!words) throw new BadFile(file, `byte ${bytes.length}`, `the file ends early: ${vertex.count} vertices expected, ${row} found`);
    if (words.length !== columns) throw new BadFile(file, `vertex ${row}`, `a row of ${columns} numbers expected, found ${words.length}`);
    for (const { column, array, width, place } of places) {
      const word = words[column]!, value = DECIMAL.test(word) ? Number(word) : NaN;
      if (value !== value && !/^[+-]?(nan|inf|infinity)$/i.test(word)) throw new BadFile(file, `vertex ${row}`, `not a number: ${word.slice(0, 40)}`);
      array[row * width + place] = value;
    }
  }
  if (cut) throw new BadFile(file, `byte ${bytes.length}`, "the last vertex has no line end: the file was cut"); // a number cut in two would still read as one
}

/** How the scene must be drawn, from the comments: splatkit's own, else the antialias words of other programs. The last one counts. */
function headerOf(file: string, comments: string[]): SceneHeader {
  let antialias = false;
  for (const comment of comments) {
    if (comment.startsWith("splatkit {")) {
      try {
        return headerOfJson(comment.slice("splatkit ".length));
      } catch (why) {
        throw new BadFile(file, "comment splatkit", (why as Error).message); // drawing with settings that we could not read would be silently wrong
      }
    }
    const [name, value] = comment.toLowerCase().split(/\s+/);
    if (name === "splatrendermode:" || name === "antialiased") antialias = value === "mip" || value === "1";
  }
  return { ...DEFAULT_HEADER, antialias };
}

/** How many properties group_0, group_1, ... there are, without a gap. */
export function grouped(file: string, element: Element, group: string): number {
  const names = [...element.types.keys()].filter((name) => new RegExp(`^${group}_[0-9]+$`).test(name)), missing = numbered(group, names.length).find((name) => !element.types.has(name));
  if (missing) throw new BadFile(file, "header", `${names.length} properties ${group}_* but no ${missing}`);
  return names.length;
}

export function degreeOf(file: string, rest: number): Degree {
  const degree = [0, 9, 24, 45].indexOf(rest);
  if (degree < 0) throw new BadFile(file, "header", `${rest} properties f_rest_*; expected 0, 9, 24 or 45 (SH degree 0 to 3)`);
  return degree as Degree;
}

/** Features in 8 bits a number, value = q * scale + offset by channel. */
function quantised(features: Float32Array, n: number, channels: number) {
  const int8 = new Int8Array(n * channels), scale = new Float32Array(channels), offset = new Float32Array(channels);
  for (let c = 0; c < channels; c++) {
    let low = Infinity, high = -Infinity;
    for (let i = c; i < features.length; i += channels) {
      const value = features[i]!;
      if (!Number.isFinite(value)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (!(low <= high)) continue;
    scale[c] = (high - low) / 254;
    offset[c] = (high + low) / 2;
    for (let i = c; i < features.length; i += channels) int8[i] = scale[c]! > 0 ? Math.round((features[i]! - offset[c]!) / scale[c]!) : 0;
  }
  return { channels, int8, scale, offset };
}

export const numbered = (group: string, count: number): string[] => Array.from({ length: count }, (_, i) => `${group}_${i}`);
const littleMachine = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1;

const decoder = new TextDecoder("latin1");
const latin1 = (bytes: Uint8Array): string => decoder.decode(bytes);
