/** Short forms of raw WebGL2. */

export type GL = WebGL2RenderingContext;

export class Program {
  readonly handle: WebGLProgram;
  private readonly places = new Map<string, WebGLUniformLocation | null>();

  constructor(private readonly gl: GL, vertex: string, fragment: string) {
    this.handle = gl.createProgram();
    const shaders = ([[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]] as const).map(([type, source]) => {
      const shader = gl.createShader(type)!;
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(this.handle, shader);
      return shader;
    });
    gl.linkProgram(this.handle);
    // Each question waits for the graphics process: one is asked where all is well.
    if (gl.getProgramParameter(this.handle, gl.LINK_STATUS) || gl.isContextLost()) return;
    throw new Error(`shaders do not compile and link here: ${[...shaders.map((s) => gl.getShaderInfoLog(s)), gl.getProgramInfoLog(this.handle)].filter(Boolean).join(" ")}`);
  }
  use(): this {
    this.gl.useProgram(this.handle);
    return this;
  }
  at(name: string): WebGLUniformLocation | null {
    if (!this.places.has(name)) this.places.set(name, this.gl.getUniformLocation(this.handle, name));
    return this.places.get(name)!;
  }
  texture(name: string, unit: number, target: number, texture: WebGLTexture): void {
    this.gl.activeTexture(this.gl.TEXTURE0 + unit);
    this.gl.bindTexture(target, texture);
    this.gl.uniform1i(this.at(name), unit);
  }
}

export function makeTexture(gl: GL, target: number, filter: number = gl.NEAREST): WebGLTexture {
  const texture = gl.createTexture();
  gl.activeTexture(gl.TEXTURE0);
  gl.bindTexture(target, texture);
  for (const name of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(target, name, filter);
  for (const name of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(target, name, gl.CLAMP_TO_EDGE);
  return texture;
}

/** Rows of pixels as they lie in memory: other users of the context may have set it otherwise. */
export function plainUploads(gl: GL): void {
  gl.pixelStorei(gl.UNPACK_FLIP_Y_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_ALIGNMENT, 4);
  gl.pixelStorei(gl.UNPACK_ROW_LENGTH, 0);
  gl.pixelStorei(gl.UNPACK_SKIP_ROWS, 0);
  gl.pixelStorei(gl.UNPACK_SKIP_PIXELS, 0);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.BROWSER_DEFAULT_WEBGL);
  gl.bindBuffer(gl.PIXEL_UNPACK_BUFFER, null);
}

/** A framebuffer of one or more textures of the same size, made again when the size changes. */
export class Target {
  readonly textures: WebGLTexture[];
  private readonly framebuffer: WebGLFramebuffer;
  width = 0;
  height = 0;

  constructor(private readonly gl: GL, private readonly format: number, count = 1) {
    this.textures = Array.from({ length: count }, () => makeTexture(gl, gl.TEXTURE_2D));
    this.framebuffer = gl.createFramebuffer();
  }
  bind(width: number, height: number): void {
    const gl = this.gl;
    if (width !== this.width || height !== this.height) {
      plainUploads(gl);
      gl.bindFramebuffer(gl.FRAMEBUFFER, this.framebuffer);
      this.textures.forEach((texture, k) => {
        const halves = this.format === gl.RGBA16F, bytes = this.format === gl.RGBA8;
        gl.activeTexture(gl.TEXTURE0);
        gl.bindTexture(gl.TEXTURE_2D, texture);
        gl.texImage2D(gl.TEXTURE_2D, 0, this.format, width, height, 0, gl.RGBA, bytes ? gl.UNSIGNED_BYTE : halves ? gl.HALF_FLOAT : gl.FLOAT, null);
        gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0 + k, gl.TEXTURE_2D, texture, 0);
      });
      gl.drawBuffers(this.textures.map((_, k) => gl.COLOR_ATTACHMENT0 + k));
      if (gl.checkFramebufferStatus(gl.FRAMEBUFFER) !== gl.FRAMEBUFFER_COMPLETE && !gl.isContextLost()) throw new Error("this browser cannot draw into float textures");
      [this.width, this.height] = [width, height];
    }
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.framebuffer);
    gl.viewport(0, 0, width, height);
  }
}
