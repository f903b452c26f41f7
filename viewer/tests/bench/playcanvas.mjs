/** PlayCanvas on WebGL2 under the protocol of harness.mjs. */
import * as pc from "playcanvas";
import { bench, fovOf, toWorldGl } from "./harness.mjs";

const canvas = document.querySelector("canvas"), size = [canvas.width, canvas.height];
const device = await pc.createGraphicsDevice(canvas, { deviceTypes: ["webgl2"], antialias: false });
const options = new pc.AppOptions();
Object.assign(options, { graphicsDevice: device, componentSystems: [pc.CameraComponentSystem, pc.GSplatComponentSystem], resourceHandlers: [pc.GSplatHandler] });
const app = new pc.AppBase(canvas);
app.init(options);
app.setCanvasFillMode(pc.FILLMODE_NONE, ...size);
app.setCanvasResolution(pc.RESOLUTION_FIXED, ...size);
app.autoRender = false;
app.start();
const eye = new pc.Entity("eye"), flipped = new pc.Mat4();
eye.addComponent("camera", { clearColor: new pc.Color(0, 0, 0), nearClip: 0.01, farClip: 100 });
app.root.addChild(eye);

bench({
  canvas,
  gl: () => device.gl,
  pose(view) {
    flipped.data.set(toWorldGl(view));
    eye.camera.fov = fovOf(view);
    eye.setPosition(flipped.getTranslation());
    eye.setRotation(new pc.Quat().setFromMat4(flipped));
  },
  draw: () => app.render(),
  load: (url) => new Promise((done, failed) => {
    const asset = new pc.Asset("scene", "gsplat", { url });
    asset.once("error", failed);
    asset.ready(() => {
      const entity = new pc.Entity("scene");
      entity.addComponent("gsplat", { asset });
      app.root.addChild(entity);
      done();
    });
    app.assets.add(asset);
    app.assets.load(asset);
  }),
});
