// One file, rlkit/view/page.html, that is the live page and the page of a report; nothing of it is loaded from elsewhere.
import { svelte } from "@sveltejs/vite-plugin-svelte";
import { renameSync } from "node:fs";
import { defineConfig, type Plugin } from "vite";
import { viteSingleFile } from "vite-plugin-singlefile";

const OUT = "../rlkit/view";

const named: Plugin = {
  name: "page.html",
  writeBundle: () => renameSync(`${OUT}/index.html`, `${OUT}/page.html`),
};

export default defineConfig({
  plugins: [svelte(), viteSingleFile(), named],
  build: { outDir: OUT, emptyOutDir: false, target: "es2022", license: false },
  // `npm run dev` shows the server of `python -m rlkit.view RUN --port 8321`.
  server: { proxy: { "/api": "http://127.0.0.1:8321" } },
});
