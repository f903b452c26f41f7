/** What frames the panels: title, status line, messages, help, theme, opening files, keys. */
import type { App } from "../app";
import type { Rgb } from "../mapping";
import { button, download, encoded, fileName, h, show } from "./dom";

/** Lines at the top, one for each key; an empty text takes its line away. */
export function messages(app: App): void {
  const box = h("div", { className: "messages", role: "status", "aria-live": "polite" }), shown = new Map<string, HTMLElement>();
  document.body.append(box);
  app.on("message", ({ text, kind, key }) => {
    shown.get(key)?.remove();
    shown.delete(key);
    if (!text) return;
    const line = h("div", { className: kind }, h("p", {}, text), button("×", () => line.remove(), { className: "icon", "aria-label": "Close" }));
    shown.set(key, line);
    box.append(line);
    if (kind === "info") setTimeout(() => line.remove(), 6000);
  });
}

export function statusLine(app: App): void {
  const where = h("span"), how = h("span", { id: "drawn-by" }), line = h("div", { className: "floating status", id: "status" }, how, where);
  document.body.append(line);
  let timer = 0;
  app.on("hover", (at) => {
    clearTimeout(timer);
    where.textContent = "";
    where.hidden = true;
    if (at && app.scene) timer = window.setTimeout(() => void app.placeAt(at.x, at.y).then((hit) => {
      where.textContent = hit ? `depth ${show(hit.depth)} at (${hit.place.toArray().map((v) => show(v)).join(", ")})` : "";
      where.hidden = !hit;
    }).catch(() => undefined), 120);
  });
  where.hidden = true;
  const refresh = () => (how.textContent = app.scene ? (app.stage.backend === "wasm" ? "CPU (WebAssembly)" : "GPU (WebGL2)") : "no scene");
  app.on("scene", refresh);
  app.on("camera", refresh);
  app.on("look", refresh);
  refresh();
}

export function topBar(app: App, screenshot: () => Promise<void>): HTMLElement {
  const help = helpDialog();
  const theme = button("◐", () => setTheme(document.documentElement.dataset.theme === "light" ? "dark" : "light", app), { className: "icon", title: "Dark or light (T)", "aria-label": "Dark or light", id: "theme" });
  const toggle = button("☰", () => document.body.classList.toggle("closed"), { className: "icon toggle", title: "Panel (P)", "aria-label": "Show or hide the panel", id: "toggle-panel" });
  const picker: HTMLInputElement = h("input", { type: "file", id: "file", hidden: true, accept: ".ply,.splat,.spz", onchange: () => {
    if (picker.files?.[0]) dropped?.(picker.files[0]);
    picker.value = "";
  } });
  document.body.append(help);
  return h("div", { className: "top" }, toggle, button("Open file", () => picker.click(), { id: "open-file", title: "A .ply, compressed .ply, .splat or .spz" }), picker, h("span", { className: "space" }),
    button("⤓", () => void screenshot(), { className: "icon", title: "Save a picture (S with Shift)", "aria-label": "Save a picture", id: "screenshot" }), theme,
    button("?", () => help.showModal(), { className: "icon", title: "Keys (?)", "aria-label": "Keys and mouse", id: "help" }));
}

let dropped: ((file: File) => void) | null = null;

/** Calls `open` with files that are dropped on the page or picked. */
export function fileDrops(open: (file: File) => void): void {
  dropped = open;
  const over = (on: boolean) => document.body.classList.toggle("dropping", on);
  addEventListener("dragover", (e) => (e.preventDefault(), over(true)));
  addEventListener("dragleave", (e) => e.relatedTarget === null && over(false));
  addEventListener("drop", (e) => {
    e.preventDefault();
    over(false);
    const file = e.dataTransfer?.files[0];
    if (file) open(file);
  });
}

export function setTheme(theme: "dark" | "light", app: App): void {
  document.documentElement.dataset.theme = theme;
  app.stage.empty = getComputedStyle(document.documentElement).getPropertyValue("--canvas").match(/[0-9a-f]{2}/gi)!.slice(0, 3).map((c) => parseInt(c, 16) / 255) as Rgb;
  app.stage.invalidate();
}

export function welcome(app: App): void {
  const box = h("div", { className: "welcome", id: "welcome" }, h("div", {}, h("h2", {}, "Drop a scene here"), h("p", {}, "A .ply, compressed .ply, .splat or .spz of 3D Gaussians. It stays in this browser."),
    button("Open file", () => document.getElementById("file")?.click(), { className: "primary" })));
  document.body.append(box);
  app.on("scene", () => (box.hidden = true));
}

export async function savePicture(app: App): Promise<void> {
  if (!app.scene) return;
  download(`${fileName(app.scene.header.name)}.png`, await encoded(await app.stage.capture(app.view()), "image/png"));
}

const KEYS: [string, string][] = [["Drag", "turn; one finger on a touch screen"], ["Shift + drag, right drag", "move sideways; two fingers"], ["Wheel", "nearer and farther; pinch"], ["W A S D Q E", "fly"], ["Arrows", "turn"],
  ["1 – 7", "colour, depth, normal, alpha, heat, features, similar"], ["H", "whole scene"], ["O, F", "orbit, fly"], ["[ and ]", "previous and next photo"], ["K", "add a key to the camera path"], ["M", "measure"], ["X", "select to delete"],
  ["Ctrl + Z, Ctrl + Shift + Z", "undo, redo"], ["Shift + S", "save a picture"], ["P, T, ?", "panel, dark or light, this help"]];

function helpDialog(): HTMLDialogElement {
  const dialog: HTMLDialogElement = h("dialog", { id: "keys-help", "aria-label": "Keys and mouse" }, h("h2", {}, "Keys and mouse"),
    h("dl", {}, ...KEYS.flatMap(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)])), button("Close", () => dialog.close(), { className: "primary" }));
  return dialog;
}

/** Keys of the whole page, unless something is being typed. */
export function keys(actions: Record<string, () => void>): void {
  addEventListener("keydown", (e) => {
    const target = e.target as HTMLElement;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName) && !(target instanceof HTMLInputElement && /^(range|checkbox)$/.test(target.type))) return;
    if (document.querySelector("dialog[open]")) return;
    const name = `${e.ctrlKey || e.metaKey ? "ctrl+" : ""}${e.shiftKey && e.key.length === 1 && /[a-z]/i.test(e.key) ? "shift+" : ""}${e.key.toLowerCase()}`;
    const action = actions[name];
    if (!action || e.altKey) return;
    e.preventDefault();
    action();
  });
}
