/** The splat pass: a scene in textures, projected once a view and blended as batched quads in the order it is given. Raw WebGL2. */
import { bandsOf, type SplatScene } from "../scene";
import { centreOf, type View } from "../pose";
import { FULL, PROJECT, splatFragment, SPLAT_VERTEX } from "./shaders";
import { makeTexture, plainUploads, Program, Target, type GL } from "./programs";

const WIDTH = 2048; // Gaussians a row of the textures, and quads an instance
export type Kind = "colour" | "attribute" | "normal";
const KINDS: Kind[] = ["colour", "attribute", "normal"];

export class SplatPass {
  private readonly projector: Program;
  private readonly splatter: Program;
  private readonly records: Target;
  private readonly quads: WebGLVertexArrayObject;
  private readonly nothing: WebGLVertexArrayObject;
  private base: WebGLTexture | null = null;
  private bands: WebGLTexture | null = null;
  private readonly attribute: WebGLTexture;
  private readonly orderTexture: WebGLTexture;
  private orderRows = 0;
  private attributeRows = 0;
  private scene: SplatScene | null = null;
  private projected = "";
  drawn = 0;

  constructor(private readonly gl: GL, exact: boolean) {
    this.projector = new Program(gl, FULL, PROJECT);
    this.splatter = new Program(gl, SPLAT_VERTEX, splatFragment(exact));
    this.records = new Target(gl, gl.RGBA32F, 3);
    this.attribute = makeTexture(gl, gl.TEXTURE_2D);
    this.orderTexture = makeTexture(gl, gl.TEXTURE_2D);
    this.nothing = gl.createVertexArray();
    this.quads = gl.createVertexArray();
    gl.bindVertexArray(this.quads);
    const indices = new Uint16Array(6 * WIDTH);
    for (let q = 0; q < WIDTH; q++) indices.set([0, 1, 2, 2, 1, 3].map((k) => 4 * q + k), 6 * q);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, indices, gl.STATIC_DRAW);
    gl.bindVertexArray(null);
  }

  /** The most Gaussians that the textures of this device hold. */
  get capacity(): number {
    return WIDTH * (this.gl.getParameter(this.gl.MAX_TEXTURE_SIZE) as number);
  }

  setScene(scene: SplatScene): void {
    const { gl } = this, rows = Math.max(1, Math.ceil(scene.count / WIDTH)), layers = this.bandLayers(scene);
    if (scene.count > this.capacity) throw new Error(`${scene.count} Gaussians; this device holds ${this.capacity} at most`);
    for (const texture of [this.base, this.bands]) if (texture) gl.deleteTexture(texture);
    this.base = makeTexture(gl, gl.TEXTURE_2D_ARRAY);
    gl.texStorage3D(gl.TEXTURE_2D_ARRAY, 1, gl.RGBA32F, WIDTH, rows, 4);
    this.bands = makeTexture(gl, gl.TEXTURE_2D_ARRAY);
    gl.texStorage3D(gl.TEXTURE_2D_ARRAY, 1, gl.RGBA16F, layers ? WIDTH : 1, layers ? rows : 1, layers || 1);
    this.scene = scene;
    this.drawn = this.attributeRows = 0;
    this.update(0, scene.count);
  }

  /** Reads rows first <= row < last of the scene anew. */
  update(first: number, last: number): void {
    const scene = this.scene!, stride = 3 * bandsOf(scene.shDegree), { means, quats, logScales, logitOpacities, sh } = scene;
    this.projected = "";
    this.upload(this.base!, 4, first, last, (layer, row, out, at) => {
      if (layer === 0) for (let k = 0; k < 4; k++) out[at + k] = k < 3 ? means[3 * row + k]! : logitOpacities[row]!;
      else if (layer === 1) for (let k = 0; k < 4; k++) out[at + k] = quats[4 * row + k]!;
      else if (layer === 2) for (let k = 0; k < 4; k++) out[at + k] = k < 3 ? logScales[3 * row + k]! : 0;
      else for (let k = 0; k < 3; k++) out[at + k] = sh[stride * row + k]!;
    });
    this.upload(this.bands!, this.bandLayers(scene), first, last, (layer, row, out, at) => {
      for (let k = 0, from = 3 + 4 * layer; k < 4; k++, from++) out[at + k] = from < stride ? sh[stride * row + from]! : 0;
    });
  }

  /** Three numbers a Gaussian, blended where a view asks for them. */
  setAttribute(values: Float32Array): void {
    const { gl } = this, n = this.scene!.count, rows = Math.max(1, Math.ceil(n / WIDTH)), data = new Float32Array(4 * WIDTH * rows);
    for (let i = 0; i < n; i++) for (let k = 0; k < 3; k++) data[4 * i + k] = values[3 * i + k]!;
    plainUploads(gl);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D, this.attribute);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, WIDTH, rows, 0, gl.RGBA, gl.FLOAT, data);
    this.attributeRows = rows;
    this.projected = "";
  }

  /** Rows to draw, nearest first. */
  setOrder(order: Uint32Array): void {
    const { gl } = this, rows = Math.ceil(order.length / WIDTH);
    this.drawn = order.length;
    if (!rows) return;
    plainUploads(gl);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D, this.orderTexture);
    if (rows > this.orderRows) {
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.R32UI, WIDTH, rows, 0, gl.RED_INTEGER, gl.UNSIGNED_INT, null);
      this.orderRows = rows;
    }
    const whole = Math.floor(order.length / WIDTH);
    if (whole) gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, WIDTH, whole, gl.RED_INTEGER, gl.UNSIGNED_INT, order, 0);
    if (rows > whole) gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, whole, order.length - whole * WIDTH, 1, gl.RED_INTEGER, gl.UNSIGNED_INT, order, whole * WIDTH);
  }

  /** Makes the records of a view, unless they are there. */
  private project(view: View, kind: Kind): void {
    const scene = this.scene!, { gl } = this, { K, worldToCam: w, width, height } = view, h = scene.header;
    const key = `${kind} ${width} ${height} ${K.join()} ${w.join()}`;
    if (key === this.projected) return;
    this.records.bind(WIDTH, Math.max(1, Math.ceil(scene.count / WIDTH)));
    const p = this.projector.use();
    p.texture("base", 0, gl.TEXTURE_2D_ARRAY, this.base!);
    p.texture("bands", 1, gl.TEXTURE_2D_ARRAY, this.bands!);
    p.texture("instead", 2, gl.TEXTURE_2D, this.attribute);
    [0, 1, 2].forEach((i) => gl.uniform3f(p.at(`row${i}`), w[4 * i]!, w[4 * i + 1]!, w[4 * i + 2]!));
    gl.uniform3f(p.at("centre"), ...centreOf(w));
    gl.uniform4f(p.at("lens"), K[0]!, K[4]!, K[2]! - width / 2, K[5]! - height / 2);
    const margin = Math.min(h.fov_margin, 1e18), mx = (margin * 0.5 * width) / K[0]!, my = (margin * 0.5 * height) / K[4]!;
    gl.uniform4f(p.at("limits"), -K[2]! / K[0]! - mx, (width - K[2]!) / K[0]! + mx, -K[5]! / K[4]! - my, (height - K[5]!) / K[4]! + my);
    gl.uniform4f(p.at("settings"), h.blur_px2, cutOf(scene), h.antialias ? 1 : 0, h.near);
    gl.uniform1i(p.at("count"), scene.count);
    gl.uniform1i(p.at("degree"), scene.shDegree);
    gl.uniform1i(p.at("kind"), kind === "attribute" && !this.attributeRows ? 0 : KINDS.indexOf(kind));
    gl.disable(gl.BLEND);
    gl.bindVertexArray(this.nothing);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    this.projected = key;
  }

  /** Blends into the target that `bind` binds and clears, back to front: sums of w times what is blended, and alpha. A depth pass sums w z. */
  draw(view: View, kind: Kind, bind: () => void, depth = false, shift: [number, number] = [0, 0], size: [number, number] = [view.width, view.height]): void {
    const { gl } = this;
    for (const state of [gl.DEPTH_TEST, gl.CULL_FACE, gl.SCISSOR_TEST, gl.STENCIL_TEST, gl.SAMPLE_ALPHA_TO_COVERAGE, gl.POLYGON_OFFSET_FILL]) gl.disable(state);
    gl.colorMask(true, true, true, true);
    if (this.scene && this.drawn) this.project(view, kind);
    bind();
    if (!this.scene || !this.drawn) return;
    const p = this.splatter.use();
    p.texture("order", 0, gl.TEXTURE_2D, this.orderTexture);
    (["place", "shape", "blended"] as const).forEach((name, k) => p.texture(name, k + 1, gl.TEXTURE_2D, this.records.textures[k]!));
    gl.uniform2f(p.at("half_size"), size[0] / 2, size[1] / 2);
    gl.uniform2f(p.at("shift"), ...shift);
    gl.uniform1i(p.at("drawn"), this.drawn);
    gl.uniform1i(p.at("depth"), depth ? 1 : 0);
    gl.uniform2f(p.at("cut"), cutOf(this.scene), this.scene.header.alpha_max);
    gl.enable(gl.BLEND);
    gl.blendEquation(gl.FUNC_ADD);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.bindVertexArray(this.quads);
    gl.drawElementsInstanced(gl.TRIANGLES, 6 * WIDTH, gl.UNSIGNED_SHORT, 0, Math.ceil(this.drawn / WIDTH));
    gl.bindVertexArray(null);
    gl.disable(gl.BLEND);
  }

  private bandLayers(scene: SplatScene): number {
    return scene.shDegree ? Math.ceil((3 * (bandsOf(scene.shDegree) - 1)) / 4) : 0;
  }

  private upload(texture: WebGLTexture, layers: number, first: number, last: number, fill: (layer: number, row: number, out: Float32Array, at: number) => void): void {
    const { gl } = this, from = Math.floor(first / WIDTH), to = Math.ceil(last / WIDTH);
    plainUploads(gl);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D_ARRAY, texture);
    const block = 64; // rows of texels at once
    const data = new Float32Array(4 * WIDTH * Math.min(block, Math.max(to - from, 0)));
    for (let y = from; y < to; y += block) {
      const height = Math.min(block, to - y), end = Math.min((y + height) * WIDTH, this.scene!.count);
      for (let layer = 0; layer < layers; layer++) {
        for (let row = y * WIDTH, at = 0; row < end; row++, at += 4) fill(layer, row, data, at);
        gl.texSubImage3D(gl.TEXTURE_2D_ARRAY, 0, 0, y, layer, WIDTH, height, 1, gl.RGBA, gl.FLOAT, data);
      }
    }
  }
}

/** log2 alpha_min, at least the smallest exponent that the rasterizer keeps. */
const cutOf = (scene: SplatScene): number => (scene.header.alpha_min > 0 ? Math.max(Math.log2(scene.header.alpha_min), -126) : -126);
