// The server's answers as objects, its error answers as errors with a status; status 0 is no connection.

import { forget } from './shelf.js';
import { t } from './texts.js';

export class ApiError extends Error {
  constructor(status, message, remedy = '', retryAfter = null) {
    super(message);
    this.status = status;
    this.remedy = remedy;
    this.retryAfter = retryAfter; // seconds, where the server named them
  }

  get temporary() {
    return this.status === 0 || this.status === 408 || this.status === 425 || this.status === 429 || this.status >= 500;
  }
}

const TIMEOUT = 20_000; // milliseconds: a phone between two masts hangs rather than fails

export class Api {
  csrf = '';
  check = null; // a step that is due before pairs are requested

  async session() {
    const session = await this.json('GET', '/api/session');
    this.csrf = session.csrf;
    return session;
  }

  async assignments(count) {
    await this.check?.();
    return this.json('GET', `/api/assignments?count=${count}`);
  }

  // Calls an address and returns the JSON body; throws ApiError.
  async json(method, path, body = undefined) {
    const response = await this.request(method, path, body);
    try {
      return await response.json();
    } catch {
      throw new ApiError(0, t('error.broken'));
    }
  }

  // Calls an address and returns its bytes, however long they take as long as some arrive; throws ApiError.
  async bytes(path) {
    const patience = new Patience(TIMEOUT);
    try {
      const response = await this.request('GET', path, undefined, patience);
      const counted = response.body.pipeThrough(new TransformStream({
        transform(chunk, stream) {
          patience.renew();
          stream.enqueue(chunk);
        },
      }));
      return await new Response(counted).arrayBuffer();
    } catch (error) {
      throw error instanceof ApiError ? error : new ApiError(0, t('error.broken'));
    } finally {
      patience.end();
    }
  }

  async request(method, path, body = undefined, patience = new Patience(TIMEOUT)) {
    const headers = { Accept: 'application/json' };
    if (method !== 'GET') headers['X-CSRF-Token'] = this.csrf;
    if (body !== undefined) headers['Content-Type'] = 'application/json';
    const options = { method, headers, credentials: 'same-origin', signal: patience.signal };
    if (body !== undefined) options.body = JSON.stringify(body);
    let response;
    try {
      response = await fetch(path, options);
    } catch {
      throw new ApiError(0, t('error.connection'));
    }
    if (!response.ok) throw await readError(response);
    return response;
  }
}

export async function signIn() {
  await forget(true); // another annotator may be next
  location.assign('/login');
}

async function readError(response) {
  let reply = {};
  try {
    reply = await response.json();
  } catch { /* not JSON: the status says enough */ }
  const seconds = Number.parseFloat(response.headers.get('Retry-After'));
  return new ApiError(response.status, reply.error || t('error.status', { status: String(response.status) }), reply.remedy || '',
    Number.isFinite(seconds) ? seconds : null);
}

// A signal that ends a request which has been silent for so many milliseconds.
class Patience {
  controller = new AbortController();

  constructor(milliseconds) {
    this.milliseconds = milliseconds;
    this.renew();
  }

  get signal() {
    return this.controller.signal;
  }

  renew() {
    this.end();
    this.timer = setTimeout(() => this.controller.abort(), this.milliseconds);
  }

  end() {
    clearTimeout(this.timer);
  }
}
