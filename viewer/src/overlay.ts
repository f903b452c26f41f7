/** Lines over the picture, by three.js: frusta of capture cameras, the crop box, a measured line, the camera path. */
import { BufferGeometry, Camera, Color, Float32BufferAttribute, Group, LineBasicMaterial, LineSegments, Points, PointsMaterial, Scene, Vector3, WebGLRenderer } from "three";
import { alongAxis, centreOf, project, threeMatrices, unproject, type View } from "./pose";
import type { CaptureCamera } from "./wire";

export interface Box {
  low: [number, number, number];
  high: [number, number, number];
}

export interface Face {
  end: "low" | "high";
  axis: 0 | 1 | 2;
}
const FACES: Face[] = ([0, 1, 2] as const).flatMap((axis) => [{ end: "low", axis }, { end: "high", axis }] as Face[]);
const HANDLE_PX = 9; // CSS pixels

export class Overlay {
  private renderer: WebGLRenderer | null = null;
  private readonly scene = new Scene();
  private readonly camera = new Camera();
  private readonly parts: Record<"frusta" | "box" | "measure" | "path", Group>;
  private frustumSize = 1;
  private cameras: CaptureCamera[] = [];
  private colours: Color[] = [];
  private chosen: number | null = null;
  private box: Box | null = null;

  constructor(private readonly canvas: HTMLCanvasElement, private readonly gl: WebGL2RenderingContext) {
    this.camera.matrixAutoUpdate = false;
    const part = () => this.scene.add(new Group()).children.at(-1) as Group;
    this.parts = { frusta: part(), box: part(), measure: part(), path: part() };
    canvas.addEventListener("webglcontextrestored", () => (this.renderer = null));
  }

  show(part: keyof Overlay["parts"], visible: boolean): void {
    this.parts[part].visible = visible;
  }

  draw(view: View): void {
    const any = Object.values(this.parts).some((p) => p.visible && p.children.length);
    if (!any) return;
    if (!this.renderer) {
      this.renderer = new WebGLRenderer({ canvas: this.canvas, context: this.gl });
      this.renderer.autoClear = false;
    }
    const { renderer, camera } = this;
    renderer.resetState();
    renderer.setPixelRatio(1);
    renderer.setSize(view.width, view.height, false);
    const visible = Object.entries(this.parts).filter(([, group]) => group.visible);
    // Frusta that one stands in would only frame the picture: they are cut off nearer to the eye than other lines.
    for (const [near, names] of [[1.5, ["frusta"]], [1e-3, ["box", "measure", "path"]]] as const) {
      for (const [name, group] of visible) group.visible = (names as readonly string[]).includes(name);
      const { projection, worldToCamera } = threeMatrices(view, this.frustumSize * near, this.frustumSize * 1e5);
      camera.projectionMatrix.copy(projection);
      camera.projectionMatrixInverse.copy(projection).invert();
      camera.matrixWorldInverse.copy(worldToCamera);
      camera.matrixWorld.copy(worldToCamera).invert();
      camera.matrix.copy(camera.matrixWorld);
      renderer.render(this.scene, camera);
    }
    for (const [, group] of visible) group.visible = true;
    renderer.resetState();
  }

  /** `size` is the length of a frustum in the world. */
  setCameras(cameras: CaptureCamera[], size: number, colour: (camera: CaptureCamera) => string): void {
    this.cameras = cameras;
    this.frustumSize = size;
    this.colours = cameras.map((c) => new Color(colour(c)));
    this.layFrusta();
  }
  choose(index: number | null): void {
    if (index === this.chosen) return;
    this.chosen = index;
    this.layFrusta();
  }

  private layFrusta(): void {
    const points: number[] = [], colours: number[] = [];
    this.cameras.forEach((c, i) => {
      const corners = cornersOf(c, this.frustumSize * (i === this.chosen ? 1.25 : 1)), apex = new Vector3(...centreOf(c.world_to_cam));
      const top = corners[0]!.clone().lerp(corners[1]!, 0.5).addScaledVector(corners[0]!.clone().sub(corners[3]!), 0.25);
      const lines: [Vector3, Vector3][] = [...corners.map((p) => [apex, p] as [Vector3, Vector3]), ...corners.map((p, k) => [p, corners[(k + 1) % 4]!] as [Vector3, Vector3]), [corners[0]!, top], [top, corners[1]!]];
      for (const p of lines.flat()) {
        points.push(p.x, p.y, p.z);
        const colour = i === this.chosen ? new Color("#ffb454") : this.colours[i]!;
        colours.push(colour.r, colour.g, colour.b);
      }
    });
    this.lay("frusta", points, null, colours);
  }

  /** The capture camera whose frustum is at canvas pixel (x, y): one whose apex is there before others, and nearer ones before farther; null where there is none. */
  cameraAt(view: View, x: number, y: number): number | null {
    let best: number | null = null, least = Infinity;
    this.cameras.forEach((c, i) => {
      const points = [...cornersOf(c, this.frustumSize), new Vector3(...centreOf(c.world_to_cam))].map((p) => project(view, p));
      if (points.some((p) => p.z <= 0)) return;
      const quad = points.slice(0, 4), inside = quad.map((p, k) => (quad[(k + 1) % 4]!.x - p.x) * (y - p.y) - (quad[(k + 1) % 4]!.y - p.y) * (x - p.x));
      const near = (p: { x: number; y: number }) => Math.hypot(p.x - x, p.y - y) < 9, rank = points[4]!.z * (near(points[4]!) ? 1e-6 : 1);
      if (rank < least && (points.some(near) || inside.every((s) => s > 0) || inside.every((s) => s < 0))) [best, least] = [i, rank];
    });
    return best;
  }

  setBox(box: Box | null): void {
    const points: number[] = [];
    if (box)
      for (let corner = 0; corner < 8; corner++)
        for (let axis = 0; axis < 3; axis++) {
          if (corner & (1 << axis)) continue;
          for (const c of [corner, corner | (1 << axis)]) for (let k = 0; k < 3; k++) points.push(c & (1 << k) ? box.high[k]! : box.low[k]!);
        }
    this.lay("box", points, "#4fd1c5");
    this.box = box;
    if (!box) return;
    const middles = FACES.map((face) => middleOf(box, face));
    const geometry = new BufferGeometry().setAttribute("position", new Float32BufferAttribute(middles.flatMap((p) => [p.x, p.y, p.z]), 3));
    const handles = new Points(geometry, new PointsMaterial({ color: "#4fd1c5", size: HANDLE_PX * devicePixelRatio, sizeAttenuation: false, depthTest: false }));
    handles.frustumCulled = false;
    this.parts.box.add(handles);
  }

  /** The face of the box whose handle is at canvas pixel (x, y). */
  faceAt(view: View, x: number, y: number): Face | null {
    const { box } = this;
    if (!box) return null;
    const near = FACES.map((face) => ({ face, p: project(view, middleOf(box, face)) }))
      .filter(({ p }) => p.z > 0 && Math.hypot(p.x - x, p.y - y) < 1.5 * HANDLE_PX * devicePixelRatio);
    return near.sort((a, b) => a.p.z - b.p.z)[0]?.face ?? null;
  }
  /** Where a face is dragged to: the coordinate along its axis that comes nearest to what is seen at canvas pixel (x, y); null where one looks along the axis. */
  faceDraggedTo(view: View, face: Face, x: number, y: number): number | null {
    return this.box && alongAxis(view, middleOf(this.box, face), face.axis, x, y);
  }
  setLine(part: "measure" | "path", points: Vector3[], colour: string): void {
    const pairs = points.slice(1).flatMap((p, k) => [points[k]!, p]);
    this.lay(part, pairs.flatMap((p) => [p.x, p.y, p.z]), colour);
  }

  private lay(part: keyof Overlay["parts"], points: number[], colour: string | null, colours?: number[]): void {
    const group = this.parts[part];
    for (const old of group.children as (LineSegments | Points)[]) {
      old.geometry.dispose();
      (old.material as LineBasicMaterial | PointsMaterial).dispose();
    }
    group.clear();
    if (!points.length) return;
    const geometry = new BufferGeometry().setAttribute("position", new Float32BufferAttribute(points, 3));
    if (colours) geometry.setAttribute("color", new Float32BufferAttribute(colours, 3));
    const lines = new LineSegments(geometry, new LineBasicMaterial({ ...(colour ? { color: colour } : {}), vertexColors: !!colours, depthTest: false }));
    lines.frustumCulled = false;
    group.add(lines);
  }
}

function middleOf(box: Box, { end, axis }: Face): Vector3 {
  const at = [0, 1, 2].map((k) => (k === axis ? box[end][k]! : (box.low[k]! + box.high[k]!) / 2));
  return new Vector3(...(at as [number, number, number]));
}

/** The picture's corners at a depth of `size`: top left, top right, bottom right, bottom left. */
function cornersOf(c: CaptureCamera, size: number): Vector3[] {
  const view = { worldToCam: Float32Array.from(c.world_to_cam), K: Float32Array.from(c.K), width: c.width, height: c.height };
  return [[0, 0], [c.width, 0], [c.width, c.height], [0, c.height]].map(([x, y]) => unproject(view, x!, y!, size));
}
