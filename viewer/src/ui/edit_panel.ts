/** Crop box, deletion by a rectangle, undo and redo, export; and measuring between two points. */
import { Vector3 } from "three";
import type { App } from "../app";
import { boxOf, inside, toPly } from "../editing";
import { reasonOf } from "../errors";
import type { Box } from "../overlay";
import { project } from "../pose";
import type { SplatScene } from "../scene";
import { button, check, download, fileName, h, press, row, section, show } from "./dom";

export function editPanel(app: App, exact: () => Promise<SplatScene>): HTMLElement {
  let whole: Box | null = null, box: Box | null = null, selecting = false;
  const count = h("p", { className: "hint", id: "edit-count", "aria-live": "polite" });
  const undo = button("Undo", () => (app.edits.undo(), app.applyEdits()), { title: "Ctrl+Z", id: "undo" }), redo = button("Redo", () => (app.edits.redo(), app.applyEdits()), { title: "Ctrl+Shift+Z", id: "redo" });
  const names = ["X", "Y", "Z"], sliders = h("div", { hidden: true, id: "crop" });
  const inputs = names.flatMap((axis, k) => (["low", "high"] as const).map((end) => {
    const input: HTMLInputElement = h("input", { type: "range", min: "0", max: "1", step: "0.002", "aria-label": `${axis}, ${end} end of the crop box`, oninput: () => {
      box![end][k] = whole!.low[k]! + Number(input.value) * (whole!.high[k]! - whole!.low[k]!);
      update();
    } });
    return [input, end, k] as const;
  }));
  const update = () => {
    app.overlay.setBox(box);
    app.edits.crop = preview.querySelector("input")!.checked ? box : null;
    app.applyEdits();
  };
  const preview = check("Hide what is outside", true, update, { id: "crop-preview" });
  const remove = (keep: boolean) => {
    const b = box!;
    app.edits.crop = null;
    app.edits.remove((i) => inside(b, app.scene!.means, i) !== keep);
    toggle.querySelector("input")!.checked = false;
    open(false);
  };
  sliders.append(...names.map((axis, k) => h("div", {}, h("span", { className: "hint" }, axis), inputs[2 * k]![0], inputs[2 * k + 1]![0])), row(preview),
    row(button("Keep inside", () => remove(true), { id: "keep-inside" }), button("Delete inside", () => remove(false), { id: "delete-inside" })));
  const open = (on: boolean) => {
    sliders.hidden = !on;
    if (on && app.scene) {
      whole = boxOf(app.scene);
      box = { low: [...whole.low], high: [...whole.high] };
      for (const [input, end] of inputs) input.value = end === "low" ? "0" : "1";
    } else box = null;
    update();
  };
  const toggle = check("Crop box", false, open, { id: "crop-toggle" });
  const faceAt = (x: number, y: number) => (box ? app.overlay.faceAt(app.view(), x, y) : null);
  app.handles = (x0, y0) => {
    const s = app.view().width / app.canvas.clientWidth, face = faceAt(x0 * s, y0 * s);
    return face && ((x, y) => {
      const to = box && app.overlay.faceDraggedTo(app.view(), face, x * s, y * s);
      if (to == null || !box || !whole) return;
      const { end, axis } = face, [low, high] = end === "low" ? [whole.low[axis], box.high[axis]] : [box.low[axis], whole.high[axis]];
      box[end][axis] = Math.min(Math.max(to, low), high);
      inputs.find(([, e, k]) => e === end && k === axis)![0].value = `${(box[end][axis] - whole.low[axis]) / (whole.high[axis] - whole.low[axis] || 1)}`;
      update();
    });
  };
  app.on("hover", (at) => app.canvas.classList.toggle("handle", !!at && !!faceAt(at.x, at.y)));

  const rectangle = button("Select to delete", () => select(!selecting), { title: "Drag a rectangle; all that lies in it is deleted (X)", id: "select" });
  const select = (on: boolean) => {
    selecting = on;
    press(rectangle, on);
    app.canvas.classList.toggle("aim", on);
    app.grabber = on ? rubber : null;
  };
  const rubber = (x0: number, y0: number) => {
    const frame = h("div", { className: "select-box" });
    document.body.append(frame);
    return (x: number, y: number, done: boolean) => {
      const [left, top, right, bottom] = [Math.min(x, x0), Math.min(y, y0), Math.max(x, x0), Math.max(y, y0)];
      frame.style.cssText = `left:${left}px;top:${top}px;width:${right - left}px;height:${bottom - top}px`;
      if (!done) return;
      frame.remove();
      select(false);
      const view = app.view(), s = view.width / app.canvas.clientWidth, m = app.scene!.means, visible = app.edits.visible(app.scene!);
      app.edits.remove((i) => {
        if (visible && !visible[i]) return false;
        const p = project(view, { x: m[3 * i]!, y: m[3 * i + 1]!, z: m[3 * i + 2]! });
        return p.z > 0 && p.x >= left * s && p.x <= right * s && p.y >= top * s && p.y <= bottom * s;
      });
      app.applyEdits();
    };
  };
  const save = button("Export PLY", () => void exact().then((scene) => {
    if (scene.count !== app.scene?.count) throw new Error("the run has gone on and its rows are others now; edit once it has ended");
    download(`${fileName(scene.header.name)}-edited.ply`, toPly(scene, app.edits.visible(scene)));
  }).catch((why: unknown) => app.say(`export: ${reasonOf(why)}`)), { id: "export", title: "What is shown, in full precision" });
  const refresh = () => {
    undo.disabled = !app.edits.canUndo;
    redo.disabled = !app.edits.canRedo;
    save.disabled = rectangle.disabled = !app.scene;
    const n = app.edits.count;
    count.textContent = n ? `${show(n)} deleted of ${show(app.scene?.count ?? 0)}` : "Nothing deleted.";
  };
  app.on("edits", refresh);
  app.on("scene", () => {
    toggle.querySelector("input")!.checked = false;
    sliders.hidden = true;
    box = null;
    app.overlay.setBox(null);
    refresh();
  });
  refresh();
  return section("Edit", row(toggle), sliders, row(rectangle), row(undo, redo, save), count);
}

export function measurePanel(app: App): HTMLElement {
  let active = false, points: Vector3[] = [];
  const out = h("p", { className: "hint", id: "measured", "aria-live": "polite" }), label = h("div", { className: "label", hidden: true });
  document.body.append(label);
  const toggle = button("Measure", () => set(!active), { title: "Click two points (M)", id: "measure" });
  const set = (on: boolean) => {
    active = on;
    press(toggle, on);
    points = [];
    app.canvas.classList.toggle("aim", on);
    draw();
  };
  const draw = () => {
    out.textContent = !active ? "" : points.length === 0 ? "Click the first point." : points.length === 1 ? "Click the second point." : `Distance: ${show(points[0]!.distanceTo(points[1]!))}`;
    out.hidden = !out.textContent;
    app.overlay.setLine("measure", points, "#ffb454");
    place();
    app.stage.invalidate();
  };
  const place = () => {
    label.hidden = points.length < 2;
    if (points.length < 2) return;
    const view = app.view(), p = project(view, points[0]!.clone().lerp(points[1]!, 0.5)), s = app.canvas.clientWidth / view.width;
    label.hidden = p.z <= 0;
    label.textContent = show(points[0]!.distanceTo(points[1]!));
    [label.style.left, label.style.top] = [`${p.x * s}px`, `${p.y * s}px`];
  };
  app.on("camera", place);
  app.on("pick", ({ x, y }) => {
    if (app.stage.look === "similarity") return void app.similarAt(x, y);
    if (!active) return;
    void app.placeAt(x, y).then((hit) => {
      if (!hit) return app.say("Nothing is there to measure from; click on the scene.", "info", "measure");
      points = [...(points.length === 2 ? [] : points), hit.place];
      draw();
    });
  });
  app.on("scene", () => set(false));
  return section("Measure", row(toggle, out));
}
