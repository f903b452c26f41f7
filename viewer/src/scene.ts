/** A scene as the page holds it, and how it must be drawn. */

/** The values of SceneHeader and RasterSettings (splatkit/capture.py, splatkit/raster/types.py) that a picture depends on, by their names there. */
export interface SceneHeader {
  near: number;
  blur_px2: number;
  antialias: boolean;
  alpha_min: number;
  alpha_max: number;
  transmittance_min: number;
  fov_margin: number;
  up: [number, number, number];
  step: number | null;
  name: string;
}

/** N Gaussians. Every finite value is valid; spaces and units are those of splatkit.Scene. */
export interface SplatScene {
  count: number;
  shDegree: 0 | 1 | 2 | 3;
  means: Float32Array; // 3N
  quats: Float32Array; // 4N, w x y z, any length; zero is the identity
  logScales: Float32Array; // 3N
  logitOpacities: Float32Array; // N
  sh: Float32Array; // N x K x 3, K = (degree + 1)^2
  features?: { channels: number; int8: Int8Array; scale: Float32Array; offset: Float32Array };
  header: SceneHeader;
}

/** What a file means that says nothing about how to draw it. */
export const DEFAULT_HEADER: SceneHeader = {
  near: 0.01, blur_px2: 0.3, antialias: false, alpha_min: 1 / 255, alpha_max: 0.99, transmittance_min: 1e-4, fov_margin: 0.3, up: [0, -1, 0], step: null, name: "",
};
