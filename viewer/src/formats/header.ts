/** The SceneHeader of a splatkit file (splatkit/io/header.py): one line of JSON that says how the scene must be drawn. */
import { DEFAULT_HEADER, type SceneHeader } from "../scene";

/** The header; unknown keys are ignored, missing ones take their defaults. Throws an Error that names the entry that is wrong. */
export function headerOfJson(line: string): SceneHeader {
  let known: unknown;
  try {
    known = JSON.parse(line);
  } catch {
    throw new Error("not JSON");
  }
  const { settings = {}, up = null, step = 0, source = "" } = object("the header", known);
  const header = { ...DEFAULT_HEADER };
  for (const [name, value] of Object.entries(object("settings", settings))) {
    if (name === "antialias" && typeof value === "boolean") header.antialias = value;
    else if (name in DEFAULT_HEADER && typeof DEFAULT_HEADER[name as keyof SceneHeader] === "number")
      (header as unknown as Record<string, number>)[name] = value === "inf" ? Infinity : number(name, value);
    else if (name === "antialias") throw new Error("antialias: expected true or false");
  }
  const h = header;
  if (!(h.near > 0 && h.blur_px2 >= 0 && h.alpha_min >= 0 && h.alpha_min < 1 && h.alpha_min < h.alpha_max && h.alpha_max <= 1 && h.transmittance_min >= 0
        && h.transmittance_min < 1 && h.fov_margin >= 0 && h.near < Infinity && h.blur_px2 < Infinity))
    throw new Error("settings: expected near > 0, blur_px2 >= 0, 0 <= alpha_min < alpha_max <= 1, 0 <= transmittance_min < 1, fov_margin >= 0");
  if (up !== null) {
    if (!Array.isArray(up) || up.length !== 3) throw new Error("up: expected three numbers");
    h.up = [number("up", up[0]), number("up", up[1]), number("up", up[2])];
  }
  if (!Number.isInteger(step) || (step as number) < 0) throw new Error("step: expected a whole number >= 0");
  h.step = (step as number) || null;
  h.name = typeof source === "string" ? source : "";
  return h;
}

function object(name: string, value: unknown): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Error(`${name}: expected an object`);
  return value as Record<string, unknown>;
}

function number(name: string, value: unknown): number {
  if (typeof value !== "number" || !Number.isFinite(value)) throw new Error(`${name}: expected a finite number`);
  return value;
}
