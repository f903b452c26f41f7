// What tests/test_viewer_order.py runs in node: prints the depth order of the means in a file. node order.mjs means.bin '[key, near, visible or null]'
import { readFileSync } from "node:fs";
import { DepthOrder } from "../src/order";

const bytes = readFileSync(process.argv[2]!), [key, near, visible] = JSON.parse(process.argv[3]!) as [number[], number, number[] | null], sorter = new DepthOrder();
sorter.setMeans(new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)));
sorter.setVisible(visible && Uint8Array.from(visible));
console.log(JSON.stringify(Array.from(sorter.order(key, near))));
