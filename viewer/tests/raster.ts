// What tests/test_wasm.py runs in node: draws the cases of a job with WasmRaster and writes the numbers to a file.
// node raster.mjs splat.wasm job.json in.bin out.bin; arrays of a case stand in in.bin one after the other.
import { readFileSync, writeFileSync } from "node:fs";
import type { SceneHeader, SplatScene } from "../src/scene";
import { WasmRaster } from "../src/wasm";

interface Case {
  n: number;
  degree: 0 | 1 | 2 | 3;
  header: SceneHeader;
  camera: { world_to_cam: number[]; K: number[]; width: number; height: number };
  background: number[];
  attribute: boolean; // in.bin has 3 numbers a Gaussian more
  channels: number; // and features of so many
  pixels: [number, number][]; // whose weights are asked for
  repeat: number; // draw so often and report the seconds of each
  rows?: [number, number]; // whose values come after the scene
  trap?: boolean; // first have the module read where it has no memory
}

const [wasm, job, input, output] = process.argv.slice(2) as [string, string, string, string];
const bytes = readFileSync(input), numbers = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
const said = (call: () => unknown): string | null => {
  try {
    return call(), null;
  } catch (why) {
    return String(why);
  }
};
let at = 0;
const take = (count: number) => numbers.subarray(at, (at += count));
const raster = await WasmRaster.load(readFileSync(wasm)), out: Float32Array[] = [], report: unknown[] = [];
for (const c of JSON.parse(readFileSync(job, "utf8")) as Case[]) {
  for (const [name, value] of Object.entries(c.header)) if ((value as unknown) === "inf") (c.header as unknown as Record<string, number>)[name] = Infinity;
  const scene: SplatScene = { count: c.n, shDegree: c.degree, means: take(3 * c.n), quats: take(4 * c.n), logScales: take(3 * c.n), logitOpacities: take(c.n),
    sh: take(3 * c.n * (c.degree + 1) ** 2), header: c.header };
  const k = c.camera;
  try {
    if (c.rows) {
      const [first, last] = c.rows, rowsOf = (array: Float32Array, a: number, b: number) => array.subarray((array.length / c.n) * a, (array.length / c.n) * b);
      const parts = ["means", "quats", "logScales", "logitOpacities", "sh"] as const, before = { ...scene };
      for (const name of parts) rowsOf((before[name] = scene[name].slice()), first, last).fill(0.3);
      raster.setScene(before);
      raster.render(k.world_to_cam, k.K, k.width, k.height, c.background);
      raster.setRows(first, Object.fromEntries(parts.map((name) => [name, rowsOf(scene[name], first, last)])));
    } else raster.setScene(scene);
    if (c.trap) {
      (raster as unknown as { exports: { set_attribute(at: number): void } }).exports.set_attribute(0xfffffff0);
      const tries = [0, 1].map(() => said(() => raster.render(k.world_to_cam, k.K, k.width, k.height, c.background)));
      raster.setScene(scene);
      report.push({ tries });
      continue;
    }
    if (c.attribute) raster.setAttribute(take(3 * c.n));
    const picture = raster.render(k.world_to_cam, k.K, k.width, k.height, c.background);
    out.push(picture.color, picture.alpha, picture.expectedDepth, picture.medianDepth);
    if (c.channels) out.push(raster.renderFeatures(take(c.channels * c.n), c.channels, k.world_to_cam, k.K, k.width, k.height));
    const weights = c.pixels.map(([x, y]) => raster.weights(x, y, k.world_to_cam, k.K, k.width, k.height));
    for (const { rows, w } of weights) out.push(Float32Array.from(rows), w);
    const seconds: number[] = [], cpu: number[] = [];
    for (let i = 0; i < c.repeat; i++) {
      raster.setAttribute(null); // forgets the projection
      const before = performance.now(), used = process.cpuUsage();
      raster.render(k.world_to_cam, k.K, k.width, k.height, c.background, false);
      seconds.push((performance.now() - before) / 1000);
      const spent = process.cpuUsage(used);
      cpu.push((spent.user + spent.system) / 1e6);
    }
    report.push({ weights: weights.map(({ rows }) => rows.length), seconds, cpu });
  } catch (why) {
    report.push({ error: String(why) });
  }
}
writeFileSync(output, new Uint8Array(Buffer.concat(out.map((a) => Buffer.from(a.buffer, a.byteOffset, a.byteLength)))));
console.log(JSON.stringify(report));
