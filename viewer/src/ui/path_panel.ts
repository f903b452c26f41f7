/** A camera path: keyframes from where one stands, a preview, and the file that splatkit films from. */
import type { App } from "../app";
import { reasonOf } from "../errors";
import { CameraPath } from "../path";
import { button, download, h, row, section } from "./dom";

export function pathPanel(app: App): { element: HTMLElement; add: () => void } {
  const path = new CameraPath(), keys = h("div", { className: "list", id: "keys" }), hint = h("p", { className: "hint" });
  let playing = 0;
  const number = (label: string, value: number, low: number, high: number, set: (v: number) => void) => {
    const input: HTMLInputElement = h("input", { type: "number", value: String(value), min: String(low), max: String(high), step: "any", "aria-label": label, onchange: () => {
      const v = Math.min(high, Math.max(low, Number(input.value) || low));
      input.value = String(v);
      set(v);
      refresh();
    } });
    return input;
  };
  const seconds = number("Seconds", path.seconds, 0.1, 600, (v) => (path.seconds = v)), fps = number("Frames a second", path.fps, 1, 120, (v) => (path.fps = v));
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
  const save = button("Save path", () => download("camera-path.json", new Blob([path.toJson(1280, 720)], { type: "application/json" })), { id: "save-path", title: "Frames for: splatkit render SCENE --path camera-path.json" });
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
    play.disabled = save.disabled = path.keys.length < 2;
    hint.textContent = path.keys.length < 2 ? "Add two keys or more, each from where you stand." : `${path.frames} frames through ${path.keys.length} keys.`;
    app.overlay.setLine("path", path.curve(), "#4fd1c5");
    app.stage.invalidate();
  };
  app.on("scene", refresh);
  refresh();
  const element = section("Camera path", row(button("Add key", add, { title: "From here (K)", id: "add-key" }), play), keys, row(h("label", {}, "Seconds"), seconds), row(h("label", {}, "Frames a second"), fps),
    row(save, button("Load path", () => file.click()), file), hint);
  return { element, add };
}
