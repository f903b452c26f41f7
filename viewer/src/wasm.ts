/** The CPU rasterizer of splatkit in WebAssembly: the same C++ as the native library (cuda/src/wasm.cpp), one thread. */
import { reasonOf } from "./errors";
import { DEFAULT_HEADER, PARTS, widthsOf, type Part, type Rows, type SplatScene } from "./scene";

export interface Picture {
  color: Float32Array; // H x W x 3, premultiplied, background shining through the rest
  alpha: Float32Array; // H x W
  expectedDepth: Float32Array; // H x W, sum w z / alpha where alpha > 1e-6, else 0; empty when no depth was asked for
  medianDepth: Float32Array; // H x W, z at which transmittance first is <= 0.5, 0 where it never is
}

export interface PixelWeights {
  rows: Uint32Array; // front to back
  w: Float32Array;
}

interface Exports {
  memory: WebAssembly.Memory;
  parameters_at(): number;
  allocate(bytes: number): number;
  mark(): number;
  release(mark: number): void;
  set_scene(n: number, shDegree: number, means: number, quats: number, logScales: number, logitOpacities: number, sh: number): void;
  set_attribute(attribute: number): void;
  prepare(width: number, height: number): number;
  blend(color: number, alpha: number, expectedDepth: number, medianDepth: number, features: number, channels: number, featuresOut: number): number;
  pairs_at(x: number, y: number): number;
  weights_at(x: number, y: number, rows: number, weights: number): number;
}

/** What hands rows over when it is transferred. */
export const buffersOf = (rows: Rows): ArrayBuffer[] => PARTS.map((name) => rows[name].buffer as ArrayBuffer);
export type Outline = Pick<SplatScene, "count" | "shDegree" | "header">; // a scene without its rows
const MEMORY_KEPT = 64 * 2 ** 20; // bytes that an instance may hold beyond four times its scene
const SIDE_MAX = 32768; // pixels; tiles are packed in 12 bits
const SETTINGS = 8; // doubles before the camera in `parameters`

export class WasmRaster {
  private exports: Exports | null = null;
  private count = 0;
  private widths = widthsOf(0);
  private places: Record<Part, number> = { ...this.widths }; // where each part stands
  private base = 0; // mark() before the scene
  private attributeAt = 0; // room for 3 numbers a Gaussian, 0 until one is set
  private sceneEnd = 0; // mark() behind the scene
  private frameEnd = 0; // mark() behind what prepare() made
  private prepared: string | null = null; // for which camera

  private constructor(private readonly module: WebAssembly.Module) {}

  /** Compiles the bytes of splat.wasm. Rejects where the browser has no WebAssembly SIMD. */
  static async load(bytes: BufferSource): Promise<WasmRaster> {
    try {
      return new WasmRaster(await WebAssembly.compile(bytes));
    } catch (why) {
      throw new Error(`the WebAssembly rasterizer does not load here: ${line(why)}; a browser with WebAssembly SIMD is needed`);
    }
  }

  /** Draws something small for so long, so that a first large picture finds fast code: browsers begin with quick code of half its speed, and a call that is under way stays in it to its end. */
  warmUp(ms = 20): void {
    const n = 2048, scatter = (step: number) => Float32Array.from({ length: 3 * n }, (_, i) => ((i * step) % 1) - 0.5), fill = (width: number, value: number) => new Float32Array(width * n).fill(value);
    this.setScene({ count: n, shDegree: 0, means: scatter(0.6180339887), quats: fill(4, 0.5), logScales: fill(3, -3.5), logitOpacities: fill(1, 0), sh: scatter(0.7548776662), header: DEFAULT_HEADER });
    for (const end = performance.now() + ms; performance.now() < end; this.prepared = null) this.render([1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1.5, 0, 0, 0, 1], [64, 0, 32, 0, 64, 24, 0, 0, 1], 64, 48, [0, 0, 0], false);
    this.exports = null;
  }

  /** Copies the scene in; what was drawn before is forgotten, and a raster that had stopped works again. */
  setScene(scene: SplatScene): void {
    const widths = checked(scene);
    for (const name of PARTS)
      if (scene[name].length !== scene.count * widths[name]) throw new Error(`scene.${name} holds ${scene[name].length} numbers; expected ${widths[name]} for each of ${scene.count} Gaussians`);
    this.makeRoom(scene);
    this.setRows(0, scene);
  }

  /** As setScene, for a scene whose rows come by setRows; until then they are whatever lay there. */
  makeRoom(scene: Outline): void {
    const { count: n, shDegree, header: h } = scene;
    this.widths = checked(scene);
    // Memory never shrinks: a scene much smaller than the one before gets an instance of its own, and the pages of the other go.
    const bytes = 4 * n * PARTS.reduce((sum, name) => sum + this.widths[name], 0);
    if (!this.exports || this.exports.memory.buffer.byteLength > 4 * bytes + MEMORY_KEPT) this.exports = new WebAssembly.Instance(this.module).exports as unknown as Exports;
    this.prepared = null;
    this.attributeAt = this.sceneEnd = 0;
    this.count = n;
    this.guarded((e) => {
      this.base ||= e.mark();
      e.release(this.base);
      for (const name of PARTS) this.places[name] = this.room(4 * this.widths[name] * n);
      const at = this.places;
      e.set_scene(n, shDegree, at.means, at.quats, at.logScales, at.logitOpacities, at.sh);
      this.sceneEnd = e.mark();
      new Float64Array(e.memory.buffer, e.parameters_at(), SETTINGS).set([h.near, h.blur_px2, h.antialias ? 1 : 0, h.alpha_min, h.alpha_max, h.transmittance_min, h.fov_margin, 0]);
    });
  }

  /** The scene's numbers of one part, as they lie in the module: to be read before the next call. */
  part(name: Part): Float32Array {
    return this.guarded((e) => new Float32Array(e.memory.buffer, this.places[name], this.widths[name] * this.count));
  }

  /** Other values for the rows from `first` on; arrays as in a scene, and those that are left out stay. */
  setRows(first: number, rows: Partial<Rows>): void {
    this.guarded((e) => {
      this.prepared = null;
      for (const name of PARTS) {
        const array = rows[name], width = this.widths[name];
        if (!array) continue;
        if (!(Number.isInteger(first) && first >= 0) || array.length % width || first + array.length / width > this.count)
          throw new Error(`${array.length} numbers of ${name} from row ${first} on; expected ${width} a row, within ${this.count} rows`);
        new Float32Array(e.memory.buffer, this.places[name] + 4 * width * first, array.length).set(array);
      }
    });
  }

  /** What is drawn as the three channels of `color` instead of the scene's colours: 3 numbers a Gaussian, of any sign; null is colour again. */
  setAttribute(rgb: Float32Array | null): void {
    if (rgb && rgb.length !== 3 * this.count) throw new Error(`the attribute holds ${rgb.length} numbers; expected 3 for each of ${this.count} Gaussians`);
    this.guarded((e) => {
      this.prepared = null;
      if (rgb && !this.attributeAt) {
        e.release(this.sceneEnd);
        this.attributeAt = this.room(rgb.byteLength);
        this.sceneEnd = e.mark();
      }
      if (rgb) new Float32Array(e.memory.buffer, this.attributeAt, rgb.length).set(rgb);
      e.set_attribute(rgb ? this.attributeAt : 0);
    });
  }

  /** One picture. Axes as everywhere in splatkit: OpenCV camera, world_to_cam 4 x 4 and K 3 x 3 row-major, pixel (0, 0) has its centre at (0.5, 0.5). */
  render(worldToCam: ArrayLike<number>, K: ArrayLike<number>, width: number, height: number, background: ArrayLike<number>, depth = true): Picture {
    return this.guarded((e) => {
      this.prepare(e, worldToCam, K, width, height);
      this.camera(e, 25, background, 3, "background");
      const pixels = width * height, at = [3, 1, depth ? 1 : 0, depth ? 1 : 0].map((channels) => (channels ? this.room(4 * channels * pixels) : 0));
      this.check(e.blend(at[0]!, at[1]!, at[2]!, at[3]!, 0, 0, 0));
      const map = (k: number, channels: number) => new Float32Array(e.memory.buffer, at[k]!, at[k] ? channels * pixels : 0).slice();
      return { color: map(0, 3), alpha: map(1, 1), expectedDepth: map(2, 1), medianDepth: map(3, 1) };
    });
  }

  /** Pictures [H, W, channels] of features [N, channels], weighted like colour, without a background. */
  renderFeatures(features: Float32Array, channels: number, worldToCam: ArrayLike<number>, K: ArrayLike<number>, width: number, height: number): Float32Array {
    if (!(channels >= 1) || features.length !== channels * this.count) throw new Error(`the features hold ${features.length} numbers; expected ${channels} for each of ${this.count} Gaussians`);
    return this.guarded((e) => {
      this.prepare(e, worldToCam, K, width, height);
      const given = this.put(features), alpha = this.room(4 * width * height), out = this.room(4 * channels * width * height);
      this.check(e.blend(0, alpha, 0, 0, given, channels, out));
      return new Float32Array(e.memory.buffer, out, channels * width * height).slice();
    });
  }

  /** The blending weights of pixel (x, y), front to back: color is their sum times the Gaussians' colours. After a render() of the same camera this costs little. */
  weights(x: number, y: number, worldToCam: ArrayLike<number>, K: ArrayLike<number>, width: number, height: number): PixelWeights {
    if (!(Number.isInteger(x) && Number.isInteger(y) && x >= 0 && y >= 0 && x < width && y < height)) throw new Error(`pixel (${x}, ${y}) is outside the picture of ${width} x ${height}`);
    return this.guarded((e) => {
      this.prepare(e, worldToCam, K, width, height);
      const most = e.pairs_at(x, y), rows = this.room(4 * most), w = this.room(4 * most), n = e.weights_at(x, y, rows, w);
      return { rows: new Uint32Array(e.memory.buffer, rows, n).slice(), w: new Float32Array(e.memory.buffer, w, n).slice() };
    });
  }

  /** Projects, sorts and bins, unless that was done for this camera; then frees what came after. */
  private prepare(e: Exports, worldToCam: ArrayLike<number>, K: ArrayLike<number>, width: number, height: number): void {
    if (![width, height].every((side) => Number.isInteger(side) && side >= 1 && side <= SIDE_MAX)) throw new Error(`a picture of ${width} x ${height} pixels; expected 1 to ${SIDE_MAX} a side`);
    const key = JSON.stringify([Array.from(worldToCam), Array.from(K), width, height]);
    if (this.prepared === key) return e.release(this.frameEnd);
    this.prepared = null;
    e.release(this.sceneEnd);
    this.camera(e, 0, worldToCam, 16, "world_to_cam");
    this.camera(e, 16, K, 9, "K");
    if (!(K[0]! > 0 && K[4]! > 0)) throw new Error(`focal lengths ${K[0]}, ${K[4]}; expected both > 0 (pixels)`);
    this.check(e.prepare(width, height));
    this.frameEnd = e.mark();
    this.prepared = key;
  }

  private camera(e: Exports, first: number, numbers: ArrayLike<number>, expected: number, name: string): void {
    if (numbers.length !== expected || !Array.from(numbers).every(Number.isFinite)) throw new Error(`${name} is [${Array.from(numbers).slice(0, 16).join(", ")}]; expected ${expected} finite numbers`);
    new Float32Array(e.memory.buffer, e.parameters_at() + 8 * SETTINGS + 4 * first, expected).set(numbers);
  }

  /** Runs a call of the module. What stops it (a trap) throws the instance away: its memory may be in any state. */
  private guarded<T>(call: (e: Exports) => T): T {
    if (!this.exports) throw new Error("the rasterizer holds no scene; call setScene first");
    try {
      return call(this.exports);
    } catch (why) {
      if (why instanceof OutOfMemory) {
        if (this.sceneEnd === 0) this.exports = null; // the scene itself does not fit
        this.prepared = null;
      } else if (why instanceof WebAssembly.RuntimeError || why instanceof RangeError) {
        this.exports = null;
        throw new Error(`the rasterizer stopped (${line(why)}); load the scene again`);
      }
      throw why;
    }
  }

  private room(bytes: number): number {
    const at = bytes < 2 ** 32 ? this.exports!.allocate(bytes) >>> 0 : 0;
    if (!at) throw new OutOfMemory(`no room for ${Math.ceil(bytes / 2 ** 20)} MB more`);
    return at;
  }

  private put(array: Float32Array): number {
    const at = this.room(array.byteLength);
    new Float32Array(this.exports!.memory.buffer, at, array.length).set(array);
    return at;
  }

  private check(status: number): void {
    if (status < 0) throw new OutOfMemory(`no room for this view of ${this.count} Gaussians`);
  }
}

/** The widths of a scene that can be drawn. */
function checked({ count, shDegree }: Outline): Record<Part, number> {
  if (!Number.isInteger(count) || count < 0 || ![0, 1, 2, 3].includes(shDegree)) throw new Error(`a scene of ${count} Gaussians and SH degree ${shDegree}; expected a count and a degree of 0 to 3`);
  return widthsOf(shDegree);
}

class OutOfMemory extends Error {
  constructor(what: string) {
    super(`${what}: WebAssembly memory is at its limit; draw fewer Gaussians or a smaller picture`);
  }
}

function line(why: unknown): string {
  return reasonOf(why).split("\n", 1)[0]!;
}
