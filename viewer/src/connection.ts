/** The line to `splatkit view`: scenes over HTTP and a socket, under a token that came in the address. A lost line is tried again, and nothing of the page is forgotten. */
import { Emitter } from "./emitter";
import { reasonOf } from "./errors";
import type { Rgb } from "./mapping";
import type { View } from "./pose";
import { PARTS, blankScene, type SplatScene } from "./scene";
import { readManifest, readMessage, writeChunk, readHeat, type Manifest, type Plane } from "./wire";

export interface Metrics {
  steps: number[];
  loss: number[];
  psnr: [number, number][];
  count: number[];
}

export interface ConnectionEvents {
  state: "connecting" | "open" | "lost" | "done" | "refused";
  manifest: { manifest: Manifest; scene: SplatScene; fresh: boolean };
  chunk: { first: number; last: number; plane: Plane; more: boolean }; // more: of an update of what was whole before
  metrics: Metrics;
  rows: { first: boolean }; // the first rows of a scene have come, or all have
  error: string;
}

const REFUSED = 1008; // the code of a socket that the server closes for what was said on it
const RETRY_MS = [500, 1000, 2000, 4000, 8000];
const QUEUED_MAX = 8 << 20; // bytes of a message of the socket
const TOKEN_KEY = "splatkit-token";

/** The token of the address, which is then taken out of it; kept for a reload of this tab. */
export function takeToken(): string | null {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  try {
    if (token) {
      history.replaceState(null, "", location.pathname + location.search);
      sessionStorage.setItem(TOKEN_KEY, token);
    }
    return token ?? sessionStorage.getItem(TOKEN_KEY);
  } catch {
    return token; // a sandboxed page has no storage
  }
}

export class Connection extends Emitter<ConnectionEvents> {
  private socket: WebSocket | null = null;
  private tries = 0;
  private closed = false; // by the page
  private ended = false; // the run has said that it is done
  private planes: Plane[] = ["core", "sh"];
  private scene: SplatScene | null = null;
  manifest: Manifest | null = null;
  private have = new Map<string, number>(); // version by plane and chunk
  private shown: "nothing" | "some" | "all" = "nothing"; // of the rows of the scene
  private acknowledging = 0;
  private metrics: Metrics = { steps: [], loss: [], psnr: [], count: [] };

  constructor(private readonly token: string, private sceneId = "0") {
    super();
  }

  async get(path: string, body?: object): Promise<Response> {
    const reply = await fetch(path, { headers: { Authorization: `Bearer ${this.token}` }, cache: "no-store", ...(body && { method: "POST", body: JSON.stringify(body) }) });
    if (!reply.ok) throw new Error(reply.status === 401 || reply.status === 403 ? "the server does not know this page's token; open the link that `splatkit view` printed" : `${path}: the server answered ${reply.status}`);
    return reply;
  }
  async scenes(): Promise<{ id: string; name: string; live: boolean }[]> {
    const json = (await (await this.get("/api/scenes")).json()) as { scenes?: { id: string; name: string; live: boolean }[] };
    return (json.scenes ?? []).slice(0, 1000);
  }
  async photo(index: number): Promise<Blob> {
    return (await this.get(`/api/scene/${encodeURIComponent(this.sceneId)}/photo/${index}`)).blob();
  }

  /** PNG of the scene as the server has it, by the rasterizer that runs draw with. */
  async frame(view: View, background: Rgb): Promise<Blob> {
    const { width, height } = view, camera = { world_to_cam: Array.from(view.worldToCam), K: Array.from(view.K), width, height };
    return (await this.get(`/api/scene/${encodeURIComponent(this.sceneId)}/frame`, { ...camera, background: Array.from(background) })).blob();
  }

  /** One heat of every Gaussian, by its name in the manifest. */
  heat(name: string): Promise<Float32Array> {
    return twice(() => this.heatNow(name));
  }
  private async heatNow(name: string): Promise<Float32Array> {
    const m = this.manifest!, out = new Float32Array(m.count);
    for (const [k, { count }] of m.chunks.entries()) {
      const bytes = await (await this.get(`/api/scene/${encodeURIComponent(m.id)}/chunk/${k}/heat?name=${encodeURIComponent(name)}`)).arrayBuffer();
      const { channels, values } = readHeat(count, new Uint8Array(bytes));
      for (let i = 0; i < count; i++) out[k * m.chunk_size + i] = values[channels * i]!;
    }
    return out;
  }

  /** The scene unrounded, as the server has it now. */
  exact(): Promise<SplatScene> {
    return twice(() => this.exactNow());
  }
  private async exactNow(): Promise<SplatScene> {
    const m = readManifest(await (await this.get(`/api/scene/${encodeURIComponent(this.sceneId)}`)).json()), scene = blankScene(m.count, m.sh_degree, m.header);
    for (const [k, chunk] of m.chunks.entries()) {
      const reply = await this.get(`/api/scene/${encodeURIComponent(m.id)}/chunk/${k}/float32?version=${chunk.version}`);
      writeChunk(scene, "float32", k * m.chunk_size, chunk.count, new Uint8Array(await reply.arrayBuffer()));
    }
    if (this.scene?.features && this.scene.count === m.count) scene.features = this.scene.features;
    return scene;
  }

  /** Whether all that is watched is there as the newest manifest has it. */
  get complete(): boolean {
    return !!this.manifest && this.planes.every((plane) => !has(this.manifest!, plane) || this.lacking(plane) === 0);
  }
  private lacking(plane: Plane): number {
    return this.manifest!.chunks.filter((chunk, k) => this.have.get(`${plane} ${k}`) !== chunk.version).length;
  }

  /** Watches a scene; what was watched before is left. */
  watch(sceneId: string): void {
    this.sceneId = sceneId;
    this.scene = this.manifest = null;
    this.shown = "nothing";
    this.have.clear();
    this.metrics = { steps: [], loss: [], psnr: [], count: [] };
    this.ended = false;
    if (this.socket?.readyState === WebSocket.OPEN) this.sendWatch();
    else if (!this.socket) this.open();
    void this.pastMetrics();
  }
  /** Asks for a further plane of the scene. */
  want(plane: Plane): void {
    if (this.planes.includes(plane)) return;
    this.planes = [...this.planes, plane];
    if (this.socket?.readyState === WebSocket.OPEN) this.sendWatch();
    void this.largeFeatures(this.manifest).catch((why: unknown) => this.emit("error", String(why)));
  }
  /** Hears nothing more. */
  leave(): void {
    this.closed = true;
    this.socket?.close();
  }
  private sendWatch(): void {
    this.send({ type: "watch", scene: this.sceneId, planes: this.planes });
  }
  private send(message: object): void {
    this.socket?.send(JSON.stringify(message));
  }

  private open(): void {
    this.emit("state", "connecting");
    const socket = (this.socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/socket`));
    let heard = false;
    this.have.clear(); // a server that was started anew counts its versions anew
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.send({ type: "hello", token: this.token });
      this.sendWatch();
    };
    socket.onmessage = (event: MessageEvent<string | ArrayBuffer>) => {
      if (!heard) [heard, this.tries] = [true, 0], this.emit("state", "open");
      try {
        if (typeof event.data === "string") this.text(JSON.parse(event.data));
        else this.binary(event.data);
      } catch (why) {
        this.emit("error", `a message of the server does not fit: ${reasonOf(why)}`);
      }
    };
    socket.onclose = (event) => {
      this.socket = null;
      if (this.closed) return;
      if (event.code === REFUSED) return this.emit("state", "refused");
      if (this.ended) return; // and its server with it
      this.emit("state", "lost");
      setTimeout(() => !this.socket && this.open(), RETRY_MS[Math.min(this.tries++, RETRY_MS.length - 1)]);
    };
  }

  private text(message: { type?: string; message?: string } & Record<string, unknown>): void {
    if (message.type === "manifest") this.takeManifest(readManifest(message));
    else if (message.type === "metrics") this.addMetrics(message as unknown as Metrics);
    else if (message.type === "error") this.emit("error", String(message.message).slice(0, 300));
    else if (message.type === "done") {
      this.ended = true;
      this.emit("state", "done");
    }
  }

  private takeManifest(manifest: Manifest): void {
    if (manifest.id !== this.sceneId) return;
    const before = this.manifest;
    const fresh = !this.scene || !before || before.count !== manifest.count || before.sh_degree !== manifest.sh_degree;
    if (fresh) this.scene = grown(this.scene, manifest);
    this.scene!.header = manifest.header;
    this.manifest = manifest;
    this.emit("manifest", { manifest, scene: this.scene!, fresh });
    if (this.planes.includes("features")) void this.largeFeatures(before);
  }

  private binary(data: ArrayBuffer): void {
    const m = readMessage(data), manifest = this.manifest, rows = manifest?.chunks[m.chunk]?.count;
    try {
      if (!manifest || rows === undefined) return;
      const first = m.chunk * manifest.chunk_size;
      writeChunk(this.scene!, m.plane, first, rows, m.data);
      this.have.set(`${m.plane} ${m.chunk}`, m.version);
      this.emit("chunk", { first, last: first + rows, plane: m.plane, more: this.shown === "all" && !this.complete });
      if (m.plane === "core" && this.shown !== "all") {
        const shown = manifest.chunks.every((_, k) => this.have.has(`core ${k}`)) ? "all" : "some";
        const before = this.shown;
        this.shown = shown;
        if (shown !== before) this.emit("rows", { first: before === "nothing" });
      }
    } finally {
      this.acknowledge(m.frame);
    }
  }

  /** Once what came with it is on the screen. */
  private acknowledge(frame: number): void {
    if (!this.acknowledging) requestAnimationFrame(() => {
      this.send({ type: "ack", frame: this.acknowledging });
      this.acknowledging = 0;
    });
    this.acknowledging = frame;
  }

  /** Chunks of features that are too large for the socket come by request. */
  private async largeFeatures(before: Manifest | null): Promise<void> {
    const { manifest: m, scene } = this, channels = m?.features?.channels ?? 0;
    for (const [k, chunk] of (m?.chunks ?? []).entries()) {
      if (12 + (8 + chunk.count) * channels <= QUEUED_MAX || (before !== m && before?.chunks[k]?.version === chunk.version && scene!.features)) continue;
      const bytes = new Uint8Array(await (await this.get(`/api/scene/${encodeURIComponent(m!.id)}/chunk/${k}/features`)).arrayBuffer());
      if (this.scene !== scene) return;
      writeChunk(scene!, "features", k * m!.chunk_size, chunk.count, bytes);
      this.have.set(`features ${k}`, chunk.version);
      this.emit("chunk", { first: k * m!.chunk_size, last: k * m!.chunk_size + chunk.count, plane: "features", more: false });
    }
  }

  private async pastMetrics(): Promise<void> {
    try {
      this.addMetrics((await (await this.get(`/api/scene/${encodeURIComponent(this.sceneId)}/metrics`)).json()) as Metrics);
    } catch {
      // A scene without a training run has none.
    }
  }
  private addMetrics(m: Metrics): void {
    const all = this.metrics, last = all.steps.at(-1) ?? -1, lastPsnr = all.psnr.at(-1)?.[0] ?? -1;
    if (!Array.isArray(m.steps) || !Array.isArray(m.loss) || !Array.isArray(m.count)) return;
    m.steps.forEach((step, i) => {
      if (!(step > last)) return;
      all.steps.push(step);
      all.loss.push(Number(m.loss[i]));
      all.count.push(Number(m.count[i]));
    });
    for (const p of Array.isArray(m.psnr) ? m.psnr : []) if (Array.isArray(p) && p[0] > lastPsnr) all.psnr.push([Number(p[0]), Number(p[1])]);
    this.emit("metrics", all);
  }
}

const has = (m: Manifest, plane: Plane): boolean => (plane === "sh" ? m.sh_degree > 0 : plane !== "features" || !!m.features);

/** A scene of the manifest's size that keeps the rows that were there. */
function grown(before: SplatScene | null, manifest: Manifest): SplatScene {
  const scene = blankScene(manifest.count, manifest.sh_degree, manifest.header);
  if (!before || before.shDegree !== scene.shDegree) return scene;
  for (const key of PARTS) scene[key].set(before[key].subarray(0, scene[key].length));
  return scene;
}

/** Once more where it fails: a run hands over more than it shows only when it is asked, in its next copy, which may have other rows and versions than the manifest that one asked by. */
async function twice<T>(work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch {
    await new Promise((done) => setTimeout(done, 500));
    return work();
  }
}
