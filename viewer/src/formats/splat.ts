/** .splat of antimatter15: 32 bytes a Gaussian and nothing else. No header, so a size that is not a multiple of 32 is all that can be refused. */
import { LOGITS } from "../scene";
import { BadFile, emptyScene, finished, type Loaded, SH_C0 } from "./reading";

const RECORD = 32;

export function readSplat(file: string, bytes: Uint8Array): Loaded {
  if (bytes.length === 0) throw new BadFile(file, "byte 0", "the file is empty");
  if (bytes.length % RECORD) throw new BadFile(file, `byte ${bytes.length}`, `${bytes.length} bytes are not a whole number of ${RECORD}-byte records: the file was cut, or it is no .splat`);
  const n = bytes.length / RECORD, view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length), scene = emptyScene(file, n, 0);
  for (let row = 0; row < n; row++) {
    const at = RECORD * row;
    for (let i = 0; i < 3; i++) {
      scene.means[3 * row + i] = view.getFloat32(at + 4 * i, true);
      const scale = view.getFloat32(at + 12 + 4 * i, true); // linear
      scene.logScales[3 * row + i] = scale === 0 ? -30 : Math.log(scale);
      scene.sh[3 * row + i] = (bytes[at + 24 + i]! / 255 - 0.5) / SH_C0;
    }
    scene.logitOpacities[row] = LOGITS[bytes[at + 27]!]!;
    for (let i = 0; i < 4; i++) scene.quats[4 * row + i] = (bytes[at + 28 + i]! - 128) / 128;
  }
  return finished(file, scene);
}
