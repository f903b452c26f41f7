/** Starts the page: a scene that it carries, else the server that it came from, else an invitation to drop a file. */
import "./styles.css";
import { App } from "./app";
import { fromBase64 } from "./base64";
import { Connection, takeToken } from "./connection";
import { reasonOf } from "./errors";
import { readFile } from "./formats";
import { LOOKS } from "./mapping";
import { Compare } from "./ui/compare";
import { h, select, show } from "./ui/dom";
import { editPanel, measurePanel } from "./ui/edit_panel";
import { pathPanel } from "./ui/path_panel";
import { fileDrops, keys, messages, savePicture, setTheme, statusLine, topBar, welcome } from "./ui/shell";
import { camerasPanel, curvesPanel } from "./ui/training_panel";
import { drawingPanel, viewsPanel } from "./ui/views_panel";
import { readContainer, type Manifest } from "./wire";

const canvas = h("canvas", { className: "stage", tabIndex: 0, role: "application", "aria-label": "The scene. Drag to turn, wheel to come nearer, ? for all keys." });
document.body.append(canvas);
try {
  start();
} catch (why) {
  document.body.append(h("div", { className: "messages" }, h("div", { className: "error" }, h("p", {}, reasonOf(why)))));
}

function start(): void {
  const app = new App(canvas);
  let line: Connection | null = null, manifest: Manifest | null = null;
  setTheme(matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark", app);
  if (innerWidth <= 700) document.body.classList.add("closed");
  messages(app);

  const name = h("h1", {}, "splatkit"), about = h("p", { id: "about" }), dot = h("span", { className: "dot" }), scenes = h("div"), title = h("header", { className: "floating title" }, name, about, scenes);
  const describe = (state = "") => {
    name.textContent = app.scene?.header.name || manifest?.name || "splatkit";
    const step = manifest?.step ?? app.scene?.header.step;
    about.replaceChildren(...(line ? [dot] : []), [app.scene ? `${show(app.scene.count)} Gaussians, SH ${app.scene.shDegree}` : "no scene yet", step ? `step ${show(step)}` : "", state].filter(Boolean).join(" · "));
  };
  const compare = new Compare(app, (i) => (line ? line.photo(i) : Promise.reject(new Error("there is no server to fetch it from"))));
  const cameras = camerasPanel(app, compare) as HTMLElement & { refresh(): void }, curves = curvesPanel(), path = pathPanel(app, (view, background) => (line ? line.frame(view, background) : null));
  const aside = h("aside", { className: "floating panel", "aria-label": "Settings" }, topBar(app, () => savePicture(app)), h("div", { className: "scroll" },
    viewsPanel(app, () => (line ? (manifest?.heat ?? []) : []), () => line?.want("features"), () => !!manifest?.features && !!line), cameras, curves.element, drawingPanel(app), measurePanel(app), editPanel(app, () => (line ? line.exact() : Promise.resolve(app.scene!))), path.element));
  document.body.append(title, aside);
  statusLine(app);
  welcome(app);
  app.on("scene", () => describe());
  describe();

  let drops = 0;
  const drop = (file: File, turn = ++drops) => void readFile(file).then(({ scene }) => {
    if (turn !== drops) return; // another was dropped since
    line?.leave();
    [line, manifest] = [null, null];
    app.heat = null;
    app.complete = () => true;
    scene.header = { ...scene.header, name: file.name };
    app.open(scene, null);
    app.say("", "error", "app");
  }).catch((why: unknown) => app.say(reasonOf(why)));
  fileDrops(drop);
  keys({
    ...Object.fromEntries(LOOKS.map((look, i) => [String(i + 1), () => document.getElementById(`look-${look}`)?.click()])),
    h: () => document.getElementById("home")?.click(), o: () => document.getElementById("mode-orbit")?.click(), f: () => document.getElementById("mode-fly")?.click(),
    "[": () => app.jump(((app.captureIndex ?? 0) - 1 + app.cameras.length) % Math.max(1, app.cameras.length)), "]": () => app.jump(((app.captureIndex ?? -1) + 1) % Math.max(1, app.cameras.length)),
    k: path.add, m: () => document.getElementById("measure")?.click(), x: () => document.getElementById("select")?.click(),
    "ctrl+z": () => document.getElementById("undo")?.click(), "ctrl+shift+z": () => document.getElementById("redo")?.click(), "shift+s": () => void savePicture(app),
    p: () => document.body.classList.toggle("closed"), t: () => document.getElementById("theme")?.click(), "?": () => document.getElementById("help")?.click(),
  });

  const carried = document.getElementById("scene"), token = carried ? null : takeToken();
  if (carried) {
    try {
      const read = readContainer(fromBase64(carried.textContent.trim()));
      carried.remove();
      app.open(read.scene, (manifest = { ...read.manifest, cameras: read.manifest.cameras.map((c) => ({ ...c, photo: null })) }));
    } catch (why) {
      app.say(`The scene in this page cannot be read: ${reasonOf(why)}`);
    }
  } else if (token) line = connect(token);
  else if (location.protocol.startsWith("http")) app.say("This address lacks its key. Open the link that `splatkit view` printed, or drop a file.", "info", "line");
  Object.assign(window, { splatkit: app });

  function connect(key: string): Connection {
    const to = new Connection(key);
    app.complete = () => to.complete;
    app.heat = (what) => to.heat(what);
    to.on("manifest", (m) => {
      manifest = m.manifest;
      if (!manifest.heat.includes(app.heatName)) app.heatName = manifest.heat[0] ?? "";
      if (m.fresh) app.open(m.scene, manifest, !!app.scene && app.scene !== m.scene && opened === manifest.id);
      else {
        app.setCameras(manifest.cameras);
        app.pca = manifest.features?.pca ?? app.pca;
        if (app.stage.look === "heat" && performance.now() - heated > 2000) {
          heated = performance.now();
          void app.setLook("heat");
        }
      }
      opened = manifest.id;
      cameras.refresh();
      describe();
    });
    to.on("chunk", ({ first, last, plane, more }) => {
      if (plane !== "features") return app.update(first, last, more);
      if (app.stage.look === "features" || last === app.scene?.count) app.emit("look", app.stage.look);
    });
    to.on("rows", ({ first }) => app.arrived(first));
    to.on("metrics", curves.show);
    to.on("error", (text) => app.say(text, "error", "server"));
    to.on("state", (state) => {
      dot.className = `dot ${state}`;
      describe({ connecting: "connecting", open: manifest?.live ? "live" : "", lost: "connection lost", done: "finished", refused: "refused" }[state]);
      const text = { lost: "The connection to the server is lost. Trying again; what you see stays.", refused: "The server refused this page. Open the link that `splatkit view` printed." } as Record<string, string>;
      app.say(text[state] ?? "", "error", "line");
    });
    void to.scenes().then((all) => {
      if (all.length > 1) scenes.replaceChildren(select("Scene", all.map((s) => [s.id, s.name]), all[0]!.id, (id) => to.watch(id), { id: "scene-choice" }));
      if (all[0]) to.watch(all[0].id);
      else app.say("The server shows no scene.", "info", "line");
    }).catch((why: unknown) => app.say(reasonOf(why), "error", "line"));
    return to;
  }
}
let opened = ""; // the scene that the page shows
let heated = 0; // when its heat was fetched last
