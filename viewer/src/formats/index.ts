/** Splat files to scenes, by what the bytes say and, for .splat, by the name. */
import { isCompressed, readCompressedPly } from "./compressed_ply";
import { isPly, openPly, readPly } from "./ply";
import { BadFile, type Loaded } from "./reading";
import { Source } from "./source";
import { readSplat } from "./splat";
import { isGzip, isSpz4, readSpz } from "./spz";

export { BadFile, type Loaded } from "./reading";
export { Source } from "./source";

/** Reads a file that was dropped or picked. Rejects with BadFile, one line, whatever is wrong with it. */
export async function readFile(file: File): Promise<Loaded> {
  const source = new Source(file.name, file.size, file.stream());
  try {
    return await readSplats(source);
  } finally {
    source.close();
  }
}

/** The scene in the bytes of a file of this name. Rejects with BadFile, one line, whatever is wrong with them. */
export async function readSplats(source: Source): Promise<Loaded> {
  const { name } = source, suffix = /\.[^.]*$/.exec(name.toLowerCase())?.[0] ?? "";
  try {
    const head = await source.peek(8);
    if (isPly(head) || suffix === ".ply") {
      const ply = await openPly(source);
      return await (isCompressed(ply) ? readCompressedPly(ply) : readPly(ply));
    }
    if (isGzip(head) || isSpz4(head) || suffix === ".spz") return await readSpz(name, await source.rest());
    if (suffix === ".splat") return readSplat(name, await source.rest());
  } catch (why) {
    if (why instanceof RangeError) throw new BadFile(name, "", "the browser has no memory left for this scene; open it with: splatkit view"); // an allocation that failed
    throw why;
  }
  throw new BadFile(name, "", `unknown format ${suffix || "without a suffix"}; .ply, compressed .ply, .splat and .spz are read here, other formats by: splatkit view`);
}
