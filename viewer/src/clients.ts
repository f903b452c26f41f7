/** The page's ends of its workers. */
import type { Reading, Rgb } from "./mapping";
import type { View } from "./pose";
import { bandsOf, type SplatScene } from "./scene";
import wasmUrl from "./splat.wasm?url&inline";
import OrderWorker from "./workers/order.worker?worker&inline";
import type { OrderReply, OrderRequest } from "./workers/order.worker";
import RasterWorker from "./workers/raster.worker?worker&inline";
import type { RasterReply, RasterRequest } from "./workers/raster.worker";

/** Depth orders of the rows that are shown. Its worker starts with the first order that is asked for. */
export class OrderClient {
  private worker: Worker | null = null;
  private readonly waiting = new Map<number, (order: Uint32Array) => void>();
  private next = 0;
  private scene: SplatScene | null = null;
  private visible: Uint8Array | null = null;
  private given = false; // the worker has the scene

  setScene(scene: SplatScene): void {
    [this.scene, this.visible, this.given] = [scene, null, false];
  }
  update(first: number, last: number): void {
    if (this.given) this.post({ type: "rows", first, means: this.scene!.means.slice(3 * first, 3 * last) });
  }
  setVisible(visible: Uint8Array | null): void {
    this.visible = visible;
    if (this.given) this.post({ type: "visible", visible });
  }
  order(view: View): Promise<Uint32Array> {
    if (!this.given && this.scene) {
      this.post({ type: "means", means: this.scene.means });
      if (this.visible) this.post({ type: "visible", visible: this.visible });
      this.given = true;
    }
    return new Promise((done) => {
      this.waiting.set(++this.next, done);
      this.post({ type: "order", id: this.next, key: view.worldToCam.slice(8, 12), near: this.scene?.header.near ?? 0.01 });
    });
  }
  private post(message: OrderRequest): void {
    if (!this.worker) {
      this.worker = new OrderWorker();
      this.worker.onmessage = (event: MessageEvent<OrderReply>) => {
        this.waiting.get(event.data.id)?.(event.data.order);
        this.waiting.delete(event.data.id);
      };
    }
    this.worker.postMessage(message);
  }
}

/** The WebAssembly rasterizer; a worker that failed is thrown away and the next call starts another. It gets the scene with the first call that needs it. */
export class RasterClient {
  private worker: Worker | null = null;
  private scene: SplatScene | null = null;
  private visible: Uint8Array | null = null;
  private attribute: Float32Array | null = null;
  private given = false; // the worker has the scene
  private readonly waiting = new Map<number, { done: (reply: RasterReply) => void; failed: (why: Error) => void }>();
  private next = 0;

  setScene(scene: SplatScene): void {
    [this.scene, this.visible, this.attribute, this.given] = [scene, null, null, false];
  }
  update(first: number, last: number): void {
    if (this.given) this.post({ type: "rows", first, ...copied(this.scene!, first, last) });
  }
  setVisible(visible: Uint8Array | null): void {
    this.visible = visible;
    if (this.given) this.post({ type: "visible", visible });
  }
  setAttribute(values: Float32Array): void {
    this.attribute = values;
    if (this.given) this.post({ type: "attribute", values });
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
      this.start();
      if (!this.given) {
        const { count, shDegree, header } = this.scene!;
        this.post({ type: "scene", scene: { count, shDegree, header, ...copied(this.scene!, 0, count) } });
        if (this.visible) this.post({ type: "visible", visible: this.visible });
        if (this.attribute) this.post({ type: "attribute", values: this.attribute });
        this.given = true;
      }
      this.post(request);
    });
  }
  /** Rows go over by their memory, which costs nothing; a copy that the browser makes costs two. */
  private post(message: RasterRequest): void {
    const rows = message.type === "rows" ? message : message.type === "scene" ? message.scene : null;
    this.worker!.postMessage(message, rows ? [rows.means, rows.quats, rows.logScales, rows.logitOpacities, rows.sh].map((x) => x.buffer as ArrayBuffer) : []);
  }

  /** Starts the worker and has it compile its module: what a first picture then need not wait for. */
  start(): void {
    if (this.worker) return;
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
    this.post({ type: "module", wasm: wasmBytes() });
  }

  private fail(message: string): void {
    this.worker?.terminate();
    [this.worker, this.given] = [null, false];
    const waiting = [...this.waiting.values()];
    this.waiting.clear();
    for (const w of waiting) w.failed(new Error(message));
  }
}

/** Rows first <= row < last of what is drawn, to be given away. */
function copied(s: SplatScene, first: number, last: number): Pick<SplatScene, "means" | "quats" | "logScales" | "logitOpacities" | "sh"> {
  const cut = (x: Float32Array, width: number) => x.slice(width * first, width * last);
  return { means: cut(s.means, 3), quats: cut(s.quats, 4), logScales: cut(s.logScales, 3), logitOpacities: cut(s.logitOpacities, 1), sh: cut(s.sh, 3 * bandsOf(s.shDegree)) };
}

function wasmBytes(): ArrayBuffer {
  return Uint8Array.from(atob(wasmUrl.slice(wasmUrl.indexOf(",") + 1)), (c) => c.charCodeAt(0)).buffer;
}
