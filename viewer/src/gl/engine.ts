/** Pictures by WebGL2: the splat pass in the order of its worker, then what its sums mean. */
import type { Look, Reading, Rgb } from "../mapping";
import { RAMP } from "../mapping";
import { sameView, type View } from "../pose";
import type { SplatScene } from "../scene";
import type { OrderClient } from "../clients";
import { makeTexture, plainUploads, Program, Target, type GL } from "./programs";
import { FULL, RESOLVE } from "./shaders";
import { SplatPass, type Kind } from "./splats";

/** What of a scene is drawn, and how it is read. */
export interface Shot {
  look: Look;
  reading: Reading;
  background: Rgb;
}

const MODES = { colour: 0, alpha: 1, ramp: 2, normal: 3 };
const kindOf = (look: Look): Kind => (look === "normal" ? "normal" : look === "heat" || look === "features" || look === "similarity" ? "attribute" : "colour");

export class GlEngine {
  private readonly pass: SplatPass;
  private readonly resolve: Program;
  private readonly ramp: WebGLTexture;
  private readonly sums: Target;
  private readonly point: Target;
  private readonly shotTarget: Target;
  private readonly picture: WebGLTexture;
  private readonly nothing: WebGLVertexArrayObject;
  private ordered: View | null = null;
  private asking = false;
  private stamp = 0; // of the rows that an order is of

  /** `exact` blends colours in half floats; without it they go straight to the canvas, 8 bits, which software renderers do faster. */
  constructor(private readonly gl: GL, private readonly orders: OrderClient, private readonly exact: boolean, private readonly changed: () => void) {
    if (!gl.getExtension("EXT_color_buffer_float")) throw new Error("this browser cannot draw into float textures");
    const floatBlend = gl.getExtension("EXT_float_blend");
    this.pass = new SplatPass(gl);
    this.resolve = new Program(gl, FULL, RESOLVE);
    this.sums = new Target(gl, gl.RGBA16F);
    this.point = new Target(gl, floatBlend ? gl.RGBA32F : gl.RGBA16F);
    this.shotTarget = new Target(gl, gl.RGBA8);
    this.picture = makeTexture(gl, gl.TEXTURE_2D, gl.LINEAR);
    this.nothing = gl.createVertexArray();
    this.ramp = makeTexture(gl, gl.TEXTURE_2D, gl.LINEAR);
    plainUploads(gl);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, RAMP);
  }

  setScene(scene: SplatScene): void {
    this.pass.setScene(scene);
    this.reorder();
  }
  update(first: number, last: number): void {
    this.pass.update(first, last);
    this.reorder();
  }
  setAttribute(values: Float32Array): void {
    this.pass.setAttribute(values);
  }
  /** The order is no longer that of the rows. */
  reorder(): void {
    this.stamp++;
    this.ordered = null;
  }

  /** Whether the order is that of the view; if not, asks for it. */
  ready(view: View): boolean {
    if (sameView(this.ordered, view)) return true;
    if (!this.asking) void this.order(view).then(this.changed);
    return false;
  }
  get busy(): boolean {
    return this.asking;
  }

  private async order(view: View): Promise<void> {
    this.asking = true;
    const stamp = this.stamp, order = await this.orders.order(view);
    this.asking = false;
    if (stamp !== this.stamp) return;
    this.pass.setOrder(order);
    this.ordered = view;
  }

  /** Draws to the canvas, or to `target`. */
  draw(view: View, shot: Shot, target: (() => void) | null = null): void {
    const { gl } = this, [r, g, b] = shot.background;
    const onto = target ?? (() => (gl.bindFramebuffer(gl.FRAMEBUFFER, null), gl.viewport(0, 0, view.width, view.height)));
    const clear = (bind: () => void, color: [number, number, number, number]) => () => {
      bind();
      gl.clearColor(...color);
      gl.clear(gl.COLOR_BUFFER_BIT);
    };
    if (!this.exact && shot.look === "colour") return this.pass.draw(view, "colour", clear(onto, [r, g, b, 1]));
    this.pass.draw(view, kindOf(shot.look), clear(() => this.sums.bind(view.width, view.height), [0, 0, 0, 0]), shot.look === "depth");
    onto();
    this.show(this.sums.textures[0]!, MODES[shot.reading.mode], shot, view.width, view.height);
  }

  /** Puts ready pixels, top row first, on the canvas. */
  present(pixels: Uint8ClampedArray, width: number, height: number, canvasWidth: number, canvasHeight: number): void {
    const { gl } = this;
    plainUploads(gl);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D, this.picture);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, width, height, 0, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(pixels.buffer));
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.viewport(0, 0, canvasWidth, canvasHeight);
    for (const state of [gl.DEPTH_TEST, gl.CULL_FACE, gl.SCISSOR_TEST, gl.STENCIL_TEST, gl.BLEND]) gl.disable(state);
    this.show(this.picture, 4, null, canvasWidth, canvasHeight);
  }

  private show(texture: WebGLTexture, look: number, shot: Shot | null, width: number, height: number): void {
    const { gl } = this, p = this.resolve.use(), [low, high] = shot?.reading.range ?? [0, 1];
    gl.disable(gl.BLEND);
    gl.colorMask(true, true, true, true);
    p.texture("sums", 0, gl.TEXTURE_2D, texture);
    p.texture("ramp", 1, gl.TEXTURE_2D, this.ramp);
    gl.uniform3f(p.at("background"), ...(shot?.background ?? [0, 0, 0]));
    gl.uniform2f(p.at("range"), low, 1 / Math.max(high - low, 1e-30));
    gl.uniform2f(p.at("size"), width, height);
    gl.uniform1i(p.at("look"), look);
    gl.bindVertexArray(this.nothing);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    gl.bindVertexArray(null);
  }

  /** Expected depth at pixel (x, y), 0 where there is nothing. The order shall be that of the view. */
  depthAt(view: View, x: number, y: number): number {
    const { gl } = this, out = new Float32Array(4);
    const bind = () => {
      this.point.bind(1, 1);
      gl.clearColor(0, 0, 0, 0);
      gl.clear(gl.COLOR_BUFFER_BIT);
    };
    this.pass.draw(view, "colour", bind, true, [view.width / 2 - x - 0.5, view.height / 2 - y - 0.5], [1, 1]);
    gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.FLOAT, out);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    return out[3]! > 1e-3 ? out[0]! / out[3]! : 0;
  }

  /** A picture that is not for the canvas: 8-bit pixels, top row first. */
  async capture(view: View, shot: Shot): Promise<Uint8ClampedArray<ArrayBuffer>> {
    while (this.asking) await new Promise((done) => setTimeout(done, 5));
    do await this.order(view);
    while (!sameView(this.ordered, view));
    const { gl } = this, { width, height } = view, pixels = new Uint8Array(4 * width * height);
    this.draw(view, shot, () => this.shotTarget.bind(width, height));
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    return upright(pixels, width, height);
  }

  /** What the canvas shows, if read in the task that drew it. */
  canvasPixels(width: number, height: number): Uint8ClampedArray<ArrayBuffer> {
    const { gl } = this, pixels = new Uint8Array(4 * width * height);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
    return upright(pixels, width, height);
  }
}

function upright(pixels: Uint8Array, width: number, height: number): Uint8ClampedArray<ArrayBuffer> {
  const out = new Uint8ClampedArray(pixels.length);
  for (let y = 0; y < height; y++) out.set(pixels.subarray(4 * width * (height - 1 - y), 4 * width * (height - y)), 4 * width * y);
  for (let i = 3; i < out.length; i += 4) out[i] = 255;
  return out;
}
