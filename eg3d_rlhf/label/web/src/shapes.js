// Shapes ahead of their use: fetched, decoded and handed to the GPU while the annotator looks at the pair before.

import { ApiError } from './api.js';
import { decodeMesh } from './mesh.js';
import { t } from './texts.js';

const KEPT = 24; // shapes; a shape of 30,000 triangles takes about 0.6 MB
const ATTEMPTS = 12; // at a shape whose fetch fails for a while: about two minutes

export class Shapes {
  // keep(mesh) -> what the viewer draws; drop(kept) frees it
  constructor(api, { keep, drop }) {
    this.api = api;
    this.keep = keep;
    this.drop = drop;
    this.entries = new Map(); // asset -> {promise, shape}, least recently used first
  }

  // The pair's two shapes if they are ready to draw, else null.
  ready(pair) {
    const left = this.entries.get(pair.left)?.shape;
    const right = this.entries.get(pair.right)?.shape;
    return left && right ? { left, right } : null;
  }

  async load(pair) {
    const [left, right] = await Promise.all([this.fetch(pair.left), this.fetch(pair.right)]);
    return { left, right };
  }

  // Starts on pairs that come next and forgets shapes that nobody asked for longest.
  prefetch(pairs) {
    for (const pair of pairs) this.load(pair).catch(() => {}); // shown as a failure when its turn comes
    for (const [asset, entry] of this.entries) {
      if (this.entries.size <= KEPT) break;
      if (!entry.shape) continue;
      this.entries.delete(asset);
      this.drop(entry.shape);
    }
  }

  fetch(asset) {
    const entry = this.entries.get(asset) ?? { promise: null, shape: null };
    this.entries.delete(asset);
    this.entries.set(asset, entry);
    entry.promise ??= this.draw(asset).then((shape) => {
      entry.shape = shape;
      return shape;
    }, (error) => {
      this.entries.delete(asset); // the next call tries again
      throw error;
    });
    return entry.promise;
  }

  async draw(asset) {
    for (let attempt = 1; ; attempt += 1) {
      try {
        const response = await this.api.request('GET', `/api/shapes/${encodeURIComponent(asset)}`);
        const data = await body(response);
        await idle();
        return this.keep(decodeMesh(data));
      } catch (error) {
        if (!(error instanceof ApiError) || !error.temporary || attempt >= ATTEMPTS) throw error;
        await sleep(1000 * Math.min(error.retryAfter ?? 2 ** attempt / 4, 15));
      }
    }
  }
}

// Decoding takes some 10 ms: not while the annotator turns a shape or waits for a picture.
function idle() {
  return new Promise((resolve) => {
    if (globalThis.requestIdleCallback) requestIdleCallback(resolve, { timeout: 400 });
    else setTimeout(resolve, 20);
  });
}

async function body(response) {
  try {
    return await response.arrayBuffer();
  } catch {
    throw new ApiError(0, t('error.broken'));
  }
}

function sleep(milliseconds) {
  return new Promise((resolve) => {
    const done = () => {
      removeEventListener('online', done);
      resolve();
    };
    addEventListener('online', done);
    setTimeout(done, milliseconds);
  });
}
