/** Elements. Text is always set as text: names from files and servers never become markup. */

type Props = Partial<Omit<HTMLElement, "style" | "dataset">> & { [key: string]: unknown };
export type Child = Node | string | null | false;

export function h<K extends keyof HTMLElementTagNameMap>(tag: K, props: Props = {}, ...children: Child[]): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("aria-") || key === "role" || key === "for") element.setAttribute(key, String(value));
    else (element as unknown as Record<string, unknown>)[key] = value;
  }
  element.append(...children.filter((c): c is Node | string => c !== null && c !== false));
  return element;
}

export function button(text: string, onclick: () => void, props: Props = {}): HTMLButtonElement {
  return h("button", { type: "button", onclick, ...props }, text);
}
export function section(title: string, ...children: Child[]): HTMLElement {
  return h("section", { "aria-label": title }, h("h2", {}, title), ...children);
}
export function row(...children: Child[]): HTMLElement {
  return h("div", { className: "row" }, ...children);
}
export function check(text: string, checked: boolean, onchange: (checked: boolean) => void, props: Props = {}): HTMLLabelElement {
  const input: HTMLInputElement = h("input", { type: "checkbox", checked, onchange: () => onchange(input.checked), ...props });
  return h("label", {}, input, text);
}
export function select(label: string, options: [string, string][], value: string, onchange: (value: string) => void, props: Props = {}): HTMLSelectElement {
  const element: HTMLSelectElement = h("select", { "aria-label": label, onchange: () => onchange(element.value), ...props }, ...options.map(([v, text]) => h("option", { value: v }, text)));
  element.value = value;
  return element;
}
export function press(element: HTMLElement, pressed: boolean): void {
  element.setAttribute("aria-pressed", String(pressed));
}

/** Saves a file from the page. */
export function download(name: string, blob: Blob): void {
  const url = URL.createObjectURL(blob), link = h("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** The bytes of a picture in a format; what a browser cannot write comes as PNG. */
export async function encoded(image: ImageData, type: "image/png" | "image/webp", quality = 0.92): Promise<Blob> {
  const canvas = h("canvas", { width: image.width, height: image.height });
  canvas.getContext("2d")!.putImageData(image, 0, 0);
  return new Promise((done, failed) => canvas.toBlob((blob) => (blob ? done(blob) : failed(new Error("the browser has no memory left for the picture"))), type, quality));
}
/** A file's name from what a scene calls itself. */
export const fileName = (name: string): string => name.replace(/[^\w.-]+/g, "_").slice(0, 60) || "scene";

/** Short and readable: 4 digits at most, thousands in groups. */
export function show(x: number): string {
  if (!Number.isFinite(x)) return "–";
  if (Number.isInteger(x)) return x.toLocaleString("en");
  return Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(4)));
}
