/** A photo over the render of its camera: wipe, flicker or difference, with the PSNR of the whole picture. */
import type { App } from "../app";
import { reasonOf } from "../errors";
import { fitted } from "../pose";
import { button, h, press, row } from "./dom";

const MODES = ["wipe", "flicker", "difference"] as const;
type Mode = (typeof MODES)[number];
const FLICKER_MS = 500, GAIN = 5;

export class Compare {
  readonly element: HTMLElement;
  private readonly layer = h("div", { className: "compare", hidden: true });
  private readonly photo = h("canvas", { role: "img", "aria-label": "Photo" });
  private readonly difference = h("canvas", { role: "img", "aria-label": "Difference of photo and render" });
  private readonly handle = h("div", { className: "handle", role: "slider", tabIndex: 0, "aria-label": "Border between photo and render", "aria-valuemin": "0", "aria-valuemax": "100" });
  private readonly result = h("p", { className: "hint value", id: "psnr", "aria-live": "polite" });
  private readonly buttons = new Map(MODES.map((m) => [m, button(m[0]!.toUpperCase() + m.slice(1), () => this.setMode(this.mode === m ? null : m), { id: `compare-${m}` })]));
  private mode: Mode | null = null;
  private at = 0.5;
  private timer = 0;
  private loaded: number | null = null; // whose photo the canvas holds

  constructor(private readonly app: App, private readonly fetchPhoto: (index: number) => Promise<Blob>) {
    this.layer.append(this.photo, this.difference, this.handle);
    document.body.append(this.layer);
    this.element = h("div", { hidden: true }, h("p", { className: "hint" }, "Photo against render"), row(...this.buttons.values()), this.result);
    app.on("capture", (index) => {
      this.element.hidden = index === null || app.cameras[index]?.photo == null;
      if (this.element.hidden) this.setMode(null);
      else if (this.mode) this.setMode(this.mode);
    });
    app.on("scene", () => ((this.loaded = null), this.setMode(null)));
    app.on("look", (look) => look !== "colour" && this.setMode(null));
    new ResizeObserver(() => this.place()).observe(app.canvas);
    this.handle.onpointerdown = (e) => {
      this.handle.setPointerCapture(e.pointerId);
      this.handle.onpointermove = (m) => this.slide((m.clientX - this.layer.getBoundingClientRect().left) / this.layer.clientWidth);
      this.handle.onpointerup = () => (this.handle.onpointermove = null);
    };
    this.handle.onkeydown = (e) => {
      if (e.key === "ArrowLeft" || e.key === "ArrowRight") this.slide(this.at + (e.key === "ArrowLeft" ? -0.02 : 0.02)), e.preventDefault();
    };
  }

  private setMode(mode: Mode | null): void {
    this.mode = mode;
    for (const [m, b] of this.buttons) press(b, m === mode);
    clearInterval(this.timer);
    this.layer.hidden = mode === null;
    this.result.hidden = mode === null;
    this.handle.hidden = mode !== "wipe";
    this.photo.hidden = mode === "difference";
    this.difference.hidden = mode !== "difference";
    this.photo.style.clipPath = "";
    if (mode === null) return;
    if (mode === "wipe") this.slide(this.at);
    if (mode === "flicker") this.timer = window.setInterval(() => (this.photo.hidden = !this.photo.hidden), FLICKER_MS);
    this.place();
    void this.measure();
  }

  private slide(at: number): void {
    this.at = Math.min(Math.max(at, 0), 1);
    this.handle.style.left = `${100 * this.at}%`;
    this.handle.setAttribute("aria-valuenow", String(Math.round(100 * this.at)));
    this.photo.style.clipPath = `inset(0 ${100 * (1 - this.at)}% 0 0)`;
  }

  private place(): void {
    const index = this.app.captureIndex, c = index === null ? undefined : this.app.cameras[index];
    if (!c) return;
    const { left, top, scale } = fitted({ ...c, worldToCam: new Float32Array(16) }, this.app.canvas.clientWidth, this.app.canvas.clientHeight);
    Object.assign(this.layer.style, { left: `${left}px`, top: `${top}px`, width: `${scale * c.width}px`, height: `${scale * c.height}px` });
  }

  /** Reads the photo, draws the same view at its size, and says how far they are apart. */
  private async measure(): Promise<void> {
    const { app } = this, index = app.captureIndex!, c = app.cameras[index]!;
    if (this.loaded === index) return;
    this.loaded = index;
    this.result.textContent = "Fetching the photo …";
    try {
      const bitmap = await createImageBitmap(await this.fetchPhoto(c.photo!)), { width, height } = bitmap;
      for (const canvas of [this.photo, this.difference]) [canvas.width, canvas.height] = [width, height];
      const ink = this.photo.getContext("2d", { willReadFrequently: true })!;
      ink.drawImage(bitmap, 0, 0);
      const photo = ink.getImageData(0, 0, width, height);
      const K = Float32Array.from(c.K, (v, i) => v * (i < 3 ? width / c.width : i < 6 ? height / c.height : 1));
      const shot = { look: "colour" as const, reading: { mode: "colour" as const, range: [0, 1] as [number, number] }, background: app.stage.background };
      const render = await app.stage.capture({ worldToCam: Float32Array.from(c.world_to_cam), K, width, height }, shot);
      if (app.captureIndex !== index) return;
      const out = new ImageData(width, height);
      let sum = 0;
      for (let i = 0; i < out.data.length; i++) {
        if (i % 4 === 3) {
          out.data[i] = 255;
          continue;
        }
        const d = photo.data[i]! - render.data[i]!;
        sum += d * d;
        out.data[i] = GAIN * Math.abs(d);
      }
      this.difference.getContext("2d")!.putImageData(out, 0, 0);
      const mse = sum / (3 * width * height * 255 * 255);
      this.result.textContent = `PSNR ${mse > 0 ? (-10 * Math.log10(mse)).toFixed(2) : "∞"} dB at ${width} × ${height}; the difference is shown ${GAIN}-fold.`;
    } catch (why) {
      this.loaded = null;
      this.result.textContent = "";
      app.say(`photo: ${reasonOf(why)}`);
    }
  }
}
