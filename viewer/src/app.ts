/** The viewer without its panels: a scene, a camera, what is shown of it, and the edits; panels listen to its events. */
import { Vector3 } from "three";
import { Controls, type ControlsOwner } from "./controls";
import { Edits } from "./editing";
import { Emitter } from "./emitter";
import { reasonOf } from "./errors";
import type { Look, Rgb } from "./mapping";
import { Overlay } from "./overlay";
import { copyOf, fitted, forwardOf, lookAt, poseOf, unproject, viewOf, type Pose, type View } from "./pose";
import { DEFAULT_HEADER, whereabouts, type SplatScene } from "./scene";
import { Stage } from "./stage";
import { attributeOf, depthRange, pcaOf, quantile, similarityTo } from "./views";
import type { CaptureCamera, Manifest, Pca } from "./wire";

export interface AppEvents {
  scene: SplatScene;
  look: Look;
  camera: void; // moved
  capture: number | null; // standing at this capture camera
  edits: void;
  message: { text: string; kind: "error" | "info"; key: string };
  hover: { x: number; y: number } | null;
  pick: { x: number; y: number };
}
export type Grab = (x: number, y: number) => ((x: number, y: number, done: boolean) => void) | null;

const FOV = (50 * Math.PI) / 180;

export class App extends Emitter<AppEvents> implements ControlsOwner {
  readonly stage: Stage;
  readonly overlay: Overlay;
  readonly controls: Controls;
  readonly edits = new Edits();
  scene: SplatScene | null = null;
  cameras: CaptureCamera[] = [];
  pca: Pca | null = null;
  heat: ((name: string) => Promise<Float32Array>) | null = null;
  heatName = "";
  complete = (): boolean => !!this.scene; // nothing of the scene is on its way
  pose: Pose = lookAt(new Vector3(0, 0, -3), new Vector3(), new Vector3(0, -1, 0), FOV);
  up = new Vector3(0, -1, 0);
  size = 1;
  centre = new Vector3();
  captureIndex: number | null = null;
  fixedSize: [number, number] | null = null; // of the canvas, else what the page gives it
  fixedView: View | null = null; // in place of the camera
  showFrusta = true;
  grabber: Grab | null = null;
  handles: Grab | null = null; // what can be dragged where nothing else takes the drag
  private ownBackground: Rgb = [0, 0, 0];
  private chosenBackground: Rgb | null = null;
  private chosen = false; // somebody moved the camera since it was placed to show the scene
  private query: Float32Array | null = null; // features that similarity is measured to

  constructor(readonly canvas: HTMLCanvasElement) {
    super();
    this.stage = new Stage(canvas, () => this.view(), (view) => this.over(view), (text) => this.say(text, "error", "stage"));
    document.documentElement.classList.toggle("software", this.stage.software);
    this.overlay = new Overlay(canvas, this.stage.gl);
    this.controls = new Controls(canvas, this);
    new ResizeObserver(() => this.stage.invalidate()).observe(canvas);
  }

  say(text: string, kind: "error" | "info" = "error", key = "app"): void {
    this.emit("message", { text, kind, key });
  }

  /** Shows a scene; `keepCamera` where it is another state of the one before. */
  open(scene: SplatScene, manifest: Manifest | null, keepCamera = false): void {
    this.scene = scene;
    this.pca = manifest?.features?.pca ?? null;
    if (!keepCamera) this.query = null;
    this.ownBackground = manifest?.background ?? [0, 0, 0];
    if (!keepCamera) this.stage.background = this.chosenBackground ?? this.ownBackground;
    this.edits.reset(scene.count);
    this.stage.setScene(scene);
    this.setCameras(manifest?.cameras ?? []);
    if (!keepCamera) {
      this.up = new Vector3(...(scene.header.up ?? DEFAULT_HEADER.up)).normalize();
      this.home();
    }
    this.emit("scene", scene);
    if (this.stage.look !== "colour") void this.setLook(this.available(this.stage.look) ? this.stage.look : "colour");
  }

  setCameras(cameras: CaptureCamera[]): void {
    this.cameras = cameras;
    const losses = cameras.map((c) => c.loss).filter((l): l is number => l !== null), low = quantile(losses, 0.05), high = quantile(losses, 0.95);
    // From blue, drawn well, to red, drawn badly.
    const colour = (c: CaptureCamera) => (c.loss === null ? "#8b96a8" : `hsl(${215 - 215 * Math.min(Math.max((c.loss - low) / (high - low || 1), 0), 1)}, 75%, 62%)`);
    this.overlay.setCameras(cameras, 0.05 * this.size, colour);
    this.stage.invalidate();
  }

  /** Rows that came, or changed, with `more` of these on the way. */
  update(first: number, last: number, more = false): void {
    this.stage.update(first, last, more);
  }

  /** The first rows of the scene came, or the last: it is placed in the picture, but never against a camera that somebody has chosen meanwhile. */
  arrived(first: boolean): void {
    if (!this.chosen) return this.home();
    this.measure();
    this.setCameras(this.cameras);
    if (!first || this.captureIndex !== null) return;
    // A turn before there was anything to see chose a direction, and no more.
    const distance = this.size / Math.sin(FOV / 2), position = this.centre.clone().addScaledVector(forwardOf(this.pose), -distance);
    this.setPose({ ...this.pose, position, distance });
  }
  private measure(): void {
    const { centre, radius } = whereabouts(this.scene!);
    this.centre = new Vector3(...centre);
    this.size = radius;
  }

  /** The whole scene from the side of the first capture camera, or from anywhere. */
  home(): void {
    this.measure();
    const { size: radius } = this;
    const first = this.cameras[0], distance = radius / Math.sin(FOV / 2);
    if (first) {
      const p = poseOf(first.world_to_cam, FOV, 1), far = p.position.distanceTo(this.centre);
      this.pose = { ...lookAt(p.position, this.centre, this.up, 2 * Math.atan(first.height / 2 / first.K[4]!)), distance: far || distance };
    } else {
      const side = Math.abs(this.up.y) > 0.9 ? new Vector3(0, 0, -1) : new Vector3(0, -1, 0);
      const away = side.addScaledVector(this.up, 0.35 - side.dot(this.up)).normalize();
      this.pose = lookAt(this.centre.clone().addScaledVector(away, distance), this.centre, this.up, FOV);
    }
    this.setCameras(this.cameras);
    this.moved();
    this.chosen = false;
  }

  // ---- camera

  canvasSize(): [number, number] {
    if (this.fixedSize) return this.fixedSize;
    const ratio = Math.min(devicePixelRatio || 1, this.stage.backend === "wasm" ? 1 : 2);
    return [Math.max(1, Math.round(this.canvas.clientWidth * ratio)), Math.max(1, Math.round(this.canvas.clientHeight * ratio))];
  }
  view(): View {
    const [width, height] = this.canvasSize();
    if (this.fixedView) return this.fixedView;
    const c = this.captureIndex === null ? undefined : this.cameras[this.captureIndex];
    return c ? fitted({ ...c, worldToCam: Float32Array.from(c.world_to_cam) }, width, height).view : viewOf(this.pose, width, height);
  }
  setPose(pose: Pose): void {
    this.pose = copyOf(pose);
    this.moved();
  }
  moved(): void {
    this.chosen = true;
    if (this.captureIndex !== null) {
      this.captureIndex = null;
      this.overlay.choose(null);
      this.emit("capture", null);
    }
    this.stage.invalidate();
    this.emit("camera", undefined);
  }
  /** Stands exactly where a photo was taken, until the camera is moved. */
  jump(index: number): void {
    const c = this.cameras[index];
    if (!c) return;
    const [width, height] = this.canvasSize(), scale = Math.min(width / c.width, height / c.height);
    const pose = poseOf(c.world_to_cam, 2 * Math.atan(height / 2 / (c.K[4]! * scale)), 1);
    pose.distance = Math.max(this.centre.clone().sub(pose.position).dot(new Vector3(0, 0, 1).applyQuaternion(pose.rotation)), 0.2 * this.size);
    this.pose = pose;
    this.captureIndex = index;
    this.chosen = true;
    this.overlay.choose(index);
    this.stage.invalidate();
    this.emit("capture", index);
    this.emit("camera", undefined);
  }

  // ---- what is shown

  available(look: Look): boolean {
    if (look === "heat") return this.heat !== null;
    return look === "features" || look === "similarity" ? !!this.scene?.features : true;
  }
  async setLook(look: Look): Promise<void> {
    const scene = this.scene;
    if (!scene) return;
    try {
      if (look === "heat") {
        const values = await this.heat!(this.heatName);
        this.stage.range = [quantile(values, 0.02), quantile(values, 0.98)];
        this.stage.setAttribute(attributeOf(values));
      } else if (look === "features") this.stage.setAttribute(attributeOf(null, scene, (this.pca ??= pcaOf(scene))));
      else if (look === "similarity") {
        this.stage.range = [0, 1];
        this.stage.setAttribute(attributeOf(this.query ? similarityTo(scene, this.query) : new Float32Array(scene.count)));
      } else if (look === "depth") this.stage.range = depthRange(scene, this.view());
      this.stage.look = look;
      this.stage.invalidate();
      this.emit("look", look);
    } catch (why) {
      this.say(`${look}: ${reasonOf(why)}`);
    }
  }
  /** Colours every Gaussian by how like its features are to those under canvas pixel (x, y). */
  async similarAt(x: number, y: number): Promise<void> {
    const scene = this.scene, f = scene?.features;
    if (!scene || !f) return;
    try {
      const { rows, w } = await this.stage.weightsAt(x, y), query = new Float32Array(f.channels);
      rows.forEach((row, k) => {
        for (let c = 0; c < f.channels; c++) query[c]! += w[k]! * (f.int8[f.channels * row + c]! * f.scale[c]! + f.offset[c]!);
      });
      if (!rows.length) return this.say("Nothing is there to compare with; click on the scene.", "info");
      this.query = query;
      await this.setLook("similarity");
    } catch (why) {
      this.say(`similarity: ${reasonOf(why)}`);
    }
  }
  /** null: what the scene was trained over. */
  setBackground(color: Rgb | null): void {
    this.chosenBackground = color;
    this.stage.background = color ?? this.ownBackground;
    this.stage.invalidate();
  }

  // ---- edits

  applyEdits(): void {
    this.stage.setVisible(this.scene ? this.edits.visible(this.scene) : null);
    this.emit("edits", undefined);
  }

  // ---- pointer

  private toCanvas(x: number, y: number): [number, number] {
    const [width, height] = this.canvasSize();
    return [Math.floor((x * width) / (this.canvas.clientWidth || 1)), Math.floor((y * height) / (this.canvas.clientHeight || 1))];
  }
  clicked(x: number, y: number): void {
    const [px, py] = this.toCanvas(x, y), index = this.showFrusta && this.captureIndex === null ? this.overlay.cameraAt(this.view(), px, py) : null;
    if (index !== null && this.stage.look !== "similarity") this.jump(index);
    else this.emit("pick", { x: px, y: py });
  }
  hovered(x: number, y: number): void {
    const [px, py] = this.toCanvas(x, y);
    this.emit("hover", { x: px, y: py });
  }
  left(): void {
    this.emit("hover", null);
  }
  grab(x: number, y: number): ((x: number, y: number, done: boolean) => void) | null {
    return (this.grabber ?? this.handles)?.(x, y) ?? null;
  }
  /** Where the scene is under a canvas pixel, and how deep; null where there is nothing. */
  async placeAt(x: number, y: number): Promise<{ depth: number; place: Vector3 } | null> {
    const view = this.view(), depth = await this.stage.depthAt(x, y);
    return depth > 0 ? { depth, place: unproject(view, x + 0.5, y + 0.5, depth) } : null;
  }

  private over(view: View): void {
    this.overlay.show("frusta", this.showFrusta && this.captureIndex === null);
    if (!this.fixedView) this.overlay.draw(view);
  }
}
