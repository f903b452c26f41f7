/** A camera path: keyframes from where one stands, a preview, its pictures as a film, and the file that splatkit films from. */
import type { App } from "../app";
import { reasonOf } from "../errors";
import { animatedWebp, zip, type Picture } from "../film";
import type { Rgb } from "../mapping";
import { CameraPath } from "../path";
import type { View } from "../pose";
import { button, download, encoded, fileName, h, row, section, select } from "./dom";

/** `server` draws a frame as a run does; null where there is none. */
export function pathPanel(app: App, server: (view: View, background: Rgb) => Promise<Blob> | null): { element: HTMLElement; add: () => void } {
  const path = new CameraPath(), size = { width: 1280, height: 720 }, keys = h("div", { className: "list", id: "keys" }), hint = h("p", { className: "hint" });
  let playing = 0;
  const number = (label: string, value: number, low: number, high: number, set: (v: number) => void, whole = false) => {
    const input: HTMLInputElement = h("input", { type: "number", value: String(value), min: String(low), max: String(high), step: whole ? "1" : "any", "aria-label": label, onchange: () => {
      const given = Math.min(high, Math.max(low, Number(input.value) || low)), v = whole ? Math.round(given) : given;
      input.value = String(v);
      set(v);
      refresh();
    } });
    return input;
  };
  const seconds = number("Seconds", path.seconds, 0.1, 600, (v) => (path.seconds = v)), fps = number("Frames a second", path.fps, 1, 120, (v) => (path.fps = v));
  const width = number("Width in pixels", size.width, 16, 4096, (v) => (size.width = v), true), height = number("Height in pixels", size.height, 16, 4096, (v) => (size.height = v), true);
  const play = button("Preview", () => (playing ? stop() : start()), { id: "play" });
  const stop = () => {
    cancelAnimationFrame(playing);
    playing = 0;
    play.textContent = "Preview";
  };
  const start = () => {
    const began = performance.now();
    play.textContent = "Stop";
    const step = (now: number) => {
      const t = (now - began) / (1000 * path.seconds);
      app.setPose(path.at(Math.min(Math.max(t, 0), 1)));
      if (t >= 1) stop();
      else playing = requestAnimationFrame(step);
    };
    playing = requestAnimationFrame(step);
  };
  const save = button("Save path", () => download("camera-path.json", new Blob([path.toJson(size.width, size.height)], { type: "application/json" })), { id: "save-path", title: "Frames for: splatkit render SCENE --path camera-path.json" });
  let format = "zip", filming = false;
  const made = h("p", { className: "hint", id: "filmed", "aria-live": "polite" });
  const formats = select("Format of the film", [["zip", "PNG in a zip"], ["webp", "Animated WebP"]], format, (f) => (format = f), { id: "film-format" });
  const film = button("Export film", () => void (filming ? (filming = false) : record()), { id: "film", title: "Every frame of the path, drawn by the rasterizer that runs draw with" });
  const record = async () => {
    const views = path.views(size.width, size.height), type = format === "zip" ? "image/png" : "image/webp", pictures: Picture[] = [];
    filming = true;
    film.textContent = "Stop";
    try {
      for (const [i, view] of views.entries()) {
        made.textContent = `Frame ${i + 1} of ${views.length}`;
        pictures.push({ name: `${String(i).padStart(5, "0")}.png`, bytes: new Uint8Array(await (await frameOf(view, type)).arrayBuffer()) });
        if (!filming) return void (made.textContent = "Stopped.");
      }
      const out = format === "zip" ? zip(pictures) : animatedWebp(pictures, size.width, size.height, path.fps);
      download(`${fileName(app.scene!.header.name)}.${format}`, out);
      made.textContent = `${views.length} frames, ${(out.size / 1e6).toFixed(1)} MB.`;
    } catch (why) {
      made.textContent = "";
      app.say(`film: ${reasonOf(why)}`);
    } finally {
      filming = false;
      film.textContent = "Export film";
    }
  };
  /** By the server where it has what is shown, else by the same rasterizer in the page. */
  const frameOf = async (view: View, type: "image/png" | "image/webp"): Promise<Blob> => {
    const shot = app.stage.shot(), edited = !!app.scene && !!app.edits.visible(app.scene);
    const drawn = shot.look === "colour" && !edited ? await server(view, shot.background) : null;
    if (drawn && type === "image/png") return drawn;
    return encoded(drawn ? await pixelsOf(drawn) : await app.stage.capture(view, shot, true), type);
  };
  const file: HTMLInputElement = h("input", { type: "file", accept: ".json,application/json", hidden: true, onchange: () => {
    void file.files?.[0]?.text().then((text) => {
      path.read(text);
      [seconds.value, fps.value] = [String(path.seconds), String(path.fps)];
      refresh();
    }).catch((why: unknown) => app.say(reasonOf(why)));
    file.value = "";
  } });
  const add = () => {
    if (!app.scene) return;
    path.add(app.pose);
    refresh();
  };
  const refresh = () => {
    keys.hidden = !path.keys.length;
    keys.replaceChildren(...path.keys.map((key, i) => h("button", { type: "button", title: "Go there; with Alt: take it out", onclick: (e: MouseEvent) => {
      if (e.altKey) path.keys.splice(i, 1), refresh();
      else app.setPose(key);
    } }, h("span", {}, `Key ${i + 1}`), h("span", { className: "value", title: "Take it out", role: "button", "aria-label": `Take out key ${i + 1}`, onclick: (e: MouseEvent) => {
      e.stopPropagation();
      path.keys.splice(i, 1);
      refresh();
    } }, "×"))));
    play.disabled = save.disabled = film.disabled = path.keys.length < 2;
    hint.textContent = path.keys.length < 2 ? "Add two keys or more, each from where you stand." : `${path.frames} frames through ${path.keys.length} keys.`;
    app.overlay.setLine("path", path.curve(), "#4fd1c5");
    app.stage.invalidate();
  };
  app.on("scene", refresh);
  refresh();
  const element = section("Camera path", row(button("Add key", add, { title: "From here (K)", id: "add-key" }), play), keys, row(h("label", {}, "Seconds"), seconds), row(h("label", {}, "Frames a second"), fps), row(h("label", {}, "Size"), width, "×", height),
    row(formats, film), made, row(save, button("Load path", () => file.click()), file), hint);
  return { element, add };
}

async function pixelsOf(picture: Blob): Promise<ImageData> {
  const bitmap = await createImageBitmap(picture), canvas = new OffscreenCanvas(bitmap.width, bitmap.height), ink = canvas.getContext("2d")!;
  ink.drawImage(bitmap, 0, 0);
  return ink.getImageData(0, 0, bitmap.width, bitmap.height);
}
