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

/** What only the splat pass needs, made when it first draws: where WebAssembly draws, no shader is compiled and no scene uploaded. */
class Drawing {
  readonly pass: SplatPass;
  readonly resolve: Program;
  readonly ramp: WebGLTexture;
  readonly sums: Target;
  readonly point: Target;
  readonly shot: Target;
  readonly nothing: WebGLVertexArrayObject;

  constructor(gl: GL, exact: boolean) {
    if (!gl.getExtension("EXT_color_buffer_float")) throw new Error("this browser cannot draw into float textures");
    const floatBlend = gl.getExtension("EXT_float_blend");
    this.pass = new SplatPass(gl, exact);
    this.resolve = new Program(gl, FULL, RESOLVE);
    this.sums = new Target(gl, gl.RGBA16F);
    this.point = new Target(gl, floatBlend ? gl.RGBA32F : gl.RGBA16F);
    this.shot = new Target(gl, gl.RGBA8);
    this.nothing = gl.createVertexArray();
    this.ramp = makeTexture(gl, gl.TEXTURE_2D, gl.LINEAR);
    plainUploads(gl);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, RAMP);
  }
}

export class GlEngine {
  private made: Drawing | null = null;
  private readonly picture: Target;
  private scene: SplatScene | null = null;
  private attribute: Float32Array | null = null; // to be uploaded
  private stale: [number, number] | "all" | null = null; // rows that the textures do not have as the scene has them
  private ordered: View | null = null;
  private asking = false;
  private stamp = 0; // of the rows that an order is of

  /** `exact` blends colours in half floats; without it they go straight to the canvas, 8 bits, and exp2 is a polynomial, which software renderers do faster. */
  constructor(private readonly gl: GL, private readonly orders: OrderClient, private readonly exact: boolean, private readonly changed: () => void) {
    this.picture = new Target(gl, gl.RGBA8);
  }

  setScene(scene: SplatScene): void {
    [this.scene, this.stale, this.attribute] = [scene, "all", null];
    this.reorder();
  }
  update(first: number, last: number): void {
    if (this.stale !== "all") this.stale = this.stale ? [Math.min(first, this.stale[0]), Math.max(last, this.stale[1])] : [first, last];
    this.reorder();
  }
  setAttribute(values: Float32Array): void {
    this.attribute = values;
  }
  /** With the textures as the scene is. */
  private get drawing(): Drawing {
    const made = (this.made ??= new Drawing(this.gl, this.exact));
    if (this.scene && this.stale === "all") made.pass.setScene(this.scene);
    else if (this.stale && this.stale !== "all") made.pass.update(...this.stale);
    if (this.attribute) made.pass.setAttribute(this.attribute);
    this.stale = this.attribute = null;
    return made;
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
    this.drawing.pass.setOrder(order);
    this.ordered = view;
  }

  /** Draws to the canvas, or to `target`. */
  draw(view: View, shot: Shot, target: (() => void) | null = null): void {
    const { gl, drawing } = this, [r, g, b] = shot.background;
    const onto = target ?? (() => (gl.bindFramebuffer(gl.FRAMEBUFFER, null), gl.viewport(0, 0, view.width, view.height)));
    const clear = (bind: () => void, color: [number, number, number, number]) => () => {
      bind();
      gl.clearColor(...color);
      gl.clear(gl.COLOR_BUFFER_BIT);
    };
    if (!this.exact && shot.look === "colour") return drawing.pass.draw(view, "colour", clear(onto, [r, g, b, 1]));
    drawing.pass.draw(view, kindOf(shot.look), clear(() => drawing.sums.bind(view.width, view.height), [0, 0, 0, 0]), shot.look === "depth");
    onto();
    this.show(drawing, shot);
  }

  /** Puts ready pixels, top row first, on the canvas: copied upside down and stretched, without a shader, which software renderers would have to compile. */
  present(pixels: Uint8ClampedArray, width: number, height: number, canvasWidth: number, canvasHeight: number): void {
    const { gl, picture } = this;
    plainUploads(gl);
    picture.bind(width, height);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D, picture.textures[0]!);
    gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(pixels.buffer));
    gl.bindFramebuffer(gl.DRAW_FRAMEBUFFER, null);
    gl.disable(gl.SCISSOR_TEST);
    gl.colorMask(true, true, true, true);
    gl.clear(gl.COLOR_BUFFER_BIT); // Chromium empties a canvas that it has shown before the next drawing, but counts a copy as none
    gl.blitFramebuffer(0, 0, width, height, 0, canvasHeight, canvasWidth, 0, gl.COLOR_BUFFER_BIT, width === canvasWidth && height === canvasHeight ? gl.NEAREST : gl.LINEAR);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.viewport(0, 0, canvasWidth, canvasHeight);
  }

  private show(drawing: Drawing, shot: Shot): void {
    const { gl } = this, p = drawing.resolve.use(), [low, high] = shot.reading.range;
    gl.disable(gl.BLEND);
    gl.colorMask(true, true, true, true);
    p.texture("sums", 0, gl.TEXTURE_2D, drawing.sums.textures[0]!);
    p.texture("ramp", 1, gl.TEXTURE_2D, drawing.ramp);
    gl.uniform3f(p.at("background"), ...shot.background);
    gl.uniform2f(p.at("range"), low, 1 / Math.max(high - low, 1e-30));
    gl.uniform1i(p.at("look"), MODES[shot.reading.mode]);
    gl.bindVertexArray(drawing.nothing);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    gl.bindVertexArray(null);
  }

  /** Expected depth at pixel (x, y), 0 where there is nothing. The order shall be that of the view. */
  depthAt(view: View, x: number, y: number): number {
    const { gl, drawing } = this, out = new Float32Array(4);
    const bind = () => {
      drawing.point.bind(1, 1);
      gl.clearColor(0, 0, 0, 0);
      gl.clear(gl.COLOR_BUFFER_BIT);
    };
    drawing.pass.draw(view, "colour", bind, true, [view.width / 2 - x - 0.5, view.height / 2 - y - 0.5], [1, 1]);
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
    this.draw(view, shot, () => this.made!.shot.bind(width, height));
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
