// The service worker: keeps the label page's own files, so that it opens without a network. It is asked only where the network fails.
//
// The server puts `self.PAGE = {version, files: {name: ETag}}` before this text, so each version of the page has a worker of its own, which
// takes all of that version's files or none. The kept page asks for its files by version: files of two versions never meet.

const { version, files } = self.PAGE;
const NAME = `eg3d-page-${version}`;
const PATIENCE = 8000; // milliseconds for the network
const AWAY = [502, 503, 504]; // a proxy's status when the server is unreachable

self.addEventListener('install', (event) => event.waitUntil(keep().then(() => self.skipWaiting())));
self.addEventListener('activate', (event) => event.waitUntil(dropOthers().then(() => self.clients.claim())));
self.addEventListener('fetch', (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== 'GET' || url.origin !== self.location.origin) return;
  if (request.mode === 'navigate' && url.pathname === '/') event.respondWith(page(request));
  else if (url.pathname.startsWith('/static/')) event.respondWith(file(request, url));
});

async function keep() {
  const found = await Promise.all(Object.entries(files).map(async ([name, etag]) => {
    const path = name === 'index.html' ? '/' : `/static/${name}`;
    const response = await fetch(path, { cache: 'no-cache' });
    const same = response.headers.get('ETag')?.replace(/^W\//, '') === etag;
    if (!response.ok || response.redirected || !same) throw new Error(`${path}: not of version ${version}`);
    return [path, path === '/' ? await dated(response) : response];
  }));
  const cache = await caches.open(NAME);
  await Promise.all(found.map(([path, response]) => cache.put(path, response)));
}

// The page with its files asked for by version.
async function dated(response) {
  const text = (await response.text()).replace(/"\/static\/([^"?]+)"/g, `"/static/$1?version=${version}"`);
  const headers = new Headers(response.headers);
  for (const name of ['Content-Encoding', 'Content-Length']) headers.delete(name);
  return new Response(text, { headers });
}

async function dropOthers() {
  const names = await caches.keys();
  await Promise.all(names.filter((name) => name.startsWith('eg3d-page-') && name !== NAME).map((name) => caches.delete(name)));
}

async function kept(path) {
  return (await caches.open(NAME)).match(path);
}

async function page(request) {
  const waiting = new Promise((_, reject) => { setTimeout(() => reject(new Error('no answer')), PATIENCE); });
  try {
    const response = await Promise.race([fetch(request), waiting]);
    return (AWAY.includes(response.status) && await kept('/')) || response;
  } catch {
    return (await kept('/')) ?? Response.error();
  }
}

async function file(request, url) {
  const asked = url.searchParams.get('version');
  if (asked) return (asked === version && await kept(url.pathname)) || Response.error();
  try {
    return await fetch(request);
  } catch {
    return (await kept(url.pathname)) ?? Response.error();
  }
}
