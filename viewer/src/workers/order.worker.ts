/** Sorts off the page's thread. */
import { DepthOrder } from "../order";

export type OrderRequest =
  | { type: "means"; means: Float32Array }
  | { type: "rows"; first: number; means: Float32Array }
  | { type: "visible"; visible: Uint8Array | null }
  | { type: "order"; id: number; key: Float32Array; near: number };
export interface OrderReply {
  id: number;
  order: Uint32Array;
}

const sorter = new DepthOrder();
self.onmessage = (event: MessageEvent<OrderRequest>) => {
  const m = event.data;
  if (m.type === "means") sorter.setMeans(m.means);
  else if (m.type === "rows") sorter.setRows(m.first, m.means);
  else if (m.type === "visible") sorter.setVisible(m.visible);
  else {
    const order = sorter.order(m.key, m.near);
    self.postMessage({ id: m.id, order } satisfies OrderReply, { transfer: [order.buffer] });
  }
};
