/** The page's ends of its workers. */
import type { Reading, Rgb } from "./mapping";
import type { View } from "./pose";
import { bandsOf, type SplatScene } from "./scene";
import wasmUrl from "./splat.wasm?url&inline";
import OrderWorker from "./workers/order.worker?worker&inline";
import type { OrderReply, OrderRequest } from "./workers/order.worker";
import RasterWorker from "./workers/raster.worker?worker&inline";
import type { RasterReply, RasterRequest } from "./workers/raster.worker";

/** Depth orders of the rows that are shown. */
export class OrderClient {
  private readonly worker = new OrderWorker();
  private readonly waiting = new Map<number, (order: Uint32Array) => void>();
  private next = 0;
  private near = 0.01;

  constructor() {
    this.worker.onmessage = (event: MessageEvent<OrderReply>) => {
      this.waiting.get(event.data.id)?.(event.data.order);
      this.waiting.delete(event.data.id);
    };
  }
  setScene(scene: SplatScene): void {
    this.near = scene.header.near;
    this.post({ type: "means", means: scene.means });
  }
  update(scene: SplatScene, first: number, last: number): void {
    this.post({ type: "rows", first, means: scene.means.slice(3 * first, 3 * last) });
  }
  setVisible(visible: Uint8Array | null): void {
    this.post({ type: "visible", visible });
  }
  order(view: View): Promise<Uint32Array> {
    return new Promise((done) => {
      this.waiting.set(++this.next, done);
      this.post({ type: "order", id: this.next, key: view.worldToCam.slice(8, 12), near: this.near });
    });
  }
  private post(message: OrderRequest): void {
    this.worker.postMessage(message);
  }
}

/** The WebAssembly rasterizer, started when it is first needed; a worker that failed is thrown away and the next call starts another. */
export class RasterClient {
  private worker: Worker | null = null;
  private scene: SplatScene | null = null;
  private visible: Uint8Array | null = null;
  private attribute: Float32Array | null = null;
  private readonly waiting = new Map<number, { done: (reply: RasterReply) => void; failed: (why: Error) => void }>();
  private next = 0;

  setScene(scene: SplatScene): void {
    [this.scene, this.visible, this.attribute] = [scene, null, null];
    this.worker?.postMessage({ type: "scene", wasm: null, scene } satisfies RasterRequest);
  }
  update(first: number, last: number): void {
    const s = this.scene!, bands = 3 * bandsOf(s.shDegree), cut = (x: Float32Array, width: number) => x.slice(width * first, width * last);
    this.worker?.postMessage({ type: "rows", first, means: cut(s.means, 3), quats: cut(s.quats, 4), logScales: cut(s.logScales, 3),
      logitOpacities: cut(s.logitOpacities, 1), sh: cut(s.sh, bands) } satisfies RasterRequest);
  }
  setVisible(visible: Uint8Array | null): void {
    this.visible = visible;
    this.worker?.postMessage({ type: "visible", visible } satisfies RasterRequest);
  }
  setAttribute(values: Float32Array): void {
    this.attribute = values;
    this.worker?.postMessage({ type: "attribute", values } satisfies RasterRequest);
  }

  async render(view: View, attribute: "colour" | "attribute" | "normal" | "depth", reading: Reading, background: Rgb): Promise<Extract<RasterReply, { type: "picture" }>> {
    return (await this.ask({ type: "render", id: ++this.next, view, attribute, reading, background })) as Extract<RasterReply, { type: "picture" }>;
  }
  async weights(view: View, x: number, y: number): Promise<Extract<RasterReply, { type: "weights" }>> {
    return (await this.ask({ type: "weights", id: ++this.next, view, x, y })) as Extract<RasterReply, { type: "weights" }>;
  }

  private ask(request: Extract<RasterRequest, { id: number }>): Promise<RasterReply> {
    return new Promise((done, failed) => {
      this.waiting.set(request.id, { done, failed });
      this.started().postMessage(request);
    });
  }

  private started(): Worker {
    if (this.worker) return this.worker;
    const worker = (this.worker = new RasterWorker());
    worker.onmessage = (event: MessageEvent<RasterReply>) => {
      if (worker !== this.worker) return;
      const r = event.data;
      if (r.type === "error") return this.fail(r.message);
      this.waiting.get(r.id)?.done(r);
      this.waiting.delete(r.id);
    };
    worker.onerror = (event) => {
      event.preventDefault();
      if (worker === this.worker) this.fail(event.message || "the rasterizer's worker stopped");
    };
    worker.postMessage({ type: "scene", wasm: wasmBytes(), scene: this.scene! } satisfies RasterRequest);
    if (this.visible) worker.postMessage({ type: "visible", visible: this.visible } satisfies RasterRequest);
    if (this.attribute) worker.postMessage({ type: "attribute", values: this.attribute } satisfies RasterRequest);
    return worker;
  }

  private fail(message: string): void {
    this.worker?.terminate();
    this.worker = null;
    const waiting = [...this.waiting.values()];
    this.waiting.clear();
    for (const w of waiting) w.failed(new Error(message));
  }
}

function wasmBytes(): ArrayBuffer {
  return Uint8Array.from(atob(wasmUrl.slice(wasmUrl.indexOf(",") + 1)), (c) => c.charCodeAt(0)).buffer;
}
