// The label page: two shapes, one question. Puts the parts together.

import { Api, signIn } from './api.js';
import { Comment } from './comment.js';
import { helpDialog, skipDialog } from './dialogs.js';
import { watchGestures } from './gestures.js';
import { watchKeys } from './keys.js';
import { Looking } from './looking.js';
import { watchMenus } from './menus.js';
import { Outbox } from './outbox.js';
import { OwnAnswers } from './own_answers.js';
import { Pace } from './pace.js';
import { Presses } from './presses.js';
import { Prompt } from './prompt.js';
import { Questions } from './questions.js';
import { Shapes } from './shapes.js';
import { Shelf } from './shelf.js';
import { Stopwatch } from './stopwatch.js';
import { fillTexts, t, watchLanguage, when } from './texts.js';
import { watchTheme } from './theme.js';
import { Ui } from './ui.js';
import { Viewer } from './viewer.js';
import { Work } from './work.js';

// commands about the work; the others are about the view
const ANSWERS = ['choose', 'skip', 'undo', 'openHelp', 'comment', 'ownAnswers', 'questionBack', 'backToWork'];
const NAMES_SHOWN = 5000; // milliseconds, after which the page goes on by itself
const PATIENCE = 1500; // milliseconds that an answer may take before the page says that it waits

class LabelPage {
  ui = new Ui();
  api = new Api();
  pace = new Pace();
  watch = new Stopwatch();
  presses = new Presses();
  shelf = new Shelf();
  said = null; // the answer given last, for the screen reader

  async start() {
    fillTexts();
    watchLanguage(this.ui.language);
    watchMenus();
    watchTheme(this.ui.theme, () => this.viewer?.request());
    this.session = await this.signedIn();
    this.viewer = this.makeViewer();
    if (!this.viewer) return;
    this.looking = new Looking(this.ui, this.viewer, this.session.show_render);
    this.prompt = new Prompt(this.ui);
    this.shapes = new Shapes(this.api, { keep: (data) => this.viewer.keep(data), drop: (shape) => this.viewer.drop(shape) }, this.shelf);
    this.outbox = new Outbox(this.api, this.session.annotator, {
      delivered: (item, reply) => this.delivered(item, reply),
      rejected: (item, error) => this.rejected(item, error),
      changed: () => this.queueChanged(),
      unauthorised: signIn,
      forbidden: () => this.renewSession(),
    });
    this.work = new Work(this.api, this.outbox, this.shapes, this.session.annotator, {
      open: (pair, started) => this.open(pair, started),
      idle: (state, text, share) => this.idle(state, text, share),
      progress: () => this.showProgress(),
      practiceLost: () => { this.practiceNoted ??= this.ui.say(t('practice.lost'), true) ?? true; },
      failed: (error) => this.failed(error),
    }, (body) => this.session.reveal && body.choice !== 'skip');
    if (this.unchecked) this.work.restore(this.shelf.kept);
    this.dress();
    this.listen();
    this.publish();
    this.queueChanged();
    this.outbox.flush();
    if (this.work.upcoming.length) this.work.next();
    else await this.work.refill();
    this.help.welcome();
  }

  // The session; without a network that of the annotator who was here last, until it can be asked for, else the page waits.
  async signedIn() {
    for (let wait = 1000; ; wait = Math.min(2 * wait, 15_000)) {
      try {
        const session = await this.api.session();
        await this.shelf.begin(session);
        return session;
      } catch (error) {
        if (error.status === 401) signIn();
        else if (error.temporary && this.shelf.kept.session) return this.unasked(this.shelf.kept.session);
        else this.ui.show('offline', `${error.message} ${t('tryingAgain')}`);
        await new Promise((resolve) => { setTimeout(resolve, wait); });
      }
    }
  }

  // The session as it was: before pairs are asked for, the server must say whose it is now.
  unasked(session) {
    this.unchecked = true;
    this.api.check = async () => {
      if (!await this.renewSession()) await new Promise(() => {}); // the page is loaded anew
      this.api.check = null;
    };
    return session;
  }

  async renewSession() {
    const session = await this.api.session();
    await this.shelf.begin(session);
    if (session.annotator === this.session.annotator) return true;
    location.reload(); // another annotator has signed in here; answers that wait stay with their own annotator
    return false;
  }

  makeViewer() {
    try {
      return new Viewer(this.ui.canvas, { left: this.ui.left, right: this.ui.right }, this.session.up, this.session.view, {
        lost: () => this.drawAnew(),
        playing: (whether) => this.looking.playing(whether),
      });
    } catch {
      this.ui.show('refused', t('noWebGL'));
      return null;
    }
  }

  dress() {
    const { title, annotator, exposed, scale, show_render: showRender, skip_reasons: reasons } = this.session;
    this.ui.arrange(scale);
    const asked = this.session.questions.length > 0;
    document.title = title || t(this.ui.single ? 'title.single' : asked ? 'title.asked' : 'title.pairs');
    if (asked) {
      // several questions about each pair, such as geometry and texture, and not about the shape alone
      const help = document.querySelector('[data-text="help.pairs"]');
      help.dataset.text = 'help.asked';
      help.textContent = t('help.asked');
    }
    this.ui.title.textContent = document.title;
    this.ui.who.textContent = exposed ? annotator : '';
    this.ui.signOut.hidden = !exposed;
    this.ui.render.hidden = !showRender;
    this.ui.renderHelp.hidden = !showRender;
    this.ui.root.dataset.bad = String(this.session.both_bad);
    this.ui.bad.hidden = !this.session.both_bad;
    this.ui.badHelp.hidden = !this.session.both_bad;
    this.ui.questionHelp.hidden = !this.session.questions.length;
    this.questions = new Questions(this.ui, this.session.questions);
    this.remark = new Comment(this.ui.commentDialog, this.ui.commentText, this.ui.comment);
    this.own = new OwnAnswers(this.api, this.ui, (answer) => this.work.look({ ...answer, training: false, review: answer }));
    this.ui.admin.hidden = this.session.role !== 'admin';
    this.help = helpDialog(this.ui.helpDialog, `eg3d-welcome:${annotator}`);
    this.skipping = skipDialog(this.ui.skipDialog, this.ui.reasons, this.ui.single ? reasons.filter((one) => one !== 'identical') : reasons, (reason) => this.choose('skip', reason));
  }

  listen() {
    const command = (name, ...rest) => (ANSWERS.includes(name) ? this[name](...rest) : this.looking[name](...rest));
    this.ui.choices.addEventListener('mousedown', (event) => { // a mouse gives no button the focus: Space and Enter are not for it
      event.preventDefault();
      document.activeElement?.blur();
    });
    watchKeys(command, this.session.scale);
    for (const pane of [this.ui.left, this.ui.right]) watchGestures(pane, this.viewer.orbit, (view) => this.looking.moved(view));
    for (const button of document.querySelectorAll('[data-choice]')) {
      button.addEventListener('click', () => this.choose(button.dataset.choice));
    }
    for (const button of document.querySelectorAll('[data-view]')) button.addEventListener('click', () => command('view', button.dataset.view));
    for (const name of ['skip', 'undo', 'openHelp', 'comment', 'ownAnswers', 'backToWork', 'reset', 'normals', 'wireframe', 'clay', 'play', 'render']) {
      this.ui[name].addEventListener('click', () => command(name));
    }
    this.ui.onward.addEventListener('click', () => this.goOn());
    this.ui.signOut.addEventListener('click', () => this.leave());
  }

  // ---- answers

  choose(choice, reason = null) {
    const skippable = choice === 'skip' && this.ui.state === 'failed';
    if (!this.work.current || !(skippable || this.ui.state === 'label') || !this.presses.take()) return;
    if (choice === 'bad' && !this.session.both_bad) return;
    if (choice !== 'skip' && this.questions.take(choice)) {
      this.appear(); // the next question
      return;
    }
    const started = performance.now();
    const { training, review } = this.work.current;
    const body = {
      key: newKey(), choice, milliseconds: Math.min(this.watch.stop(), 86_400_000), views: [...this.looking.views], answered_at: Date.now() / 1000,
      page_version: this.session.page_version,
    };
    if (reason) body.reason = reason;
    else if (this.session.questions.length) body.votes = { ...this.questions.votes };
    if (this.remark.text) body.comment = this.remark.text;
    this.said = choice;
    this.ui.flash(choice);
    if (review) {
      this.work.change(body, newKey());
      this.work.next(started);
      return;
    }
    const waits = training || (this.session.reveal && choice !== 'skip' && !this.outbox.stuck && navigator.onLine);
    if (!training) this.pace.answered();
    this.awaited = waits ? body.key : null;
    this.work.answer(body);
    if (waits) this.ui.show('checking');
    else this.work.next(started);
  }

  skip() {
    if (['label', 'failed'].includes(this.ui.state) && this.presses.take({ opens: true })) this.skipping.open();
  }

  undo() {
    if (['checking', 'explained'].includes(this.ui.state) || !this.presses.take({ seen: false })) return;
    if (this.work.current?.review) return;
    if (this.session.reveal && !this.work.history.length) {
      this.ui.say(t('own.stays'), true);
      return;
    }
    this.said = 'undo';
    if (!this.work.undo(newKey(), performance.now())) this.ui.say(t('nothingOffline'), true);
  }

  goOn() {
    if (this.ui.state === 'explained' && this.presses.take()) this.work.next(performance.now());
  }

  delivered(item, reply) {
    this.work.progress = reply.progress;
    if (item.path === '/api/undo') this.takenBack(item, reply);
    else if (item.body.key === this.awaited) this.explain(reply.training, reply.reveal);
    this.showProgress();
    if (!this.work.current || this.work.upcoming.length < 4) this.work.refill();
  }

  takenBack(item, reply) {
    if (!reply.assignment) {
      this.ui.say(t('nothing'), true);
      if (item.body.assignment) this.work.forget(item.body.assignment);
    } else if (!item.body.assignment) this.work.reopenToken(reply.assignment);
  }

  explain(result, names = null) {
    this.awaited = null;
    if (names) {
      const { current } = this.work;
      this.appear();
      this.ui.reveal(names);
      setTimeout(() => { if (this.work.current === current && this.ui.state === 'explained') this.work.next(); }, NAMES_SHOWN);
      return;
    }
    if (!result) {
      this.work.next();
      return;
    }
    this.appear();
    this.ui.explain(result);
  }

  rejected(item, error) {
    const again = item.body.key === this.awaited;
    this.awaited = null;
    const conflict = item.path === '/api/undo' ? 'own.stays' : 'answeredElsewhere';
    const why = error.status === 409 ? t(conflict) : t('refused', { why: error.message });
    this.ui.say(why, true);
    if (item.body.assignment) this.work.forget(item.body.assignment, error.status === 409);
    if (again && this.ui.state === 'checking') this.work.next();
  }

  queueChanged() {
    const { size, stuck } = this.outbox;
    clearTimeout(this.late);
    const late = stuck || !navigator.onLine;
    this.ui.queued(size, late || (size > 0 && !this.ui.queue.hidden));
    if (size && !late) this.late = setTimeout(() => this.ui.queued(this.outbox.size, true), PATIENCE);
    if (this.awaited && stuck && !this.work.current?.training) this.explain(null);
    if (this.awaited && stuck) this.explain({ correct: null, better: null, explanation: t('lesson.offline') });
    if (this.work) this.showProgress();
  }

  // ---- pairs

  // Something else is drawn: from the moment that it is on the screen, presses are meant for it.
  async appear() {
    const scene = this.presses.change();
    await frames(2); // the frame that holds the drawing has gone to the screen
    this.presses.shown(scene);
  }

  async open(pair, started) {
    this.presses.change();
    this.looking.begin(pair);
    this.prompt.show(pair.prompt);
    this.questions.begin(pair.review?.votes);
    this.remark.set(pair.review?.comment);
    this.ui.review(pair.review ? this.reviewed(pair.review) : '', pair.review?.choice);
    this.watch.stop();
    let shapes = this.shapes.take(pair);
    if (!shapes) {
      this.looking.show(null);
      this.ui.show('loading', t('loadingNext'));
      try {
        shapes = await this.shapes.load(pair);
      } catch (error) {
        if (error.status === 401) signIn();
        if (this.work.current !== pair) return;
        this.ui.show('failed', `${error.message} ${t('skipOrReload')}`);
        this.appear();
        return;
      }
      if (this.work.current !== pair) return;
    }
    this.looking.show(shapes);
    this.ui.show(pair.review && !pair.review.changeable ? 'shown' : 'label');
    this.ui.pair(pair, this.work.done + 1, this.work.progress.total, this.said);
    this.said = null;
    this.showProgress();
    this.watch.start();
    await this.appear();
    if (started !== null) performance.measure('next-pair', { start: started, end: performance.now() });
  }

  // The graphics context was lost, with everything on the GPU.
  drawAnew() {
    this.looking.show(null);
    this.shapes.clear();
    if (this.work.current && this.ui.state === 'label') this.open(this.work.current, null);
  }

  idle(state, text, share) {
    this.looking.show(null);
    this.showProgress();
    this.ui.show(state, text || t(this.ui.single ? 'finished.single' : 'finished.pairs', { count: this.work.done }), share);
  }

  failed(error) {
    if (error.status === 401) signIn();
    else this.ui.show('refused', `${error.message} ${error.remedy}`);
  }

  showProgress() {
    this.ui.progress(this.work.done, this.work.progress, this.pace, this.work.current?.training ?? false);
    this.shelf.remember(this.work.atHand, this.work.progress);
    this.ui.undo.disabled = (!this.work.history.length && !this.work.done) || Boolean(this.work.current?.review);
  }

  // The text above an earlier answer that is open again.
  reviewed(answer) {
    const said = t('own.given', { when: when(answer.answered), answer: this.ui.answered(answer.choice) });
    return `${said} ${t(answer.changeable ? 'own.change' : 'own.stays')}`;
  }

  backToWork() {
    if (!this.work.current?.review) return;
    this.presses.take(); // a second click is not for the pair that comes
    this.work.next(performance.now());
  }

  questionBack() {
    if (this.ui.state === 'label') this.questions.back();
  }

  comment() {
    if (this.ui.state === 'label') this.remark.open();
  }

  ownAnswers() {
    if (!['checking', 'explained'].includes(this.ui.state)) this.own.show();
  }

  openHelp() {
    this.help.open();
  }

  // Signing out empties this site's storage, so answers that wait must be sent first.
  async leave() {
    if (this.outbox.size) {
      this.ui.say(t('signOutLater', { count: this.outbox.size }), true);
      this.outbox.flush(true);
      return;
    }
    if (await this.api.request('POST', '/logout').then(() => true, (error) => error.status === 401)) signIn();
    else this.ui.say(t('error.connection'), true); // the session goes on
  }

  // The page's state, for tests; reading changes nothing.
  publish() {
    const page = this;
    window.labelState = Object.freeze({
      get state() { return page.ui.state; },
      get pair() { return page.work.current && { ...page.work.current }; },
      get done() { return page.work.done; },
      get ahead() { return page.work.upcoming.filter((pair) => page.shapes.ready(pair)).length; },
      get queued() { return page.outbox.size; },
      get cameras() { return structuredClone(page.viewer.cameras); },
      get orbit() { return page.viewer.orbit.state; },
      get triangles() { return { ...page.viewer.triangles }; },
      get places() { return structuredClone(page.viewer.places); },
      get settled() { return page.viewer.settled; },
      get memory() { return { ...page.viewer.renderer.info.memory, shapes: page.shapes.entries.size, bytes: page.shapes.bytes }; },
    });
  }
}

function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

async function frames(count) {
  for (let i = 0; i < count; i += 1) await new Promise((resolve) => { requestAnimationFrame(resolve); });
}

new LabelPage().start();
