/** A camera path through keyframes: smooth in place and rotation; its frames, and the JSON file that `splatkit render --path` reads (splatkit/paths.py). */
import { CatmullRomCurve3, Quaternion, Vector3 } from "three";
import { copyOf, poseOf, viewOf, type Pose, type View } from "./pose";

export class CameraPath {
  keys: Pose[] = [];
  seconds = 4;
  fps = 30;

  add(pose: Pose): void {
    this.keys.push(copyOf(pose));
  }

  get frames(): number {
    return Math.max(1, Math.round(this.seconds * this.fps));
  }

  /** The pose at 0 <= t <= 1; the path goes through every key, at even times. */
  at(t: number): Pose {
    const n = this.keys.length, first = this.keys[0]!;
    if (n === 1) return copyOf(first);
    const u = Math.min(Math.max(t, 0), 1) * (n - 1), k = Math.min(Math.floor(u), n - 2), s = u - k;
    const position = new CatmullRomCurve3(this.keys.map((p) => p.position), false, "centripetal").getPoint(u / (n - 1));
    const q = [k - 1, k, k + 1, k + 2].map((i) => this.keys[Math.min(Math.max(i, 0), n - 1)]!.rotation.clone());
    for (let i = 1; i < 4; i++) if (q[i]!.dot(q[i - 1]!) < 0) q[i]!.set(-q[i]!.x, -q[i]!.y, -q[i]!.z, -q[i]!.w);
    // A cubic through the four-vectors, then back to length 1: no kink at a key.
    const cubic = (a: number, b: number, c: number, d: number) => b + 0.5 * s * (c - a + s * (2 * a - 5 * b + 4 * c - d + s * (3 * (b - c) + d - a)));
    const [a, b, c, d] = q as [Quaternion, Quaternion, Quaternion, Quaternion];
    const rotation = new Quaternion(cubic(a.x, b.x, c.x, d.x), cubic(a.y, b.y, c.y, d.y), cubic(a.z, b.z, c.z, d.z), cubic(a.w, b.w, c.w, d.w)).normalize();
    const mix = (f: (p: Pose) => number) => f(this.keys[k]!) * (1 - s) + f(this.keys[k + 1]!) * s;
    return { position, rotation, fovY: mix((p) => p.fovY), distance: mix((p) => p.distance) };
  }

  /** Places on the curve, for a line. */
  curve(): Vector3[] {
    if (this.keys.length < 2) return [];
    const steps = 24 * (this.keys.length - 1);
    return Array.from({ length: steps + 1 }, (_, i) => this.at(i / steps).position);
  }

  /** What each frame shows. */
  views(width: number, height: number): View[] {
    return Array.from({ length: this.frames }, (_, i) => viewOf(this.at(this.frames > 1 ? i / (this.frames - 1) : 0), width, height));
  }

  toJson(width: number, height: number): string {
    const frames = this.views(width, height);
    const rows = (m: Float32Array, n: number) => Array.from({ length: n }, (_, i) => Array.from(m.subarray(n * i, n * (i + 1))));
    return JSON.stringify({ width, height, fps: this.fps, frames: frames.map((v: View) => ({ world_to_cam: rows(v.worldToCam, 4), K: rows(v.K, 3) })), keys: this.keys.map(plain) });
  }

  /** Keyframes of a file that toJson wrote, or every tenth frame of another's. Throws a line that says what is wrong. */
  read(text: string): void {
    let json: { height?: unknown; fps?: unknown; frames?: unknown; keys?: unknown };
    try {
      json = JSON.parse(text) as typeof json;
    } catch {
      throw new Error("the camera path is no JSON");
    }
    const frames = json?.frames, height = Number(json?.height);
    if (!Array.isArray(frames) || !frames.length || !(height > 0)) throw new Error("the camera path has no frames; expected a file of splatkit with width, height, fps and frames");
    const poses = (frames as { world_to_cam: number[][]; K: number[][] }[]).map((f, i) => {
      const w = (f?.world_to_cam as unknown[] | undefined)?.flat?.() as number[], K = (f?.K as unknown[] | undefined)?.flat?.() as number[];
      if (w?.length !== 16 || K?.length !== 9 || ![...w, ...K].every(Number.isFinite) || !(K[4]! > 0)) throw new Error(`frames[${i}] of the camera path needs a world_to_cam of 4 x 4 and a K of 3 x 3 numbers`);
      return poseOf(w, 2 * Math.atan(height / 2 / K[4]!), 1);
    });
    const every = Array.isArray(json.keys) ? Math.max(1, (poses.length - 1) / Math.max(1, json.keys.length - 1)) : Math.max(1, Math.floor(poses.length / 10));
    const keys: Pose[] = [];
    for (let i = 0; i < poses.length - 0.5; i += every) keys.push(poses[Math.round(i)]!);
    this.keys = keys;
    if (typeof json.fps === "number" && json.fps > 0 && json.fps <= 1000) this.fps = json.fps;
    this.seconds = Math.max(0.1, poses.length / this.fps);
  }
}

const plain = (p: Pose) => ({ position: p.position.toArray(), rotation: p.rotation.toArray(), fov_y: p.fovY });
