/** The pictures of a camera path as one file: PNG in a zip, bit for bit, or an animated WebP, which browsers show. */

export interface Picture {
  name: string;
  bytes: Uint8Array<ArrayBuffer>;
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

/** A zip whose entries are stored as they are: pictures do not become smaller (APPNOTE.TXT 6.3.10, 4.3). */
export function zip(files: Picture[]): Blob {
  const parts: BlobPart[] = [], directory: BlobPart[] = [];
  let at = 0, length = 0;
  for (const { name, bytes } of files) {
    let crc = -1;
    for (const byte of bytes) crc = CRC[(crc ^ byte) & 255]! ^ (crc >>> 8);
    const text = new TextEncoder().encode(name);
    // Version 2.0, names in UTF-8, stored, 1 January 1980.
    const entry: Field[] = [[20, 2], [0x0800, 2], [0, 2], [0, 2], [0x21, 2], [~crc >>> 0, 4], [bytes.length, 4], [bytes.length, 4], [text.length, 2], [0, 2]];
    parts.push(bytesOf([[0x04034b50, 4], ...entry]), text, bytes);
    directory.push(bytesOf([[0x02014b50, 4], [20, 2], ...entry]), bytesOf([[0, 2], [0, 2], [0, 2], [0, 4], [at, 4]]), text);
    at += 30 + text.length + bytes.length;
    length += 46 + text.length;
  }
  if (at + length > 0xffff_0000 || files.length > 0xffff) throw new Error("the film is larger than a zip of this kind holds (4 GB); make fewer or smaller frames");
  return new Blob([...parts, ...directory, bytesOf([[0x06054b50, 4], [0, 2], [0, 2], [files.length, 2], [files.length, 2], [length, 4], [at, 4], [0, 2]])], { type: "application/zip" });
}

/** An animation that repeats, of WebP pictures of one size (RFC 9649, 2.7.1). */
export function animatedWebp(pictures: Picture[], width: number, height: number, fps: number): Blob {
  const parts: Uint8Array<ArrayBuffer>[] = [chunk("VP8X", bytesOf([[0x02, 1], [0, 3], [width - 1, 3], [height - 1, 3]])), chunk("ANIM", bytesOf([[0xff000000, 4], [0, 2]]))];
  pictures.forEach(({ bytes }, i) => {
    // Whole milliseconds whose sum keeps step with the clock.
    const ms = Math.round((1000 * (i + 1)) / fps) - Math.round((1000 * i) / fps);
    // Neither blended nor disposed of: every frame covers the one before.
    parts.push(chunk("ANMF", bytesOf([[0, 3], [0, 3], [width - 1, 3], [height - 1, 3], [ms, 3], [0x02, 1]]), imageOf(bytes)));
  });
  return new Blob([bytesOf([[RIFF, 4], [4 + parts.reduce((sum, p) => sum + p.length, 0), 4], [WEBP, 4]]), ...parts], { type: "image/webp" });
}

const RIFF = 0x46464952, WEBP = 0x50424557;
type Field = [value: number, bytes: number];

/** Numbers, little-endian. */
function bytesOf(fields: Field[]): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(fields.flatMap(([value, n]) => Array.from({ length: n }, (_, k) => (value >>> (8 * k)) & 255)));
}

function chunk(name: string, ...bodies: Uint8Array[]): Uint8Array<ArrayBuffer> {
  const length = bodies.reduce((sum, b) => sum + b.length, 0), out = new Uint8Array(8 + length + (length & 1));
  out.set([...name].map((c) => c.charCodeAt(0)));
  out.set(bytesOf([[length, 4]]), 4);
  let at = 8;
  for (const body of bodies) {
    out.set(body, at);
    at += body.length;
  }
  return out;
}

/** The chunks of a WebP file that hold its pixels: ALPH, VP8, VP8L. */
function imageOf(bytes: Uint8Array<ArrayBuffer>): Uint8Array {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length), kept: Uint8Array[] = [];
  if (bytes.length < 12 || view.getUint32(0, true) !== RIFF || view.getUint32(8, true) !== WEBP) throw new Error("this browser makes no WebP pictures; choose PNG");
  for (let at = 12; at + 8 <= bytes.length; ) {
    const size = view.getUint32(at + 4, true), name = String.fromCharCode(...bytes.subarray(at, at + 4)), end = at + 8 + size + (size & 1);
    if (["ALPH", "VP8 ", "VP8L"].includes(name)) kept.push(bytes.subarray(at, end));
    at = end;
  }
  const out = new Uint8Array(kept.reduce((sum, k) => sum + k.length, 0));
  kept.reduce((at, k) => (out.set(k, at), at + k.length), 0);
  return out;
}
