/** What the pages of all engines share: one protocol for frames, for the time to a final picture, and for what the canvas shows. Views are OpenCV cameras, as splatkit.Cameras. */

const task = () => new Promise((done) => requestAnimationFrame(done));

/** `engine`: canvas, gl(), load(url) -> a promise, pose(view), draw(): one frame onto the canvas. Where `own` it also draws when it must and calls `look` then, and frame() waits for a whole picture of its pose. */
export function bench(engine) {
  const changes = { at: 0, same: 0, frames: 0, hash: 0 };
  let loaded = 0, blank = 0;

  /** Waits for the picture; when it last changed is kept. */
  function look() {
    const pixels = read();
    let hash = 2166136261;
    for (let i = 0; i < pixels.length; i++) hash = Math.imul(hash ^ pixels[i], 16777619);
    if (!changes.frames++) blank = hash; // before the loading begins
    if (hash === changes.hash) changes.same++;
    else Object.assign(changes, { hash, same: 0, at: performance.now() });
  }
  function read() {
    const gl = engine.gl(), { width, height } = engine.canvas, pixels = new Uint32Array(width * height);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(pixels.buffer));
    return pixels;
  }
  function wait() {
    const gl = engine.gl();
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4));
  }

  async function next() {
    await task();
    if (engine.own) return void changes.same++;
    engine.draw();
    look();
  }

  const api = (window.bench = {
    changes,
    look,
    /** Draws until the picture is none without a scene and, after the loading, the same for 4 frames and `quiet` ms; milliseconds since the navigation began, and the clock's time then, of the last change. */
    async opened(url, view, quiet) {
      engine.pose(view);
      engine.draw();
      look();
      const loading = engine.load(url).then(() => {
        engine.pose(view);
        changes.same = 0;
        loaded = performance.now();
      });
      loading.catch((why) => (changes.error = String(why)));
      while (!loaded || changes.hash === blank || changes.same < 4 || performance.now() - Math.max(changes.at, loaded) < quiet) {
        if (changes.error) throw new Error(changes.error);
        await next();
      }
      return { ms: changes.at, clock: performance.timeOrigin + changes.at, frames: changes.frames };
    },
    /** Draws `n` frames of the views in turn, each waited for. */
    async frames(views, n) {
      for (let i = 0; i < n; i++) {
        engine.pose(views[i % views.length]);
        if (engine.frame) await engine.frame();
        else {
          await task();
          engine.draw();
        }
        wait();
      }
    },
    /** The canvas once it no longer changes: [width, height, base64 of RGBA rows, bottom row first]. */
    async picture(view, quiet) {
      engine.pose(view);
      changes.same = 0;
      changes.at = performance.now();
      while (changes.same < 4 || performance.now() - changes.at < quiet) await next();
      if (engine.own) engine.draw();
      return [engine.canvas.width, engine.canvas.height, base64(new Uint8Array(read().buffer))];
    },
  });
  // What the page is to open, where it says so.
  if (window.opening) api.opened(...window.opening).then((result) => (window.opened = result), (why) => (window.opened = { error: String(why) }));
  return api;
}

export function base64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}
/** Camera-to-world in the axes of WebGL (y up, looking along -z), column-major. */
export function toWorldGl({ worldToCam: w }) {
  const t = [0, 1, 2].map((j) => -(w[j] * w[3] + w[4 + j] * w[7] + w[8 + j] * w[11]));
  return [w[0], w[1], w[2], 0, -w[4], -w[5], -w[6], 0, -w[8], -w[9], -w[10], 0, ...t, 1];
}
/** Vertical field of view, degrees; the views of the benchmark have square pixels and their centre in the middle. */
export const fovOf = ({ K, height }) => (2 * Math.atan(height / 2 / K[4]) * 180) / Math.PI;
export const parameters = new URLSearchParams(location.search);
