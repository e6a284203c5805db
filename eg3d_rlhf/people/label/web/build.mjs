// Bundles the two pages' scripts, and the label page's worker, into ../static. With --check it writes nothing and compares instead: exit status 1 where they differ.
//
// The same sources and lock file give the same bytes. The first line of a bundle names the sources it was made from, so that a stale bundle
// shows even where there is no node: sha256 over `name NUL text NUL` of src/*, package-lock.json and this file, names sorted.

import { createHash } from 'node:crypto';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { build } from 'esbuild';

const HERE = dirname(fileURLToPath(import.meta.url));
const STATIC = join(HERE, '..', 'static');

function sourcesHash() {
  const names = ['build.mjs', 'package-lock.json', ...readdirSync(join(HERE, 'src')).map((name) => `src/${name}`)];
  const hash = createHash('sha256');
  for (const name of names.sort()) hash.update(`${name}\0${readFileSync(join(HERE, name), 'utf8')}\0`);
  return hash.digest('hex');
}

async function bundles() {
  const { outputFiles } = await build({
    entryPoints: ['src/app.js', 'src/admin.js', 'src/gaussian_worker.js', 'src/sw.js'].map((name) => join(HERE, name)),
    absWorkingDir: HERE,
    bundle: true,
    minify: true,
    format: 'esm',
    target: ['es2022', 'chrome105', 'firefox110', 'safari16'],
    charset: 'utf8',
    legalComments: 'inline', // keeps three.js' MIT banner
    banner: { js: `/* sources ${sourcesHash()}; see eg3d_rlhf/people/label/web/README.md */` },
    outdir: STATIC,
    write: false,
  });
  const licence = readFileSync(join(HERE, 'node_modules', 'three', 'LICENSE'));
  return [...outputFiles.map(({ path, contents }) => ({ path, contents: Buffer.from(contents) })), { path: join(STATIC, 'THREE-LICENSE'), contents: licence }];
}

function same(path, contents) {
  try {
    return readFileSync(path).equals(contents);
  } catch {
    return false;
  }
}

const check = process.argv.includes('--check');
const stale = (await bundles()).filter(({ path, contents }) => !same(path, contents));
for (const { path, contents } of stale) {
  if (check) console.error(`${path}: differs from what the sources give. Run: npm ci && npm run build`);
  else {
    writeFileSync(path, contents);
    console.log(`${path}: ${contents.length} bytes`);
  }
}
if (check && stale.length) process.exitCode = 1;
else if (!stale.length) console.log('static files are up to date');
