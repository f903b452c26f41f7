/** Moves the camera by mouse, touch and keys: around what it looks at, or by flying. Nothing runs while nothing is pressed. */
import { Quaternion, Vector3 } from "three";
import { forwardOf, rightOf, targetOf, type Pose } from "./pose";

const TURN = 2.4; // radians for a drag across the picture's shorter side
const PITCH_LIMIT = 0.02; // radians from looking straight along up
const CLICK_PX = 4;

export interface ControlsOwner {
  pose: Pose;
  up: Vector3;
  size: number; // of the scene, for the speed of flying
  /** Called after every change of the pose by the user. */
  moved(): void;
  clicked(x: number, y: number, event: PointerEvent): void;
  hovered(x: number, y: number): void;
  left(): void;
  /** Takes a drag instead of the camera, as for selecting; returns what follows the pointer, or null. */
  grab(x: number, y: number): ((x: number, y: number, done: boolean) => void) | null;
}

export class Controls {
  mode: "orbit" | "fly" = "orbit";
  private readonly pointers = new Map<number, { x: number; y: number }>();
  private travelled = 0;
  private grabbed: ((x: number, y: number, done: boolean) => void) | null = null;
  private readonly keys = new Set<string>();
  private flying = 0;

  constructor(private readonly element: HTMLElement, private readonly owner: ControlsOwner) {
    const on = <K extends keyof HTMLElementEventMap>(type: K, handler: (event: HTMLElementEventMap[K]) => void) => element.addEventListener(type, handler, { passive: false });
    on("pointerdown", (e) => this.down(e));
    on("pointermove", (e) => this.move(e));
    on("pointerup", (e) => this.up(e));
    on("pointercancel", (e) => this.up(e));
    on("pointerleave", () => owner.left());
    on("contextmenu", (e) => e.preventDefault());
    on("wheel", (e) => {
      e.preventDefault();
      this.dolly(Math.exp(Math.max(-60, Math.min(60, e.deltaY * (e.deltaMode ? 20 : 1))) * 0.003));
    });
    on("keydown", (e) => this.key(e, true));
    on("keyup", (e) => this.key(e, false));
    on("blur", () => this.keys.clear());
  }

  private at(e: PointerEvent): { x: number; y: number } {
    const box = this.element.getBoundingClientRect();
    return { x: e.clientX - box.left, y: e.clientY - box.top };
  }

  private down(e: PointerEvent): void {
    this.element.focus({ preventScroll: true });
    this.element.setPointerCapture(e.pointerId);
    const p = this.at(e);
    this.pointers.set(e.pointerId, p);
    if (this.pointers.size === 1) {
      this.travelled = 0;
      this.grabbed = e.button === 0 && !e.shiftKey ? this.owner.grab(p.x, p.y) : null;
    } else this.travelled = Infinity;
  }

  private move(e: PointerEvent): void {
    const p = this.at(e), before = this.pointers.get(e.pointerId);
    if (!before) return this.owner.hovered(p.x, p.y);
    const dx = p.x - before.x, dy = p.y - before.y;
    this.travelled += Math.hypot(dx, dy);
    if (this.grabbed) this.grabbed(p.x, p.y, false);
    else if (this.pointers.size === 2) {
      const other = [...this.pointers].find(([id]) => id !== e.pointerId)![1];
      const was = Math.hypot(before.x - other.x, before.y - other.y), is = Math.hypot(p.x - other.x, p.y - other.y);
      this.pan(dx / 2, dy / 2);
      if (was > 1 && is > 1) this.dolly(was / is);
    } else if (this.travelled > CLICK_PX) {
      if (e.buttons & 6 || e.shiftKey) this.pan(dx, dy);
      else this.turn(dx, dy);
    }
    this.pointers.set(e.pointerId, p);
  }

  private up(e: PointerEvent): void {
    const p = this.at(e);
    if (!this.pointers.delete(e.pointerId)) return;
    if (this.grabbed) this.grabbed(p.x, p.y, true);
    else if (this.travelled <= CLICK_PX && e.type === "pointerup" && e.button === 0) this.owner.clicked(p.x, p.y, e);
    this.grabbed = null;
  }

  /** Around the target, or in place when flying; (dx, dy) in pixels. */
  turn(dx: number, dy: number): void {
    const { pose, up } = this.owner, side = Math.min(this.element.clientWidth, this.element.clientHeight) || 1, target = targetOf(pose);
    const gain = (this.mode === "orbit" ? TURN : -TURN / 3) / side, angle = forwardOf(pose).angleTo(up);
    const pitch = Math.max(PITCH_LIMIT - angle, Math.min(Math.PI - PITCH_LIMIT - angle, dy * gain));
    const yaw = new Quaternion().setFromAxisAngle(up, -dx * gain), tilt = new Quaternion().setFromAxisAngle(rightOf(pose), this.upright(pose, up) * -pitch);
    pose.rotation.premultiply(tilt).premultiply(yaw).normalize();
    if (this.mode === "orbit") pose.position.copy(target).addScaledVector(forwardOf(pose), -pose.distance);
    this.owner.moved();
  }
  /** -1 where the picture stands on its head. */
  private upright(pose: Pose, up: Vector3): number {
    return new Vector3(0, -1, 0).applyQuaternion(pose.rotation).dot(up) < 0 ? -1 : 1;
  }

  pan(dx: number, dy: number): void {
    const { pose } = this.owner, perPixel = (2 * pose.distance * Math.tan(pose.fovY / 2)) / (this.element.clientHeight || 1);
    pose.position.addScaledVector(new Vector3(-dx * perPixel, -dy * perPixel, 0).applyQuaternion(pose.rotation), 1);
    this.owner.moved();
  }

  /** Nearer for a factor below 1; a flying camera steps along its axis. */
  dolly(factor: number): void {
    const { pose } = this.owner, target = targetOf(pose);
    if (this.mode === "orbit") {
      pose.distance = Math.min(Math.max(pose.distance * factor, 1e-4 * this.owner.size), 1e4 * this.owner.size);
      pose.position.copy(target).addScaledVector(forwardOf(pose), -pose.distance);
    } else pose.position.addScaledVector(forwardOf(pose), (1 - factor) * pose.distance);
    this.owner.moved();
  }

  private key(e: KeyboardEvent, pressed: boolean): void {
    const key = e.key.length === 1 ? e.key.toLowerCase() : e.key;
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (pressed && key.startsWith("Arrow")) {
      const step = Math.min(this.element.clientWidth, this.element.clientHeight) / 24;
      this.turn(key === "ArrowLeft" ? step : key === "ArrowRight" ? -step : 0, key === "ArrowUp" ? step : key === "ArrowDown" ? -step : 0);
      e.preventDefault();
    }
    if (!"wasdqe".includes(key)) return;
    if (pressed) this.keys.add(key);
    else this.keys.delete(key);
    if (this.keys.size && !this.flying) this.fly(performance.now());
  }

  private fly(before: number): void {
    this.flying = requestAnimationFrame((now) => {
      this.flying = 0;
      if (!this.keys.size) return;
      const { pose, size } = this.owner, step = Math.min(now - before, 100) * 1e-3 * size * 0.7, has = (k: string) => (this.keys.has(k) ? 1 : 0);
      const direction = new Vector3(has("d") - has("a"), has("q") - has("e"), has("w") - has("s"));
      pose.position.addScaledVector(direction.applyQuaternion(pose.rotation), step);
      this.owner.moved();
      this.fly(now);
    });
  }
}
