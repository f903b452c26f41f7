/** The bytes of a file as they come: what is decoded from its beginning to its end need never be held whole beside its scene. */
import { reasonOf } from "../errors";
import { BadFile } from "./reading";

const WHOLE_MAX = 2 ** 31 - 1; // bytes: what browsers put into one buffer

export class Source {
  private readonly reader: ReadableStreamDefaultReader<Uint8Array>;
  private piece: Uint8Array = new Uint8Array(0); // that came and was not taken
  private at = 0; // bytes that were taken

  /** `size` is what the file says of itself. */
  constructor(readonly name: string, readonly size: number, stream: ReadableStream<Uint8Array>) {
    this.reader = stream.getReader();
  }

  /** The next bytes, `count` of them or as many as there are; they can be taken afterwards. */
  async peek(count: number): Promise<Uint8Array> {
    const pieces = [this.piece];
    let held = this.piece.length;
    for (let more: Uint8Array | null; held < count && (more = await this.next()); held += more.length) pieces.push(more);
    if (pieces.length > 1) this.piece = joined(pieces, held);
    return this.piece.subarray(0, count);
  }

  /** Takes as many bytes as `out` holds. Rejects with BadFile where the file ends before. */
  async fill(out: Uint8Array): Promise<void> {
    for (let filled = 0; filled < out.length; ) {
      if (!this.piece.length) {
        const next = await this.next();
        if (!next) throw new BadFile(this.name, `byte ${this.at}`, "the file ends early");
        this.piece = next;
      }
      const part = this.piece.subarray(0, out.length - filled);
      out.set(part, filled);
      filled += part.length;
      this.at += part.length;
      this.piece = this.piece.subarray(part.length);
    }
  }

  async skip(count: number): Promise<void> {
    const piece = new Uint8Array(Math.min(count, 65536));
    for (let left = count; left > 0; left -= piece.length) await this.fill(piece.subarray(0, left));
  }

  /** All that was not taken. */
  async rest(): Promise<Uint8Array> {
    if (this.size > WHOLE_MAX) throw new BadFile(this.name, "", `${(this.size / 2 ** 30).toFixed(1)} GB, and a page reads at most 2 GB of this format; open it with: splatkit view`);
    const out = new Uint8Array(this.size - this.at);
    await this.fill(out);
    return out;
  }

  /** Nothing more is wanted. */
  close(): void {
    void this.reader.cancel().catch(() => {});
  }

  private async next(): Promise<Uint8Array | null> {
    try {
      const { done, value } = await this.reader.read();
      return done ? null : value;
    } catch (why) {
      throw new BadFile(this.name, "", `cannot be read: ${reasonOf(why)}`);
    }
  }
}

/** The first `size` bytes of all pieces together. */
export function joined(pieces: Uint8Array[], size: number): Uint8Array {
  const out = new Uint8Array(size);
  let at = 0;
  for (const piece of pieces) {
    out.set(piece.subarray(0, size - at), at);
    at = Math.min(size, at + piece.length);
  }
  return out;
}
