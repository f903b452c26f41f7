/** Starts the page: a scene that it carries, else the server that it came from, else an invitation to drop a file. */
import "./styles.css";
import { App } from "./app";
import { Connection, takeToken } from "./connection";
import { readContainer } from "./wire";

const canvas = document.createElement("canvas");
canvas.style.cssText = "width:100%;height:100%;display:block";
document.body.append(canvas);
const app = new App(canvas);
const carried = document.getElementById("scene"), token = carried ? null : takeToken();
if (carried) {
  const { manifest, scene } = readContainer(Uint8Array.from(atob(carried.textContent.trim()), (c) => c.charCodeAt(0)));
  app.open(scene, manifest);
} else if (token) {
  const line = new Connection(token);
  line.on("manifest", ({ manifest, scene, fresh }) => fresh && app.open(scene, manifest));
  line.on("chunk", ({ first, last }) => app.update(first, last));
  line.on("error", (e) => console.error(e));
  void line.scenes().then((s) => line.watch(s[0]!.id));
}
Object.assign(window, { splatkit: app });
