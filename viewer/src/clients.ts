/** The page's ends of its workers. */
import { fromBase64 } from "./base64";
import type { Reading, Rgb } from "./mapping";
import type { View } from "./pose";
import { widthsOf, type Part, type Rows, type SplatScene } from "./scene";
import wasmUrl from "./splat.wasm?url&inline";
import OrderWorker from "./workers/order.worker?worker&inline";
import type { OrderReply, OrderRequest } from "./workers/order.worker";
import RasterWorker from "./workers/raster.worker?worker&inline";
import type { RasterReply, RasterRequest } from "./workers/raster.worker";
import { buffersOf } from "./wasm";

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
  private giving: Promise<void> | null = null; // of the scene to the worker
  private given = 0; // rows of it that the worker has
  private hand = 0; // counts what is begun, so that an older hand-over ends
  private spares: Rows[] = []; // arrays that came back, to carry the next rows: of fresh ones every page of memory is new, and costs more than the copying
  private readonly waiting = new Map<number, { done: (reply: RasterReply) => void; failed: (why: Error) => void }>();
  private next = 0;

  setScene(scene: SplatScene): void {
    [this.scene, this.visible, this.attribute] = [scene, null, null];
    this.forget();
  }
  update(first: number, last: number): void {
    last = Math.min(last, this.given); // what has still to go over goes as it is then
    const { hand } = this;
    if (first < last) this.send(first, last).catch(() => hand === this.hand && this.forget()); // the next picture hands all of it over
  }
  setVisible(visible: Uint8Array | null): void {
    this.visible = visible;
    if (this.giving) this.post({ type: "visible", visible });
  }
  setAttribute(values: Float32Array): void {
    this.attribute = values;
    if (this.giving) this.post({ type: "attribute", values });
  }

  async render(view: View, attribute: "colour" | "attribute" | "normal" | "depth", reading: Reading, background: Rgb): Promise<Extract<RasterReply, { type: "picture" }>> {
    await this.has();
    return this.ask({ type: "render", id: ++this.next, view, attribute, reading, background }) as Promise<Extract<RasterReply, { type: "picture" }>>;
  }
  async weights(view: View, x: number, y: number): Promise<Extract<RasterReply, { type: "weights" }>> {
    await this.has();
    return this.ask({ type: "weights", id: ++this.next, view, x, y }) as Promise<Extract<RasterReply, { type: "weights" }>>;
  }

  /** Until the worker has the scene that is shown; another may come in between. */
  private async has(): Promise<void> {
    for (let under: Promise<void> | null = null; !under || under !== this.giving; await under) under = this.giving ??= this.begun();
  }
  private begun(): Promise<void> {
    const giving = this.give();
    giving.catch(() => this.giving === giving && this.forget()); // whoever waits hears it, and the next call begins anew
    return giving;
  }
  /** The worker does not have the scene, or not as it is. */
  private forget(): void {
    [this.giving, this.given, this.spares] = [null, 0, []];
    this.hand++;
  }
  /** Hands the scene over in parts, two of which are under way. */
  private async give(): Promise<void> {
    const { hand } = this, { count, shDegree, header } = this.scene!, under: Promise<void>[] = [];
    this.start();
    this.post({ type: "scene", scene: { count, shDegree, header } });
    if (this.visible) this.post({ type: "visible", visible: this.visible });
    if (this.attribute) this.post({ type: "attribute", values: this.attribute });
    while (this.given < count) {
      if (under.length === 2) await under.shift();
      if (hand !== this.hand) return;
      const first = this.given, part = this.send(first, (this.given = Math.min(count, first + ROWS_AT_ONCE)));
      part.catch(() => {}); // is heard where it is waited for, and another may be before it
      under.push(part);
    }
    await Promise.all(under);
    if (hand === this.hand) this.spares = [];
  }
  private async send(first: number, last: number): Promise<void> {
    const reply = await this.ask({ type: "rows", id: ++this.next, first, rows: rowsOf(this.scene!, first, last, this.spares.pop()) });
    if (reply.type === "rows" && this.spares.length < 2) this.spares.push(reply.rows);
  }

  private ask(request: Extract<RasterRequest, { id: number }>): Promise<RasterReply> {
    return new Promise((done, failed) => {
      this.waiting.set(request.id, { done, failed });
      this.post(request);
    });
  }
  /** Rows go over by their memory, which costs nothing; a copy that the browser makes costs two. */
  private post(message: RasterRequest): void {
    this.worker!.postMessage(message, message.type === "rows" ? buffersOf(message.rows) : []);
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
  /** For a first picture by WebAssembly that is as fast as the next. */
  warmUp(): void {
    this.start();
    this.post({ type: "warm" });
  }

  private fail(message: string): void {
    this.worker?.terminate();
    this.worker = null;
    this.forget();
    const waiting = [...this.waiting.values()];
    this.waiting.clear();
    for (const w of waiting) w.failed(new Error(message));
  }
}

const ROWS_AT_ONCE = 65536; // as a server sends them

/** Rows first <= row < last of what is drawn, to be given away; in `spare` where that has their size. */
function rowsOf(s: SplatScene, first: number, last: number, spare?: Rows): Rows {
  const widths = widthsOf(s.shDegree), cut = (name: Part) => {
    const from = s[name].subarray(widths[name] * first, widths[name] * last), into = spare?.[name];
    if (into?.length !== from.length) return from.slice();
    into.set(from);
    return into;
  };
  return { means: cut("means"), quats: cut("quats"), logScales: cut("logScales"), logitOpacities: cut("logitOpacities"), sh: cut("sh") };
}

function wasmBytes(): ArrayBuffer {
  return fromBase64(wasmUrl.slice(wasmUrl.indexOf(",") + 1)).buffer;
}
