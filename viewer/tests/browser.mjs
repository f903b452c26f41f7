// A browser that tests/browser.py drives: one JSON command a line on stdin, one JSON reply a line on stdout.
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

// Software WebGL2 on any machine; the page under test cannot reach anything but this machine.
const FLAGS = ["--no-sandbox", "--enable-unsafe-swiftshader", "--use-angle=swiftshader", "--disable-dev-shm-usage"];
const browser = await chromium.launch({ executablePath: process.argv[2], args: FLAGS });
const pages = new Map();
let next = 0;

const commands = {
  async open({ url, width = 640, height = 480, touch = false, scheme = "dark" }) {
    const context = await browser.newContext({ viewport: { width, height }, hasTouch: touch, isMobile: touch, colorScheme: scheme, acceptDownloads: true, reducedMotion: "reduce" });
    const page = await context.newPage(), id = ++next, errors = [], downloads = [];
    page.on("pageerror", (why) => errors.push(String(why)));
    page.on("console", (m) => m.type() === "error" && errors.push(m.text()));
    page.on("download", (d) => downloads.push(d));
    pages.set(id, { page, context, errors, downloads });
    await page.goto(url);
    return id;
  },
  async goto({ page, url }) {
    await pages.get(page).page.goto(url);
  },
  async run({ page, code, argument }) {
    const late = new Promise((_, failed) => setTimeout(failed, 30_000, new Error("the page took over 30 s")).unref());
    return Promise.race([pages.get(page).page.evaluate(`(async (argument) => { ${code} })(${JSON.stringify(argument ?? null)})`), late]);
  },
  async wait({ page, code, seconds = 60 }) {
    await pages.get(page).page.waitForFunction(new Function(`return (${code})`), null, { timeout: 1000 * seconds, polling: 50 });
  },
  async click({ page, selector }) {
    await pages.get(page).page.click(selector, { timeout: 30000 });
  },
  async fill({ page, selector, text }) {
    await pages.get(page).page.fill(selector, text, { timeout: 30000 });
  },
  async press({ page, key }) {
    await pages.get(page).page.keyboard.press(key);
  },
  async mouse({ page, steps }) {
    const { mouse } = pages.get(page).page;
    for (const [what, ...rest] of steps) await mouse[what](...rest);
  },
  async touch({ page, points }) {
    // Each entry is where the fingers are; the last lifts them.
    const session = await pages.get(page).context.newCDPSession(pages.get(page).page);
    for (let i = 0; i < points.length; i++) await session.send("Input.dispatchTouchEvent", { type: i ? "touchMove" : "touchStart", touchPoints: points[i].map(([x, y], id) => ({ x, y, id })) });
    await session.send("Input.dispatchTouchEvent", { type: "touchEnd", touchPoints: [] });
  },
  async drop({ page, selector, path }) {
    await pages.get(page).page.setInputFiles(selector, path);
  },
  async collect({ page }) {
    await pages.get(page).page.requestGC();
  },
  async reload({ page }) {
    await pages.get(page).page.reload();
  },
  async resize({ page, width, height }) {
    await pages.get(page).page.setViewportSize({ width, height });
  },
  async screenshot({ page, path }) {
    await pages.get(page).page.screenshot({ path });
  },
  async download({ page, path }) {
    const { downloads } = pages.get(page);
    for (let i = 0; i < 200 && !downloads.length; i++) await new Promise((done) => setTimeout(done, 50));
    const download = downloads.shift();
    await download.saveAs(path);
    return download.suggestedFilename();
  },
  async url({ page }) {
    return pages.get(page).page.url();
  },
  async errors({ page }) {
    return pages.get(page).errors.splice(0);
  },
  async close({ page }) {
    await pages.get(page).context.close();
    pages.delete(page);
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...rest } = JSON.parse(line);
  if (command === "quit") break;
  let reply;
  try {
    reply = { value: (await commands[command](rest)) ?? null };
  } catch (why) {
    reply = { error: String(why) };
  }
  process.stdout.write(JSON.stringify(reply) + "\n");
}
await browser.close();
