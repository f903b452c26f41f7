/** The WebAssembly rasterizer off the page's thread: pictures, and the blending weights of a pixel. After an error the page throws this worker away. */
import { reasonOf } from "../errors";
import { normalsTowards, toPixels, type Reading, type Rgb } from "../mapping";
import { centreOf, type View } from "../pose";
import { ABSENT, type Rows } from "../scene";
import { buffersOf, WasmRaster, type Outline } from "../wasm";

export type RasterRequest =
  | { type: "module"; wasm: ArrayBuffer }
  | { type: "warm" }
  | { type: "scene"; scene: Outline } // its rows follow
  | { type: "rows"; id: number; first: number; rows: Rows } // they come back, to carry others
  | { type: "visible"; visible: Uint8Array | null }
  | { type: "attribute"; values: Float32Array | null }
  | { type: "render"; id: number; view: View; attribute: "colour" | "attribute" | "normal" | "depth"; reading: Reading; background: Rgb }
  | { type: "weights"; id: number; view: View; x: number; y: number };
export type RasterReply =
  | { type: "rows"; id: number; rows: Rows }
  | { type: "picture"; id: number; width: number; height: number; pixels: Uint8ClampedArray<ArrayBuffer>; ms: number }
  | { type: "weights"; id: number; rows: Uint32Array; w: Float32Array; depth: number }
  | { type: "error"; message: string };

let raster: WasmRaster | null = null; // holds the scene, which is nowhere else in this worker
let count: number | null = null; // of the scene
let given: Float32Array | null = null; // the attribute of the page
let visible: Uint8Array | null = null;
let logits: Float32Array | null = null; // the scene's own, while some of it is hidden: to the rasterizer what is hidden is transparent
let drawn = ""; // which attribute the rasterizer holds

function use(attribute: "colour" | "attribute" | "normal", view: View): void {
  const camera = centreOf(view.worldToCam), key = attribute === "normal" ? `normal ${camera.join()}` : attribute;
  if (key === drawn) return;
  const normals = () => normalsTowards({ count: count!, means: raster!.part("means"), quats: raster!.part("quats"), logScales: raster!.part("logScales") }, camera);
  raster!.setAttribute(attribute === "colour" ? null : attribute === "normal" ? normals() : given);
  drawn = key;
}

/** Opacities of the rows from `first` on: their own where they are shown. */
const shown = (first: number, own: Float32Array): Float32Array => (visible ? own.map((x, i) => (visible![first + i] ? x : ABSENT)) : own);

async function answer(m: RasterRequest): Promise<void> {
  if (m.type === "module") raster = await WasmRaster.load(m.wasm);
  else if (m.type === "warm") {
    if (count === null) raster!.warmUp();
  } else if (m.type === "scene") {
    raster!.makeRoom(m.scene);
    [count, given, visible, logits, drawn] = [m.scene.count, null, null, null, "colour"];
  } else if (m.type === "rows") {
    logits?.set(m.rows.logitOpacities, m.first);
    raster!.setRows(m.first, { ...m.rows, logitOpacities: shown(m.first, m.rows.logitOpacities) });
    if (drawn.startsWith("normal")) drawn = "";
    reply({ type: "rows", id: m.id, rows: m.rows }, buffersOf(m.rows));
  } else if (m.type === "visible") {
    logits ??= raster!.part("logitOpacities").slice();
    visible = m.visible;
    raster!.setRows(0, { logitOpacities: shown(0, logits) });
    if (!visible) logits = null;
  } else if (m.type === "attribute") {
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
    const { rows, w } = raster!.weights(m.x, m.y, m.view.worldToCam, m.view.K, m.view.width, m.view.height), c = m.view.worldToCam, means = raster!.part("means");
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
