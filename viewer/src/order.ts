/** The order in which Gaussians are blended: the key of sk::depth_key (cuda/include/sk/project.h), bit for bit, ties by index. */

const fround = Math.fround;
const BITS = 11, SIZE = 1 << BITS, PASSES = 3;
const FAR = 1e30; // as the rasterizer has it

/** Rows that are in front of the near plane and not hidden, nearest first. `key` is the third row of world_to_cam in float32. */
export class DepthOrder {
  private means: Float32Array = new Float32Array(0);
  private visible: Uint8Array | null = null;
  private keys = new Uint32Array(0);
  private rows = new Uint32Array(0);
  private keysB = new Uint32Array(0);
  private rowsB = new Uint32Array(0);

  setMeans(means: Float32Array): void {
    const n = means.length / 3;
    this.means = means;
    this.visible = null;
    this.keys = new Uint32Array(n);
    this.rows = new Uint32Array(n);
    this.keysB = new Uint32Array(n);
    this.rowsB = new Uint32Array(n);
  }

  setRows(first: number, means: Float32Array): void {
    this.means.set(means, 3 * first);
  }

  /** One byte a row; 0 hides it. */
  setVisible(visible: Uint8Array | null): void {
    this.visible = visible;
  }

  order(key: ArrayLike<number>, near: number): Uint32Array {
    const { means, visible, keys, rows } = this, n = means.length / 3;
    const k0 = fround(key[0]!), k1 = fround(key[1]!), k2 = fround(key[2]!), k3 = fround(key[3]!), nearKey = fround(near);
    const depth = new Float32Array(1), bits = new Uint32Array(depth.buffer);
    let count = 0;
    for (let i = 0, j = 0; i < n; i++, j += 3) {
      // Every product and sum is rounded by itself, in this order.
      const d = fround(fround(fround(fround(k0 * means[j]!) + fround(k1 * means[j + 1]!)) + fround(k2 * means[j + 2]!)) + k3);
      if (d >= nearKey && d < FAR && (visible === null || visible[i])) {
        depth[0] = d;
        keys[count] = bits[0]!;
        rows[count++] = i;
      }
    }
    return this.sorted(count).slice(0, count);
  }

  /** Radix sort, least significant digit first, so that equal keys keep the order of their rows. Bits of positive floats sort like the numbers. */
  private sorted(n: number): Uint32Array {
    let { keys, rows, keysB, rowsB } = this;
    const starts = new Uint32Array(PASSES * SIZE);
    for (let i = 0; i < n; i++) for (let p = 0; p < PASSES; p++) starts[p * SIZE + ((keys[i]! >>> (BITS * p)) & (SIZE - 1))]!++;
    for (let p = 0; p < PASSES; p++) {
      const at = starts.subarray(p * SIZE, (p + 1) * SIZE);
      let sum = 0;
      for (let d = 0; d < SIZE; d++) {
        const count = at[d]!;
        at[d] = sum;
        sum += count;
      }
      for (let i = 0; i < n; i++) {
        const to = at[(keys[i]! >>> (BITS * p)) & (SIZE - 1)]!++;
        keysB[to] = keys[i]!;
        rowsB[to] = rows[i]!;
      }
      [keys, keysB, rows, rowsB] = [keysB, keys, rowsB, rows];
    }
    return rows;
  }
}
