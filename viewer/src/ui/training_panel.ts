/** The capture cameras, how well each is drawn, and the curves of a training run. */
import type { App } from "../app";
import type { Metrics } from "../connection";
import { h, section, show } from "./dom";
import type { Compare } from "./compare";

export function camerasPanel(app: App, compare: Compare): HTMLElement {
  const list = h("div", { className: "list", role: "list", id: "cameras" }), key = h("p", { className: "hint" }, "Loss of each photo: blue cameras are drawn well, red ones badly."), panel = section("Photos", list, key, compare.element);
  const refresh = () => {
    panel.hidden = !app.cameras.length;
    key.hidden = app.cameras.every((c) => c.loss === null);
    list.replaceChildren(...app.cameras.slice(0, 2000).map((c, i) =>
      h("button", { type: "button", onclick: () => app.jump(i), title: `${c.name}, ${c.width} × ${c.height}` }, h("span", {}, c.name), h("span", { className: "value" }, c.loss === null ? "" : show(c.loss)))));
    mark();
  };
  const mark = () => Array.from(list.children).forEach((b, i) => {
    if (i === app.captureIndex) b.setAttribute("aria-current", "true"), b.scrollIntoView({ block: "nearest" });
    else b.removeAttribute("aria-current");
  });
  app.on("scene", refresh);
  app.on("capture", mark);
  refresh();
  return Object.assign(panel, { refresh });
}

export function curvesPanel(): { element: HTMLElement; show: (m: Metrics) => void } {
  const curves = [curve("Loss"), curve("PSNR, dB"), curve("Gaussians")] as const, element = section("Training", ...curves.map((c) => c.element));
  element.hidden = true;
  return { element, show: (m) => {
    element.hidden = !m.steps.length && !m.psnr.length;
    curves[0].draw(m.steps, m.loss);
    curves[1].draw(m.psnr.map((p) => p[0]), m.psnr.map((p) => p[1]));
    curves[2].draw(m.steps, m.count);
  } };
}

const WIDTH = 272, HEIGHT = 62, PAD = 5, POINTS = 400;

function curve(name: string): { element: HTMLElement; draw: (x: number[], y: number[]) => void } {
  const value = h("span", { className: "value" }), ends = [h("span"), h("span")] as const, svg = "http://www.w3.org/2000/svg";
  const plot = document.createElementNS(svg, "svg"), line = document.createElementNS(svg, "polyline");
  plot.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  plot.setAttribute("preserveAspectRatio", "none");
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", name);
  plot.append(line);
  let points: [number, number][] = [], place: (i: number) => [number, number] = () => [0, 0];
  const last = () => (value.textContent = points.length ? show(points.at(-1)![1]) : "");
  plot.addEventListener("pointermove", (e) => {
    if (!points.length) return;
    const box = plot.getBoundingClientRect(), x = ((e.clientX - box.left) / box.width) * WIDTH;
    let best = 0;
    points.forEach((_, i) => Math.abs(place(i)[0] - x) < Math.abs(place(best)[0] - x) && (best = i));
    value.textContent = `${show(points[best]![1])} at step ${show(points[best]![0])}`;
  });
  plot.addEventListener("pointerleave", last);
  const element = h("div", { className: "curve" }, h("div", { className: "head" }, h("span", {}, name), value), plot as unknown as Node, h("div", { className: "ends" }, ...ends));
  return { element, draw: (x, y) => {
    const all = x.map((v, i) => [v, y[i]!] as [number, number]).filter((p) => Number.isFinite(p[0]) && Number.isFinite(p[1])), every = Math.max(1, Math.ceil(all.length / POINTS));
    points = all.filter((_, i) => i % every === 0 || i === all.length - 1);
    element.hidden = !points.length;
    if (!points.length) return;
    const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]), [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    place = (i) => [PAD + ((points[i]![0] - x0) / (x1 - x0 || 1)) * (WIDTH - 2 * PAD), HEIGHT - PAD - ((points[i]![1] - y0) / (y1 - y0 || 1)) * (HEIGHT - 2 * PAD)];
    line.setAttribute("points", points.map((_, i) => place(i).map((v) => v.toFixed(1)).join(",")).join(" "));
    plot.setAttribute("aria-label", `${name}: from ${show(y0)} to ${show(y1)} over steps ${show(x0)} to ${show(x1)}`);
    ends[0].textContent = `${show(y0)} – ${show(y1)}`;
    ends[1].textContent = `step ${show(x1)}`;
    last();
  } };
}
