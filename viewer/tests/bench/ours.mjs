/** Our page, as it comes from the server, under the protocol of harness.mjs. */
import { WasmRaster } from "../../src/wasm";
import { base64, bench, parameters } from "./harness.mjs";

const app = window.splatkit, { stage } = app, { gl } = stage, backend = parameters.get("backend") ?? "auto";
stage.setBackend(backend);
const frame = stage.frame.bind(stage);

const { look } = bench({
  canvas: app.canvas,
  own: true,
  gl: () => gl,
  pose(view) {
    app.fixedView = { ...view, worldToCam: Float32Array.from(view.worldToCam), K: Float32Array.from(view.K) };
    stage.invalidate();
  },
  /** Once more, though nothing changed: what a browser has shown it does not keep for reading. */
  draw() {
    stage.dirty = stage.blank = true;
    frame();
  },
  async load(url) {
    const field = document.querySelector("#file"), files = new DataTransfer();
    // A dropped file lies on the disk, and its bytes come to the page once; here they do by this request, and a File made of them would send them to the browser and back.
    const answer = await fetch(url), size = Number(answer.headers.get("content-length"));
    Object.defineProperties(File.prototype, { size: { get: () => size }, stream: { value: () => answer.body } });
    files.items.add(new File([], "scene.ply"));
    field.files = files.files;
    field.dispatchEvent(new Event("change"));
    while (!app.scene) await new Promise((done) => setTimeout(done, 5));
    await stage.settled();
  },
  /** A whole picture a view: in its order, at full size however slow. */
  frame() {
    stage.scale = 1;
    return stage.settled();
  },
});
stage.frame = () => {
  const before = stage.frames;
  frame();
  if (stage.frames > before) look();
};

/** Float colours [H, W, 3] of the page's scene by the page's rasterizer, base64. */
window.bench.exact = async (wasm, view) => {
  const raster = await WasmRaster.load(Uint8Array.from(atob(wasm), (c) => c.charCodeAt(0)).buffer);
  raster.setScene(app.scene);
  const { color } = raster.render(Float32Array.from(view.worldToCam), Float32Array.from(view.K), view.width, view.height, [0, 0, 0]);
  return base64(new Uint8Array(color.buffer, color.byteOffset, color.byteLength));
};
