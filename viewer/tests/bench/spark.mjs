/** Spark under the protocol of harness.mjs; `tuned` has the settings that come nearest to the trained kernel. */
import { SparkRenderer, SplatMesh } from "@sparkjsdev/spark";
import * as THREE from "three";
import { bench, fovOf, parameters, toWorldGl } from "./harness.mjs";

const tuned = parameters.has("tuned"), canvas = document.querySelector("canvas");
const renderer = new THREE.WebGLRenderer({ canvas, antialias: false });
renderer.setSize(canvas.width, canvas.height, false);
const scene = new THREE.Scene(), camera = new THREE.PerspectiveCamera(50, canvas.width / canvas.height, 0.01, 100);
camera.matrixAutoUpdate = false;
scene.add(new SparkRenderer({ renderer, ...(tuned ? { preBlurAmount: 0.3, blurAmount: 0, maxStdDev: 3.33, minAlpha: 1 / 255, sortRadial: false, accumExtSplats: true } : {}) }));

bench({
  canvas,
  gl: () => renderer.getContext(),
  pose(view) {
    camera.fov = fovOf(view);
    camera.updateProjectionMatrix();
    camera.matrix.fromArray(toWorldGl(view));
    camera.matrix.decompose(camera.position, camera.quaternion, camera.scale);
    camera.updateMatrixWorld(true);
  },
  draw: () => renderer.render(scene, camera),
  async load(url) {
    const mesh = new SplatMesh({ url, ...(tuned ? { extSplats: true } : {}) });
    scene.add(mesh);
    await mesh.initialized;
  },
});
