// Shapes ahead of their use: fetched, decoded and handed to the GPU while the annotator looks at the pair before.

import { ApiError } from './api.js';

const KEPT = 24; // shapes at most
const BUDGET = 96e6; // bytes of memory here and on the GPU for each GB that the device has; what it does not tell counts as 4
const ATTEMPTS = 12; // at a shape whose fetch fails for a while: about two minutes

export class Shapes {
  wanted = []; // pairs, in order of their use
  open = null; // the pair that was asked for last

  // keep(data) -> what the viewer draws, with its size as `bytes`; drop(kept) frees it
  constructor(api, { keep, drop }, shelf, budget = BUDGET * (navigator.deviceMemory ?? 4)) {
    Object.assign(this, { api, keep, drop, shelf, budget });
    this.entries = new Map(); // asset -> {promise, shape}, least recently used first
  }

  // The pair's two shapes if they are ready to draw, else null.
  ready(pair) {
    const left = this.entries.get(pair.left)?.shape;
    const right = this.entries.get(pair.right)?.shape;
    return left && right ? { left, right } : null;
  }

  // The same, and from now on this pair is open: its shapes stay until another one is.
  take(pair) {
    this.open = pair;
    return this.ready(pair);
  }

  async load(pair) {
    const [left, right] = await Promise.all([this.fetch(pair.left), this.fetch(pair.right)]);
    return { left, right };
  }

  // Starts on pairs that come next, one after the other: the first in any case, more while there is room.
  prefetch(pairs) {
    this.wanted = pairs;
    this.running ??= this.run().finally(() => { this.running = null; });
  }

  async run() {
    const failed = new Set(); // shown as a failure when its turn comes
    for (;;) {
      this.trim();
      const next = this.wanted.find((pair) => !failed.has(pair.assignment) && !this.ready(pair));
      if (!next || (![this.first(), this.open].some((pair) => pair?.assignment === next.assignment) && !this.room())) return;
      await this.load(next).catch(() => failed.add(next.assignment));
    }
  }

  // The first pair after the open one.
  first() {
    return this.wanted.find((pair) => pair.assignment !== this.open?.assignment);
  }

  get bytes() {
    return this.kept().reduce((sum, [, { shape }]) => sum + shape.bytes, 0);
  }

  kept() {
    return [...this.entries].filter(([, { shape }]) => shape);
  }

  // True if another pair like the largest so far would fit.
  room() {
    const largest = Math.max(0, ...this.kept().map(([, { shape }]) => shape.bytes));
    return this.trim(2 * largest, 2);
  }

  // Forgets shapes, those first that nobody asked for longest and of those that are wanted the last, until there is room for so much more.
  // Returns whether there is; the open pair and the next stay.
  trim(more = 0, shapes = 0) {
    const use = [this.open, ...this.wanted].filter(Boolean).flatMap((pair) => [pair.left, pair.right]);
    const next = this.first();
    const fixed = new Set([this.open, next].filter(Boolean).flatMap((pair) => [pair.left, pair.right]));
    const fits = () => this.bytes + more <= this.budget && this.entries.size + shapes <= KEPT;
    const idle = this.kept().map(([asset]) => asset).filter((asset) => !use.includes(asset));
    const late = more ? [] : use.filter((asset) => !fixed.has(asset)).reverse(); // what is wanted gives way to nothing that comes later
    for (const asset of [...idle, ...late]) {
      if (fits()) break;
      this.forget(asset);
    }
    return fits();
  }

  forget(asset) {
    const { shape } = this.entries.get(asset) ?? {};
    if (!shape) return;
    this.entries.delete(asset);
    this.drop(shape);
  }

  clear() {
    for (const asset of [...this.entries.keys()]) this.forget(asset);
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
        const data = await this.shelf.bytes(this.api, `/api/shapes/${encodeURIComponent(asset)}`);
        await idle();
        return await this.keep(data);
      } catch (error) {
        if (!(error instanceof ApiError) || !error.temporary || attempt >= ATTEMPTS) throw error;
        await sleep(1000 * Math.min(error.retryAfter ?? 2 ** attempt / 4, 15));
      }
    }
  }
}

// Decoding takes some 10 ms: not while the annotator turns a shape or waits for an image.
function idle() {
  return new Promise((resolve) => {
    if (globalThis.requestIdleCallback) requestIdleCallback(resolve, { timeout: 400 });
    else setTimeout(resolve, 20);
  });
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
