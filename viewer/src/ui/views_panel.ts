/** What is shown: colour or a map, its range, how the camera moves, how pictures are drawn. */
import type { App } from "../app";
import { LOOKS, RAMP, type Look } from "../mapping";
import type { BackendChoice } from "../stage";
import { button, check, h, press, row, section, select, show } from "./dom";

const NAMES: Record<Look, [string, string]> = {
  colour: ["Colour", "What a photo would show (1)"], depth: ["Depth", "Expected depth along the camera's axis (2)"], normal: ["Normal", "The thinnest axis of the Gaussians, in the world (3)"],
  alpha: ["Alpha", "How opaque the scene is (4)"], heat: ["Heat", "What the training run says of each Gaussian (5)"],
  features: ["Features", "Main directions of the features, the same colours from every view (6)"], similarity: ["Similar", "Click a point: how like its features are to all others (7)"],
};

export function viewsPanel(app: App, heats: () => string[], wantFeatures: () => void, featuresKnown: () => boolean): HTMLElement {
  const buttons = new Map(LOOKS.map((look) => [look, button(NAMES[look][0], () => choose(look), { title: NAMES[look][1], id: `look-${look}` })]));
  const ramp = h("div", { className: "ramp" }), low = h("span"), high = h("span"), legend = h("div", { id: "legend" }, ramp, h("div", { className: "ends" }, low, high));
  const stops = [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1].map((t) => Array.from(RAMP.subarray(4 * Math.round(255 * t), 4 * Math.round(255 * t) + 3)).join(" "));
  ramp.style.background = `linear-gradient(90deg, ${stops.map((s) => `rgb(${s})`).join(", ")})`;
  const near = h("input", { type: "range", min: "0", max: "1", step: "0.005", "aria-label": "Lower end of the colours" }), far = h("input", { type: "range", min: "0", max: "1", step: "0.005", "aria-label": "Upper end of the colours" });
  const ranges = h("div", {}, near, far), hint = h("p", { className: "hint" });
  let whole: [number, number] = [0, 1];
  const heatChoice = h("div");
  const limits = () => {
    const at = (e: HTMLInputElement) => whole[0] + Number(e.value) * (whole[1] - whole[0]);
    app.stage.range = [Math.min(at(near), at(far)), Math.max(at(near), at(far))];
    app.stage.invalidate();
    [low.textContent, high.textContent] = app.stage.range.map(show) as [string, string];
  };
  near.oninput = far.oninput = limits;

  function choose(look: Look): void {
    if ((look === "features" || look === "similarity") && !app.scene?.features) wantFeatures();
    void app.setLook(look);
  }
  function refresh(): void {
    const look = app.stage.look;
    for (const [name, b] of buttons) {
      press(b, name === look);
      b.hidden = name === "heat" ? !heats().length : name === "features" || name === "similarity" ? !featuresKnown() && !app.scene?.features : false;
      b.disabled = !app.scene;
    }
    const ramped = look === "depth" || look === "heat" || look === "similarity";
    legend.hidden = !ramped;
    ranges.hidden = look !== "depth" && look !== "heat";
    heatChoice.replaceChildren();
    if (look === "heat") heatChoice.append(row(h("label", {}, "Heat of"), select("Heat of", heats().map((n) => [n, n]), app.heatName, (n) => ((app.heatName = n), void app.setLook("heat")))));
    if (ramped) {
      const [a, b] = app.stage.range, spread = b - a;
      whole = look === "depth" ? [0, b + spread] : [a - spread * 0.5, b + spread * 0.5];
      near.value = String((a - whole[0]) / (whole[1] - whole[0]));
      far.value = String((b - whole[0]) / (whole[1] - whole[0]));
      [low.textContent, high.textContent] = look === "similarity" ? ["unlike", "alike"] : ([show(a), show(b)] as [string, string]);
    }
    hint.textContent = look === "similarity" ? "Click on something to see what resembles it." : look === "features" && !app.scene?.features ? "Features are on their way." : "";
    hint.hidden = !hint.textContent;
  }
  app.on("look", refresh);
  app.on("scene", refresh);
  refresh();
  return section("View", h("div", { className: "choices" }, ...buttons.values()), heatChoice, legend, ranges, hint);
}

export function drawingPanel(app: App): HTMLElement {
  const orbit = button("Orbit", () => mode("orbit"), { title: "Turn around the scene (O)", id: "mode-orbit" }), fly = button("Fly", () => mode("fly"), { title: "Look around and move with W A S D Q E (F)", id: "mode-fly" });
  const mode = (m: "orbit" | "fly") => {
    app.controls.mode = m;
    press(orbit, m === "orbit");
    press(fly, m === "fly");
  };
  mode("orbit");
  const backgrounds: Record<string, [number, number, number] | null> = { "the scene's": null, black: [0, 0, 0], grey: [0.5, 0.5, 0.5], white: [1, 1, 1] };
  return section("Camera and drawing",
    row(orbit, fly, button("Whole scene", () => app.scene && app.home(), { title: "Back to the whole scene (H)", id: "home" })),
    row(h("label", { for: "fov" }, "Field of view"), field(app)),
    row(h("label", {}, "Background"), select("Background", Object.keys(backgrounds).map((k) => [k, k]), "the scene's", (k) => app.setBackground(backgrounds[k]!), { id: "background" })),
    row(h("label", {}, "Drawn by"), select("Drawn by", [["auto", "what is faster"], ["webgl", "GPU (WebGL2)"], ["wasm", "CPU (WebAssembly)"]], "auto", (b) => app.stage.setBackend(b as BackendChoice), { id: "backend" })),
    row(check("Show cameras", true, (on) => ((app.showFrusta = on), app.stage.invalidate()), { id: "frusta" })));
}

function field(app: App): HTMLInputElement {
  const input: HTMLInputElement = h("input", { type: "number", id: "fov", min: "5", max: "150", step: "1", onchange: () => {
    const degrees = Math.min(150, Math.max(5, Number(input.value) || 50));
    app.setPose({ ...app.pose, fovY: (degrees * Math.PI) / 180 });
  } });
  const refresh = () => {
    if (document.activeElement !== input) input.value = String(Math.round((app.pose.fovY * 180) / Math.PI));
  };
  app.on("camera", refresh);
  refresh();
  return input;
}
