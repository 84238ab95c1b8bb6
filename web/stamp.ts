import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join, relative, sep } from "node:path";
import type { Plugin } from "vite";

const HERE = import.meta.dirname;
const BUILT = join(HERE, "../src/sppnet/serve/static");
const SETTINGS = ["index.html", "package-lock.json", "package.json", "stamp.ts", "svelte.config.js", "tsconfig.json", "vite.config.ts"];

/** Writes static/source.txt: the hashes of what was built and of what it was built from, for the test of staleness. */
export function stamp(): Plugin {
  return {
    name: "stamp",
    apply: "build",
    closeBundle() {
      const sources = [...filesOf(join(HERE, "src")).filter((file) => !file.endsWith(".test.ts")), ...SETTINGS.map((name) => join(HERE, name))];
      const built = filesOf(BUILT).filter((file) => !file.endsWith("source.txt"));
      writeFileSync(join(BUILT, "source.txt"), `source ${hashOf(HERE, sources)}\nbuilt ${hashOf(BUILT, built)}\n`);
    },
  };
}

function filesOf(folder: string): string[] {
  return readdirSync(folder, { withFileTypes: true, recursive: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name));
}

function hashOf(root: string, files: string[]): string {
  const hash = createHash("sha256");
  const names = files.map((file) => relative(root, file).split(sep).join("/")).sort();
  for (const name of names) {
    const content = readFileSync(join(root, name));
    hash.update(`${name}\0${content.length}\0`).update(content);
  }
  return hash.digest("hex");
}
