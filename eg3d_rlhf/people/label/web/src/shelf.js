// Everything a reload without a network needs, stored on this device for the annotator who was here last: session, pairs at hand, their shapes.
//
// Signing out, a session that has ended and another annotator's arrival empty it. Where a browser keeps nothing (no https, storage full or
// forbidden), it stays empty, and the page works as without.

const KEY = 'eg3d-offline';
const SHAPES = 'eg3d-shapes';
const MOST = 256e6; // bytes of shapes
let closed = false; // the page is being left for the login

export class Shelf {
  kept = readKept(); // {session, pairs, progress}
  sizes = new Map(); // path -> bytes, oldest first
  wanted = ''; // addresses of the shapes at hand

  // Registers the annotator of the page, online. Stored data of another annotator are removed.
  async begin(session) {
    if (this.kept.session?.annotator !== session.annotator) await forget();
    this.kept = { session: { ...session, csrf: '' } };
    this.write();
    navigator.serviceWorker?.register('/sw.js').catch(() => {}); // then the page needs a network
  }

  remember(pairs, progress) {
    this.kept = { ...this.kept, pairs, progress };
    this.write();
    const paths = pairs.flatMap((pair) => [pair.left, pair.right]).map(address);
    if (paths.join() === this.wanted) return;
    this.wanted = paths.join();
    this.dropOthers(paths).catch(() => {});
  }

  // The cache of shapes, null where nothing is stored.
  async shapes() {
    return closed ? null : globalThis.caches?.open(SHAPES).catch(() => null) ?? null;
  }

  write() {
    if (closed) return;
    try {
      localStorage.setItem(KEY, JSON.stringify(this.kept));
    } catch { /* full or forbidden: a reload needs a network */ }
  }

  // A shape's bytes from here, else from the server.
  async bytes(api, path) {
    const cache = await this.shapes();
    const found = await cache?.match(path).catch(() => null);
    if (found) {
      const data = await found.arrayBuffer();
      this.sizes.set(path, data.byteLength);
      return data;
    }
    const data = await api.bytes(path);
    if (cache && !closed && this.room(data.byteLength)) {
      this.sizes.set(path, data.byteLength);
      cache.put(path, new Response(data.slice(0))).catch(() => this.sizes.delete(path));
    }
    return data;
  }

  room(bytes) {
    return [...this.sizes.values()].reduce((sum, size) => sum + size, bytes) <= MOST;
  }

  async dropOthers(paths) {
    const cache = await this.shapes();
    for (const request of await (cache?.keys() ?? [])) {
      const { pathname } = new URL(request.url);
      if (paths.includes(pathname)) continue;
      this.sizes.delete(pathname);
      await cache.delete(request);
    }
  }
}

// leaving: nothing is kept any more by this page.
export async function forget(leaving = false) {
  closed ||= leaving;
  try {
    localStorage.removeItem(KEY);
    sessionStorage.removeItem('eg3d-pace');
    await globalThis.caches?.delete(SHAPES);
  } catch { /* forbidden: there is nothing */ }
}

function address(asset) {
  return `/api/shapes/${encodeURIComponent(asset)}`;
}

function readKept() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}
