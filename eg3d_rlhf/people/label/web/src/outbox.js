// Answers on their way to the server, in order, kept in localStorage until the server has acknowledged them.
//
// One storage item per answer, so that two tabs never overwrite each other's; either may send it. Every answer carries a key of its own:
// the server takes it once, however often it is sent. Items belong to one annotator; another annotator who signs in on this device neither sends nor loses them.

import { ApiError } from './api.js';

const PREFIX = 'eg3d-outbox:';
const SLOWEST = 15_000; // milliseconds between two attempts without a connection

export class Outbox {
  // handlers: delivered(item, reply), rejected(item, error), changed(), unauthorised(), forbidden() -> whether to try once more
  constructor(api, annotator, handlers, storage = localStorage) {
    this.api = api;
    this.prefix = `${PREFIX}${encodeURIComponent(annotator)}:`;
    this.handlers = handlers;
    this.storage = storage;
    this.memory = new Map(); // where the device gives no room
    this.last = 0;
    this.stuck = false; // the last attempt found no connection
    this.delay = 500;
    this.sending = null;
    addEventListener('online', () => this.flush(true));
    addEventListener('storage', () => this.handlers.changed());
  }

  // Items in the order in which they were answered: [{id, path, body, training}].
  items() {
    const ids = [...this.memory.keys()];
    for (let i = 0; i < this.storage.length; i += 1) {
      if (this.storage.key(i).startsWith(this.prefix)) ids.push(this.storage.key(i));
    }
    return ids.sort().map((id) => ({ id, ...this.read(id) })).filter((item) => item.path);
  }

  get size() {
    return this.items().length;
  }

  // Keeps an answer; returns at once, before anything is sent.
  add(path, body, training = false) {
    this.last = Math.max(Date.now(), this.last + 1); // grows even where the clock stands still
    const id = `${this.prefix}${String(this.last).padStart(15, '0')}:${body.key}`;
    const text = JSON.stringify({ path, body, training });
    try {
      this.storage.setItem(id, text);
    } catch {
      this.memory.set(id, text);
    }
    this.handlers.changed();
    this.flush(true);
  }

  // Sends what waits, one after the other. now: without waiting for the next attempt.
  flush(now = false) {
    if (now && this.wake) this.wake();
    this.sending ??= this.work().finally(() => { this.sending = null; });
    return this.sending;
  }

  async work() {
    for (let item = this.items()[0]; item; item = this.items()[0]) {
      try {
        const reply = await this.send(item);
        this.settle(item);
        this.handlers.delivered(item, reply);
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        if (error.status === 401) return this.handlers.unauthorised();
        if (error.temporary) await this.pause(error);
        else {
          this.settle(item);
          this.handlers.rejected(item, error);
        }
      }
    }
    return undefined;
  }

  async send(item) {
    try {
      return await this.api.json('POST', item.path, item.body);
    } catch (error) {
      if (error.status === 403 && await this.handlers.forbidden()) return this.api.json('POST', item.path, item.body);
      throw error;
    }
  }

  settle(item) {
    this.memory.delete(item.id);
    this.storage.removeItem(item.id);
    this.stuck = false;
    this.delay = 500;
    this.handlers.changed();
  }

  async pause(error) {
    this.stuck = true;
    this.handlers.changed();
    const wait = error.retryAfter === null ? this.delay : error.retryAfter * 1000;
    this.delay = Math.min(this.delay * 2, SLOWEST);
    await new Promise((resolve) => {
      this.wake = resolve;
      setTimeout(resolve, Math.min(wait, SLOWEST));
    });
    this.wake = null;
  }

  read(id) {
    try {
      return JSON.parse(this.memory.get(id) ?? this.storage.getItem(id));
    } catch {
      return {};
    }
  }
}
