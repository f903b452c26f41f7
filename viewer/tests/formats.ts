// What tests/test_browser_formats.py runs in node: reads files and reports what came out of each.
// node formats.mjs files.json in.bin out.bin; files.json lists names and sizes, in.bin holds their bytes one after the other.
import { readFileSync, writeFileSync } from "node:fs";
import { BadFile, readSplats, Source } from "../src/formats";

const [files, input, output] = process.argv.slice(2) as [string, string, string];
let random = 1; // of Lehmer
/** Pieces as a disk or a network gives them: of any length, and some of none. */
const inPieces = (bytes: Uint8Array, most: number) => new ReadableStream<Uint8Array>({
  async pull(controller) {
    for (let at = 0; at < bytes.length; ) controller.enqueue(bytes.subarray(at, (at += (random = (random * 48271) % 2147483647) % most)));
    controller.close();
  },
});
const bytes = readFileSync(input), out: Uint8Array[] = [], report: unknown[] = [];
let at = 0, peak = 0;
for (const { name, size, keep } of JSON.parse(readFileSync(files, "utf8")) as { name: string; size: number; keep: boolean }[]) {
  const own = Uint8Array.from(bytes.subarray(at, (at += size))), before = performance.now();
  try {
    const { scene, note } = await readSplats(new Source(name, size, inPieces(own, size < 1e5 ? 300 : 1e6))), seconds = (performance.now() - before) / 1000;
    const arrays = [scene.means, scene.quats, scene.logScales, scene.logitOpacities, scene.sh];
    const f = scene.features, finite = arrays.every((array) => array.every(Number.isFinite));
    if (keep) for (const a of f ? [...arrays, f.scale, f.offset, f.int8] : arrays) out.push(new Uint8Array(a.buffer, a.byteOffset, a.byteLength));
    const sizes = arrays.map((a) => a.length), n = scene.count, bands = (scene.shDegree + 1) ** 2;
    report.push({ count: n, degree: scene.shDegree, channels: f?.channels ?? 0, header: { ...scene.header, fov_margin: String(scene.header.fov_margin) }, note, seconds,
      whole: finite && String(sizes) === String([3 * n, 4 * n, 3 * n, n, 3 * bands * n]) });
  } catch (why) {
    const seconds = (performance.now() - before) / 1000;
    report.push(why instanceof BadFile ? { bad: why.message, seconds } : { other: String((why as Error)?.stack ?? why), seconds });
  }
  const m = process.memoryUsage();
  peak = Math.max(peak, m.arrayBuffers + m.heapUsed);
}
writeFileSync(output, Buffer.concat(out));
console.log(JSON.stringify({ report, peak }));
