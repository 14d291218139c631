// Checks the types of a TypeScript file and runs it.
//
//     NODE_PATH=FOLDER/node_modules node typescript.js FILE [ARGUMENT...]

const { spawnSync } = require("node:child_process");
const fs = require("node:fs");
const os = require("node:os");
const path = require("node:path");
const ts = require("typescript");

const [file, ...rest] = process.argv.slice(2);
const modules = path.dirname(path.dirname(require.resolve("typescript/package.json")));
const options = {
  strict: true,
  target: ts.ScriptTarget.ES2022,
  module: ts.ModuleKind.CommonJS,
  lib: ["lib.es2022.d.ts", "lib.dom.d.ts"],
  types: ["node"],
  typeRoots: [path.join(modules, "@types")],
  noUnusedLocals: true,
};
const folder = fs.mkdtempSync(path.join(os.tmpdir(), "eremois-typescript-"));
try {
  const program = ts.createProgram([path.resolve(file)], { ...options, outDir: folder });
  const faults = [...ts.getPreEmitDiagnostics(program), ...program.emit().diagnostics];
  if (faults.length > 0) {
    const host = { getCanonicalFileName: (name) => name, getCurrentDirectory: process.cwd, getNewLine: () => "\n" };
    console.error(ts.formatDiagnostics(faults, host));
    process.exitCode = 1;
  } else {
    const script = path.join(folder, path.basename(file).replace(/\.ts$/, ".js"));
    process.exitCode = spawnSync(process.execPath, [script, ...rest], { stdio: "inherit" }).status ?? 1;
  }
} finally {
  fs.rmSync(folder, { recursive: true, force: true });
}
