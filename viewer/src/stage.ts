/** The canvas: draws when something changed and not otherwise, by WebGL2 or by the WebAssembly rasterizer, with lines and labels over it. */
import { OrderClient, RasterClient } from "./clients";
import { reasonOf } from "./errors";
import { GlEngine, type Shot } from "./gl/engine";
import { readingOf, type Look, type Rgb } from "./mapping";
import { sameView, type View } from "./pose";
import type { SplatScene } from "./scene";

export type BackendChoice = "auto" | "webgl" | "wasm";
const SLOW_MS = 120; // of a WebGL2 frame, above which the WebAssembly rasterizer is tried
const MORE_MS = 1000; // that the picture of a run waits for the rest of an update: drawn after each part, a million Gaussians keep a core busy
const MOVING_MS = 70; // of a WebAssembly frame while the camera moves: fewer pixels hold it

/** After a frame: the canvas shows the view, shows it nearly, shows what it did before, or nothing had changed. */
type State = "done" | "drawn" | "waits" | "kept";

interface Drawn {
  view: View;
  key: string;
  pixels: Uint8ClampedArray<ArrayBuffer>;
  width: number;
  height: number;
}

export class Stage {
  readonly gl: WebGL2RenderingContext;
  readonly software: boolean;
  readonly renderer: string;
  private readonly orders = new OrderClient();
  private readonly raster = new RasterClient();
  private engine: GlEngine | null = null;
  private scene: SplatScene | null = null;
  private choice: BackendChoice = "auto";
  private slow = false;
  private broken = false; // the WebAssembly rasterizer stopped over this scene
  private attributeValues: Float32Array | null = null;
  private attributeStamp = 0;
  private rowsStamp = 0;
  private drawn: Drawn | null = null; // by WebAssembly
  private presented: Drawn | null = null;
  private dirty = true;
  private blank = true; // the canvas was resized and lost its picture
  private complete = false; // the canvas shows the view
  private rendering = false;
  private scale = 1;
  private movedAt = 0;
  private lastView: View | null = null;
  private scheduled = false;
  private waiters: (() => void)[] = [];
  private timed = 0;
  private waiting = 0; // timer of rows that changed and are not drawn
  look: Look = "colour";
  range: [number, number] = [0, 1];
  background: Rgb = [0, 0, 0];
  empty: Rgb = [0, 0, 0]; // shown where there is no scene
  frames = 0;
  frameMs = 0;

  /** `view` says what is to be seen; `over` draws on top of it, `failed` gets what went wrong in a line. */
  constructor(readonly canvas: HTMLCanvasElement, private readonly view: () => View, private readonly over: (view: View) => void, private readonly failed: (message: string) => void) {
    this.raster.start(); // beside the graphics process, which is long in making a context
    const gl = canvas.getContext("webgl2", { alpha: false, antialias: false, depth: false, powerPreference: "high-performance" });
    if (!gl) throw new Error("this browser offers no WebGL2, which the viewer draws with; try a current Firefox, Chrome, Edge or Safari");
    this.gl = gl;
    const info = gl.getExtension("WEBGL_debug_renderer_info");
    this.renderer = String(gl.getParameter(info ? info.UNMASKED_RENDERER_WEBGL : gl.RENDERER));
    this.software = /swiftshader|llvmpipe|softpipe|software|basic render/i.test(this.renderer);
    if (this.software) this.raster.warmUp();
    this.start();
    canvas.addEventListener("webglcontextlost", (event) => {
      event.preventDefault();
      this.engine = null;
      this.failed("The graphics context was lost. Waiting for the browser to give it back; your view and edits are kept.");
    });
    canvas.addEventListener("webglcontextrestored", () => {
      this.start();
      this.failed("");
    });
  }

  private start(): void {
    try {
      this.engine = new GlEngine(this.gl, this.orders, !this.software, () => this.invalidate());
      if (this.scene) this.engine.setScene(this.scene);
      if (this.scene && this.attributeValues) this.engine.setAttribute(this.attributeValues);
    } catch (why) {
      this.failed(reasonOf(why));
    }
    this.invalidate();
  }

  get backend(): "webgl" | "wasm" {
    if (this.broken) return "webgl";
    return this.choice === "auto" ? (this.software || this.slow ? "wasm" : "webgl") : this.choice;
  }
  setBackend(choice: BackendChoice): void {
    this.choice = choice;
    this.slow = this.broken = false;
    this.invalidate();
  }

  setScene(scene: SplatScene): void {
    this.scene = scene;
    this.attributeValues = null;
    this.orders.setScene(scene);
    this.raster.setScene(scene);
    this.engine?.setScene(scene);
    this.drawn = null;
    this.broken = false;
    this.timed = 0;
    this.changedRows();
    queueMicrotask(() => this.begin()); // once the camera stands
  }
  /** Has WebAssembly draw without waiting for the browser's next frame, which comes late while a page is young. */
  private begin(): void {
    const view = this.view();
    if (this.backend === "wasm" && !this.rendering && view.width > 1 && this.scene?.count) void this.renderByWasm(view, this.key(), 1);
  }
  /** Rows changed; with `more` of them on the way the picture waits for those, a little. */
  update(first: number, last: number, more = false): void {
    this.orders.update(first, last);
    this.raster.update(first, last);
    this.engine?.update(first, last);
    if (!more) this.changedRows();
    else this.waiting ||= window.setTimeout(() => this.changedRows(), MORE_MS);
  }
  setVisible(visible: Uint8Array | null): void {
    this.orders.setVisible(visible);
    this.raster.setVisible(visible);
    this.engine?.reorder();
    this.changedRows();
  }
  setAttribute(values: Float32Array): void {
    this.attributeValues = values;
    this.engine?.setAttribute(values);
    this.raster.setAttribute(values);
    this.attributeStamp++;
    this.invalidate();
  }
  private changedRows(): void {
    clearTimeout(this.waiting);
    this.waiting = 0;
    this.rowsStamp++;
    this.invalidate();
  }

  /** Something is to be drawn anew. */
  invalidate(): void {
    this.dirty = true;
    this.schedule();
  }
  private schedule(): void {
    if (this.scheduled) return;
    this.scheduled = true;
    requestAnimationFrame(() => {
      this.scheduled = false;
      this.frame();
    });
  }

  /** When the canvas shows what it should, and no work is under way. */
  settled(): Promise<void> {
    return new Promise((done) => {
      this.waiters.push(done);
      this.schedule();
    });
  }

  shot(): Shot {
    return { look: this.look, reading: readingOf(this.look, this.range), background: this.background };
  }
  private key(): string {
    return JSON.stringify([this.look, this.range, this.background, this.attributeStamp, this.rowsStamp]);
  }

  private frame(): void {
    const view = this.view();
    if (!this.engine || this.gl.isContextLost() || view.width < 1 || view.height < 1) return;
    if (this.canvas.width !== view.width || this.canvas.height !== view.height) [this.canvas.width, this.canvas.height, this.dirty, this.blank] = [view.width, view.height, true, true];
    if (!sameView(view, this.lastView)) [this.lastView, this.movedAt, this.dirty] = [view, performance.now(), true];
    try {
      const before = this.dirty;
      this.dirty = false;
      const state = before || !this.complete ? (!this.scene ? this.clear() : this.backend === "wasm" ? this.frameByWasm(view, before) : this.frameByGl(view)) : "kept";
      if (state !== "kept" && state !== "waits") {
        this.over(view);
        this.blank = false;
        this.frames++;
      }
      if (state !== "kept") this.complete = state === "done";
      if (this.complete && !this.scheduled) for (const waiter of this.waiters.splice(0)) waiter();
    } catch (why) {
      this.failed(reasonOf(why));
    }
  }

  private frameByGl(view: View): State {
    const engine = this.engine!, ready = engine.ready(view), start = performance.now();
    // A software renderer has better to do than to draw in an order that is about to change.
    if (!ready && this.software && !this.blank) return "waits";
    engine.draw(view, this.shot());
    if (this.choice === "auto" && ready && this.timed < 3) {
      engine.canvasPixels(1, 1); // waits for the picture
      const ms = performance.now() - start;
      this.frameMs = ms;
      if (++this.timed > 1 && ms > SLOW_MS) this.slow = true;
      if (this.slow) this.invalidate();
    }
    return ready ? "done" : "drawn";
  }

  private clear(): State {
    const { gl } = this;
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.clearColor(...this.empty, 1);
    gl.clear(gl.COLOR_BUFFER_BIT);
    return "done";
  }

  private frameByWasm(view: View, dirty: boolean): State {
    const key = this.key(), d = this.drawn, moving = performance.now() - this.movedAt < 150;
    const current = !!d && d.key === key && sameView(d.view, view), whole = current && d.width === view.width;
    if (!whole && !this.rendering) {
      if (current && moving) setTimeout(() => this.invalidate(), 160); // then at full size
      else void this.renderByWasm(view, key, moving && !!d ? this.scale : 1);
    }
    // A picture is shown once, and again where lines over it changed; what is older than the view waits for the next.
    if (!d || (d === this.presented && !this.blank && !(dirty && current))) return whole ? "done" : "waits";
    this.engine!.present(d.pixels, d.width, d.height, view.width, view.height);
    this.presented = d;
    return whole ? "done" : "drawn";
  }

  private async renderByWasm(view: View, key: string, scale: number): Promise<void> {
    this.rendering = true;
    const s = this.shot();
    try {
      const p = await this.raster.render(smaller(view, scale), attributeOf(s.look), s.reading, s.background);
      this.drawn = { view, key, pixels: p.pixels, width: p.width, height: p.height };
      this.frameMs = p.ms;
      this.scale = Math.min(1, Math.max(0.3, scale * Math.sqrt(MOVING_MS / Math.max(p.ms, 1))));
      if (this.scale > 0.85) this.scale = 1;
    } catch (why) {
      this.failed(`${reasonOf(why)}. Drawing by the GPU instead.`);
      this.broken = true;
    }
    this.rendering = false;
    this.invalidate();
  }

  /** Expected depth under pixel (x, y) of the canvas; 0 where there is nothing. */
  async depthAt(x: number, y: number): Promise<number> {
    const view = this.view();
    if (!this.scene || !this.engine) return 0;
    if (this.backend === "wasm") return (await this.raster.weights(view, x, y)).depth;
    return this.engine.ready(view) ? this.engine.depthAt(view, x, y) : 0;
  }

  /** Blending weights of pixel (x, y), by the WebAssembly rasterizer whatever draws. */
  weightsAt(x: number, y: number): Promise<{ rows: Uint32Array; w: Float32Array; depth: number }> {
    return this.raster.weights(this.view(), x, y);
  }

  /** A picture of another view or size: 8-bit pixels, top row first; `exact` by the WebAssembly rasterizer whatever draws. */
  async capture(view: View, shot: Shot = this.shot(), exact = false): Promise<ImageData> {
    let pixels: Uint8ClampedArray<ArrayBuffer>;
    if (exact || this.backend === "wasm") pixels = (await this.raster.render(view, attributeOf(shot.look), shot.reading, shot.background)).pixels;
    else {
      if (!this.engine) throw new Error("the graphics context is lost; try again in a moment");
      pixels = await this.engine.capture(view, shot);
      this.invalidate();
    }
    return new ImageData(pixels, view.width, view.height);
  }

  /** What the canvas shows now. */
  async pixels(): Promise<ImageData> {
    await this.settled();
    this.invalidate();
    this.frame();
    const { width, height } = this.canvas;
    return new ImageData(this.engine!.canvasPixels(width, height), width, height);
  }
}

/** What the WebAssembly rasterizer blends for a look. */
const attributeOf = (look: Look) => (look === "colour" || look === "alpha" ? "colour" : look === "depth" || look === "normal" ? look : "attribute");

function smaller(view: View, scale: number): View {
  if (scale === 1) return view;
  const width = Math.max(1, Math.round(view.width * scale)), height = Math.max(1, Math.round(view.height * scale)), sx = width / view.width, sy = height / view.height;
  return { ...view, K: view.K.map((v, i) => v * (i < 3 ? sx : i < 6 ? sy : 1)), width, height };
}
