/** The WebAssembly rasterizer off the page's thread: pictures, and the blending weights of a pixel. After an error the page throws this worker away. */
import { reasonOf } from "../errors";
import { normalsTowards, toPixels, type Reading, type Rgb } from "../mapping";
import { centreOf, type View } from "../pose";
import { ABSENT, type SplatScene } from "../scene";
import { WasmRaster } from "../wasm";

export type RasterRequest =
  | { type: "module"; wasm: ArrayBuffer }
  | { type: "scene"; scene: SplatScene }
  | { type: "rows"; first: number; means: Float32Array; quats: Float32Array; logScales: Float32Array; logitOpacities: Float32Array; sh: Float32Array }
  | { type: "visible"; visible: Uint8Array | null }
  | { type: "attribute"; values: Float32Array | null }
  | { type: "render"; id: number; view: View; attribute: "colour" | "attribute" | "normal" | "depth"; reading: Reading; background: Rgb }
  | { type: "weights"; id: number; view: View; x: number; y: number };
export type RasterReply =
  | { type: "picture"; id: number; width: number; height: number; pixels: Uint8ClampedArray<ArrayBuffer>; ms: number }
  | { type: "weights"; id: number; rows: Uint32Array; w: Float32Array; depth: number }
  | { type: "error"; message: string };

let raster: WasmRaster | null = null;
let scene: SplatScene | null = null;
let given: Float32Array | null = null; // the attribute of the page
let visible: Uint8Array | null = null;
let stale = false; // the rasterizer's copy is not that of `scene`
let drawn = ""; // which attribute the rasterizer holds

/** The scene as the rasterizer gets it: what is hidden is transparent. */
function put(): void {
  const s = scene!;
  if (visible) {
    const logits = s.logitOpacities.slice();
    for (let i = 0; i < s.count; i++) if (!visible[i]) logits[i] = ABSENT;
    raster!.setScene({ ...s, logitOpacities: logits });
  } else raster!.setScene(s);
  stale = false;
  drawn = "colour";
}

function use(attribute: "colour" | "attribute" | "normal", view: View): void {
  if (stale) put();
  const camera = centreOf(view.worldToCam), key = attribute === "normal" ? `normal ${camera.join()}` : attribute;
  if (key === drawn) return;
  raster!.setAttribute(attribute === "colour" ? null : attribute === "normal" ? normalsTowards(scene!, camera) : given);
  drawn = key;
}

async function answer(m: RasterRequest): Promise<void> {
  if (m.type === "module") raster = await WasmRaster.load(m.wasm);
  else if (m.type === "scene") [scene, given, visible, stale] = [m.scene, null, null, true];
  else if (m.type === "rows") {
    const s = scene!, fields = [s.means, s.quats, s.logScales, s.logitOpacities, s.sh], parts = [m.means, m.quats, m.logScales, m.logitOpacities, m.sh];
    fields.forEach((field, k) => field.set(parts[k]!, (m.first * field.length) / s.count));
    if (!stale && !visible) raster!.setRows(m.first, m);
    else stale = true;
  } else if (m.type === "visible") [visible, stale] = [m.visible, true];
  else if (m.type === "attribute") {
    given = m.values;
    if (drawn === "attribute") drawn = "";
  } else if (m.type === "render") {
    const start = performance.now(), depth = m.attribute === "depth", { width, height } = m.view;
    use(depth ? "colour" : m.attribute === "attribute" && !given ? "colour" : (m.attribute as "colour"), m.view);
    const p = raster!.render(m.view.worldToCam, m.view.K, width, height, [0, 0, 0], depth);
    const pixels = toPixels(m.reading, p.color, p.alpha, depth ? p.expectedDepth : null, m.background);
    reply({ type: "picture", id: m.id, width, height, pixels, ms: performance.now() - start }, [pixels.buffer]);
  } else {
    use("colour", m.view);
    const { rows, w } = raster!.weights(m.x, m.y, m.view.worldToCam, m.view.K, m.view.width, m.view.height), c = m.view.worldToCam, means = scene!.means;
    let sum = 0, z = 0;
    rows.forEach((row, k) => {
      sum += w[k]!;
      z += w[k]! * (c[8]! * means[3 * row]! + c[9]! * means[3 * row + 1]! + c[10]! * means[3 * row + 2]! + c[11]!);
    });
    reply({ type: "weights", id: m.id, rows, w, depth: sum > 1e-6 ? z / sum : 0 }, [rows.buffer, w.buffer]);
  }
}

const reply = (r: RasterReply, transfer: Transferable[] = []) => self.postMessage(r, { transfer });

let queue: Promise<void> = Promise.resolve();
self.onmessage = (event: MessageEvent<RasterRequest>) => {
  queue = queue.then(() => answer(event.data)).catch((why: unknown) => reply({ type: "error", message: reasonOf(why) }));
};
