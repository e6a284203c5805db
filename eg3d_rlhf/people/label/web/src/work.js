// The annotator's work: which pair is open, which come next, what has been answered. Knows nothing of the page's looks.

import { duration } from './pace.js';
import { t } from './texts.js';

const AHEAD = 6; // open assignments to ask for
const MOST = 10; // that the server hands out at once
const LOW = 4; // fewer than so many ahead: ask again
const POLL = 2000; // milliseconds, while shapes are being prepared
const HISTORY = 20; // answers that can be taken back without asking the server which

export class Work {
  current = null;
  upcoming = [];
  changes = 0; // grows with every answer and undo: a list from the server that is older is only added to
  progress = { done: 0, total: 0, training_left: 0 };

  // on: {open(pair, started), idle(state, text, share), progress(), practiceLost(), failed(error)}
  // final(body): whether the answer stays, so that there is nothing to take back
  constructor(api, outbox, shapes, annotator, on, final = () => false) {
    Object.assign(this, { api, outbox, shapes, on, final });
    this.historyKey = `eg3d-history:${annotator}`;
    this.history = readList(sessionStorage, this.historyKey);
    this.answered = new Set(); // tokens answered here that the server may still call open
    for (const item of outbox.items()) this.note(item);
    addEventListener('online', () => this.refill());
  }

  note(item) {
    if (item.path.endsWith('/judgements')) this.answered.add(item.body.assignment);
    else this.answered.delete(item.body.assignment);
  }

  // Trials done, those on their way to the server included.
  get done() {
    const waiting = this.outbox.items().filter((item) => !item.training);
    return Math.max(0, waiting.reduce((sum, item) => sum + (item.path.endsWith('/undo') ? -1 : 1), this.progress.done));
  }

  // The pairs that are to be answered, the open one first.
  get atHand() {
    return [this.current, ...this.upcoming].filter((pair) => pair && !pair.review && !this.answered.has(pair.assignment));
  }

  // Takes up what was at hand when the page was here last.
  restore({ pairs = [], progress = this.progress }) {
    this.upcoming = pairs.filter((pair) => !this.answered.has(pair.assignment));
    this.progress = progress;
  }

  // Takes the answer to the open pair.
  answer(body) {
    const pair = this.current;
    this.changes += 1;
    this.answered.add(pair.assignment);
    if (!pair.training && !this.final(body)) this.remember([...this.history, pair].slice(-HISTORY));
    this.outbox.add('/api/judgements', { ...body, assignment: pair.assignment }, pair.training);
  }

  // Opens a pair that was answered before, to be looked at; the one at hand comes next.
  look(pair) {
    if (this.current && !this.current.review) this.upcoming = [this.current, ...this.upcoming];
    this.current = pair;
    this.on.open(pair, null);
  }

  // Replaces the answer to the pair that is looked at: takes it back and answers anew.
  change(body, key) {
    const { assignment } = this.current;
    this.changes += 1;
    this.answered.add(assignment);
    this.outbox.add('/api/undo', { key, assignment });
    this.outbox.add('/api/judgements', { ...body, assignment });
  }

  // Opens the next pair; started: when the annotator asked for it, performance.now().
  next(started = null) {
    this.current = this.upcoming.shift() ?? null;
    this.shapes.prefetch(this.current ? [this.current, ...this.upcoming] : this.upcoming);
    if (this.current) this.on.open(this.current, started);
    else this.on.idle('loading', t('moment'));
    if (this.upcoming.length < LOW) this.refill();
  }

  // Takes back the last answer. Returns false where only the server knows which one that is, and it cannot be asked.
  undo(key, started) {
    const pair = this.history.at(-1);
    if (!pair && (!navigator.onLine || this.outbox.stuck)) return false;
    this.changes += 1;
    if (!pair) {
      this.outbox.add('/api/undo', { key });
      return true;
    }
    this.remember(this.history.slice(0, -1));
    this.answered.delete(pair.assignment);
    this.outbox.add('/api/undo', { key, assignment: pair.assignment });
    this.reopen(pair, started);
    return true;
  }

  reopen(pair, started = null) {
    this.upcoming = [pair, this.current, ...this.upcoming].filter((other, place) => other && !other.review && (place === 0 || other.assignment !== pair.assignment));
    this.next(started);
  }

  // The server has taken back an answer that it had to look up itself.
  async reopenToken(token) {
    this.answered.delete(token);
    await this.refill();
    const pair = this.upcoming.find((other) => other.assignment === token);
    if (pair) this.reopen(pair);
  }

  // The server rejects the answer or the pair: continue with the next. reopens: it may be offered again, should the other answer be taken back.
  forget(token, reopens = false) {
    this.changes += 1;
    if (reopens) this.answered.delete(token);
    this.remember(this.history.filter((pair) => pair.assignment !== token));
    this.upcoming = this.upcoming.filter((pair) => pair.assignment !== token);
    if (this.current?.assignment === token) this.next();
    else this.refill();
  }

  refill() {
    this.filling ??= this.fill().finally(() => { this.filling = null; });
    return this.filling;
  }

  async fill() {
    clearTimeout(this.timer);
    const before = this.outbox.size ? null : this.changes; // what is on its way may arrive before or after the list is made
    let reply;
    try {
      reply = await this.api.assignments(Math.min(AHEAD + this.outbox.size, MOST));
    } catch (error) {
      if (!error.temporary) {
        this.on.failed(error);
        return;
      }
      this.later(3000);
      if (!this.current) this.on.idle('offline', t('offline'));
      return;
    }
    const exact = before === this.changes && !this.outbox.size; // else it may be older than an answer
    this.merge(reply.assignments.filter((pair) => !this.answered.has(pair.assignment)), exact);
    if (exact) this.progress = reply.progress;
    if (reply.practice_lost && !reply.progress.done) this.on.practiceLost();
    this.on.progress();
    this.shapes.prefetch(this.upcoming);
    if (this.current) return;
    if (this.upcoming.length) this.next();
    else this.rest(reply);
  }

  // exact: the list is the whole truth, so what it lacks is no longer ours.
  merge(listed, exact) {
    const tokens = new Set(listed.map((pair) => pair.assignment));
    const kept = exact ? this.upcoming.filter((pair) => tokens.has(pair.assignment)) : this.upcoming;
    const known = new Set([this.current, ...kept].map((pair) => pair?.assignment));
    this.upcoming = [...kept, ...listed.filter((pair) => !known.has(pair.assignment))];
  }

  // Nothing to show: why, and when to look again.
  rest(reply) {
    if (this.outbox.size) this.on.idle('sending', t('sending')); // their delivery asks again
    else if (reply.waiting) {
      const { done, total, failed, seconds_left: left } = reply.preparation;
      const time = (left ?? null) !== null && duration(left);
      const ready = t(time ? 'ready.left' : 'ready', { done, total, time });
      this.on.idle('waiting', this.practiceFirst(reply, failed ? t('ready.failed', { text: ready, failed }) : ready), total ? done / total : 0);
      this.later(POLL);
    } else if (reply.assignments.length) { // all of them answered while the list was on its way: a newer one knows what is left
      this.on.idle('loading', t('moment'));
      this.later(POLL);
    } else if (reply.preparation.failed && !reply.preparation.done) { // nothing was ever shown, so nothing is finished
      this.on.idle('refused', t('ready.none'));
    } else {
      this.on.idle('finished', '');
      this.later(30 * POLL); // another annotator may leave a pair
    }
  }

  practiceFirst(reply, text) {
    return reply.progress.training_left ? t('practice.waiting', { text }) : text;
  }

  later(milliseconds) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.refill(), milliseconds);
  }

  remember(history) {
    this.history = history;
    try {
      sessionStorage.setItem(this.historyKey, JSON.stringify(history));
    } catch { /* a full or forbidden storage costs undo after a reload without a connection, nothing more */ }
  }
}

function readList(storage, key) {
  try {
    return JSON.parse(storage.getItem(key)) ?? [];
  } catch {
    return [];
  }
}
