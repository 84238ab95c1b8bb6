import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";
import { mockServer } from "./mock/plugin";
import { stamp } from "./stamp";

const SERVER = process.env.SPPNET_SERVER;

export default defineConfig({
  base: "./",
  plugins: [svelte(), stamp(), ...(SERVER ? [] : [mockServer()])],
  server: SERVER ? { proxy: { "/api": SERVER } } : {},
  // Nothing inline: the page's content security policy forbids it.
  build: {
    outDir: "../src/sppnet/serve/static",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
  },
  test: { include: ["src/**/*.test.ts"] },
});
