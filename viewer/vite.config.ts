/** Builds one self-contained page: scripts, workers, styles and WebAssembly inside splatkit/viewer/index.html. */
import { defineConfig, type Plugin } from "vite";

/** Puts every built script and style into the page; the scripts run from there under a policy that names their hashes. */
function oneFile(): Plugin {
  return {
    name: "one-file",
    enforce: "post",
    generateBundle(_, bundle) {
      const page = bundle["index.html"];
      if (page?.type !== "asset") throw new Error("the build made no index.html");
      let html = String(page.source);
      for (const [name, file] of Object.entries(bundle)) {
        if (file === page) continue;
        const tag = file.type === "chunk" ? new RegExp(`<script[^>]*src="[^"]*${name}"[^>]*></script>`) : new RegExp(`<link[^>]*href="[^"]*${name}"[^>]*>`);
        if (!tag.test(html)) throw new Error(`${name} is not part of the page`);
        const body = file.type === "chunk" ? file.code.trim().replaceAll("</script", "<\\/script").replaceAll("<!--", "\\x3C!--") : String(file.source).trim();
        const inlined = file.type === "chunk" ? "" : `<style>${body}</style>`;
        html = html.replace(tag, () => inlined);
        if (file.type === "chunk") html = html.replace("</body>", () => `<script type="module">${body}</script>\n</body>`);
        delete bundle[name];
      }
      page.source = html;
    },
  };
}

export default defineConfig({
  build: { target: "es2022", outDir: "../splatkit/viewer", emptyOutDir: true, assetsInlineLimit: 1 << 24, modulePreload: false, cssCodeSplit: false, reportCompressedSize: false },
  // From a file no module worker starts.
  worker: { format: "iife" },
  plugins: [oneFile()],
});
