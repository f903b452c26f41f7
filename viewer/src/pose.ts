/** Cameras: OpenCV axes (x right, y down, z forward), world_to_cam and K row-major, the centre of pixel (0, 0) at (0.5, 0.5), as splatkit.Cameras. */
import { Matrix4, Quaternion, Vector3 } from "three";

/** One picture to be made. */
export interface View {
  worldToCam: Float32Array; // 16
  K: Float32Array; // 9, pixels
  width: number;
  height: number;
}

/** A camera that is moved: `rotation` turns camera axes into the world's. */
export interface Pose {
  position: Vector3;
  rotation: Quaternion;
  fovY: number; // radians, of the whole picture's height
  distance: number; // to what it turns around, along its axis
}

export const forwardOf = (p: Pose): Vector3 => new Vector3(0, 0, 1).applyQuaternion(p.rotation);
export const rightOf = (p: Pose): Vector3 => new Vector3(1, 0, 0).applyQuaternion(p.rotation);
export const targetOf = (p: Pose): Vector3 => p.position.clone().addScaledVector(forwardOf(p), p.distance);
export const copyOf = (p: Pose): Pose => ({ position: p.position.clone(), rotation: p.rotation.clone(), fovY: p.fovY, distance: p.distance });

export function viewOf(p: Pose, width: number, height: number): View {
  const r = new Matrix4().makeRotationFromQuaternion(p.rotation).elements, { x, y, z } = p.position;
  const worldToCam = new Float32Array(16);
  // `r` is column-major camera-to-world: its columns are the rows that are wanted.
  for (let i = 0; i < 3; i++) {
    const [a, b, c] = [r[4 * i]!, r[4 * i + 1]!, r[4 * i + 2]!];
    worldToCam.set([a, b, c, -(a * x + b * y + c * z)], 4 * i);
  }
  worldToCam[15] = 1;
  const focal = height / 2 / Math.tan(p.fovY / 2);
  return { worldToCam, K: new Float32Array([focal, 0, width / 2, 0, focal, height / 2, 0, 0, 1]), width, height };
}

/** The pose of a world_to_cam, as exactly as a unit quaternion holds it. */
export function poseOf(worldToCam: ArrayLike<number>, fovY: number, distance: number): Pose {
  const m = Array.from(worldToCam);
  const toWorld = new Matrix4().set(m[0]!, m[4]!, m[8]!, 0, m[1]!, m[5]!, m[9]!, 0, m[2]!, m[6]!, m[10]!, 0, 0, 0, 0, 1);
  const rotation = new Quaternion().setFromRotationMatrix(toWorld).normalize();
  const position = new Vector3(m[3]!, m[7]!, m[11]!).applyMatrix4(toWorld).negate();
  return { position, rotation, fovY, distance };
}

/** Looks from `position` at `target`; `up` is roughly upwards in the picture. */
export function lookAt(position: Vector3, target: Vector3, up: Vector3, fovY: number): Pose {
  const forward = target.clone().sub(position), distance = forward.length() || 1;
  forward.divideScalar(distance);
  let right = forward.clone().cross(up);
  if (right.length() < 1e-6) right = forward.clone().cross(new Vector3(forward.y ** 2 > 0.5 ? 1 : 0, forward.y ** 2 > 0.5 ? 0 : 1, 0));
  right.normalize();
  const down = forward.clone().cross(right);
  return { position: position.clone(), rotation: new Quaternion().setFromRotationMatrix(new Matrix4().makeBasis(right, down, forward)), fovY, distance };
}

/** Keeps only what is in the picture of `inner`, placed in a picture of width x height: the largest that fits, in the middle. */
export function fitted(inner: { width: number; height: number; K: ArrayLike<number>; worldToCam: Float32Array }, width: number, height: number): { view: View; left: number; top: number; scale: number } {
  const scale = Math.min(width / inner.width, height / inner.height), left = (width - scale * inner.width) / 2, top = (height - scale * inner.height) / 2;
  const k = inner.K;
  const K = new Float32Array([scale * k[0]!, 0, scale * k[2]! + left, 0, scale * k[4]!, scale * k[5]! + top, 0, 0, 1]);
  return { view: { worldToCam: inner.worldToCam, K, width, height }, left, top, scale };
}

/** The camera's place in the world, in double precision. */
export function centreOf(worldToCam: ArrayLike<number>): [number, number, number] {
  const w = worldToCam, at = (j: number) => -(w[j]! * w[3]! + w[4 + j]! * w[7]! + w[8 + j]! * w[11]!);
  return [at(0), at(1), at(2)];
}

/** The world point at pixel (x, y) and camera depth z. */
export function unproject(view: View, x: number, y: number, z: number): Vector3 {
  const { K, worldToCam: w } = view, cx = ((x - K[2]!) / K[0]!) * z - w[3]!, cy = ((y - K[5]!) / K[4]!) * z - w[7]!, cz = z - w[11]!;
  return new Vector3(w[0]! * cx + w[4]! * cy + w[8]! * cz, w[1]! * cx + w[5]! * cy + w[9]! * cz, w[2]! * cx + w[6]! * cy + w[10]! * cz);
}

/** Pixel and camera depth of a world point. */
export function project(view: View, p: { x: number; y: number; z: number }): { x: number; y: number; z: number } {
  const { K, worldToCam: w } = view, at = (i: number) => w[i]! * p.x + w[i + 1]! * p.y + w[i + 2]! * p.z + w[i + 3]!;
  const z = at(8);
  return { x: (K[0]! * at(0)) / z + K[2]!, y: (K[4]! * at(4)) / z + K[5]!, z };
}

/** The coordinate along world axis `axis` of the point on the line through `from` that comes nearest to the ray of pixel (x, y); null where they are nearly parallel. */
export function alongAxis(view: View, from: Vector3, axis: 0 | 1 | 2, x: number, y: number): number | null {
  const eye = new Vector3(...centreOf(view.worldToCam)), ray = unproject(view, x, y, 1).sub(eye).normalize(), apart = from.clone().sub(eye);
  const along = ray.getComponent(axis), sine2 = 1 - along * along;
  return sine2 < 1e-3 ? null : from.getComponent(axis) + (along * ray.dot(apart) - apart.getComponent(axis)) / sine2;
}

/** Matrices for three.js, whose cameras look along -z with y up. */
export function threeMatrices(view: View, near: number, far: number): { projection: Matrix4; worldToCamera: Matrix4 } {
  const { K, width: W, height: H, worldToCam: w } = view;
  const projection = new Matrix4().set((2 * K[0]!) / W, 0, 1 - (2 * K[2]!) / W, 0, 0, (2 * K[4]!) / H, (2 * K[5]!) / H - 1, 0,
    0, 0, -(far + near) / (far - near), (-2 * far * near) / (far - near), 0, 0, -1, 0);
  const worldToCamera = new Matrix4().set(w[0]!, w[1]!, w[2]!, w[3]!, -w[4]!, -w[5]!, -w[6]!, -w[7]!, -w[8]!, -w[9]!, -w[10]!, -w[11]!, 0, 0, 0, 1);
  return { projection, worldToCamera };
}

/** Bit-equal views make equal pictures. */
export function sameView(a: View | null, b: View | null): boolean {
  return !!a && !!b && a.width === b.width && a.height === b.height && a.worldToCam.every((v, i) => v === b.worldToCam[i]) && a.K.every((v, i) => v === b.K[i]);
}
