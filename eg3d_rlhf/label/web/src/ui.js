// What the page says and shows besides the shapes.

import { paceText } from './pace.js';

export const SKIP_TEXTS = {
  broken: 'A shape is broken or missing',
  identical: 'They are exactly alike',
  unsure: 'I cannot judge this one',
  other: 'Another reason',
};

const STACKED = matchMedia('(max-width: 44rem), (max-aspect-ratio: 4/5)'); // as in app.css: the left shape is on top
const FROM = { front: 'the front', left: 'the left', right: 'the right', back: 'behind' };
const SAID = { tie: 'Tie.', up: 'Good.', down: 'Not good.', skip: 'Skipped.', undo: 'Last answer taken back.' };
const NOTICES = { // state: title
  loading: 'Loading', waiting: 'Preparing the shapes', offline: 'No connection', sending: 'Almost there',
  finished: 'All done – thank you!', failed: 'This cannot be shown', refused: 'Something is in the way',
};

export class Ui {
  constructor() {
    this.root = document.documentElement;
    for (const element of document.querySelectorAll('[id]')) this[element.id] = element;
  }

  // What is asked: 'pairs', or, of one shape at a time, 'thumbs' or 'scores'.
  arrange(scale) {
    this.single = scale !== 'pairs';
    this.root.dataset.scale = scale;
    this.right.hidden = this.single;
    for (const element of document.querySelectorAll('[data-for]')) element.hidden = !element.dataset.for.split(' ').includes(scale);
    if (this.single) this.left.setAttribute('aria-label', 'Shape');
  }

  get state() {
    return this.root.dataset.state;
  }

  // Shows shapes ('label', 'checking', 'explained') or a notice in their place.
  show(state, text = '', share = null) {
    this.root.dataset.state = state;
    this.notice.hidden = !(state in NOTICES);
    this.explanation.hidden = state !== 'explained';
    for (const button of document.querySelectorAll('[data-choice]')) button.disabled = state !== 'label';
    this.skip.disabled = state !== 'label' && state !== 'failed';
    if (!(state in NOTICES)) return;
    this.noticeTitle.textContent = NOTICES[state];
    this.noticeText.textContent = text;
    this.noticeBar.hidden = share === null;
    if (share !== null) this.noticeBar.value = share;
    if (this.noticed !== state) this.say(`${NOTICES[state]}. ${text}`);
    this.noticed = state;
  }

  pair(pair, place, total, said) {
    this.noticed = null;
    for (const side of ['left', 'right']) this[side].classList.remove('better');
    this.root.dataset.training = String(pair.training);
    const what = this.single ? 'shape' : 'pair';
    const where = pair.training ? `Practice ${what}.` : `${what[0].toUpperCase()}${what.slice(1)} ${place} of ${total}.`;
    this.say(`${said ? `${SAID[said] ?? (this.side(said) ? `${this.side(said)} chosen.` : `Score ${said}.`)} ` : ''}${where}`);
  }

  progress(done, { total, training_left: practice, last_hour: lastHour }, pace, training) {
    this.bar.max = Math.max(total, 1);
    this.bar.value = done;
    this.count.textContent = training ? `Practice${practice ? ` · ${practice} to go` : ' done'}` : `${done} of ${total}`;
    this.pace.textContent = training ? 'not counted' : paceText(pace.perHour(lastHour), total - done);
  }

  queued(count, late) {
    this.root.dataset.queued = String(count);
    const text = count && late ? `${count} waiting to be sent` : '';
    if (this.queue.textContent === text) return;
    this.queue.textContent = text;
    this.queue.hidden = !text;
  }

  // better: 'left' or 'right' where that can be told, else null.
  explain({ correct, explanation }, better) {
    const praise = correct === null ? 'Noted' : correct ? 'Yes, that is it' : 'Look again';
    this.explanationTitle.textContent = better && !correct ? `${praise}: the ${this.side(better).toLowerCase()} one is better` : praise;
    for (const side of ['left', 'right']) this[side].classList.toggle('better', side === better);
    this.explanation.dataset.correct = String(correct);
    this.explanationText.textContent = explanation;
    this.show('explained');
    this.say(`${this.explanationTitle.textContent}. ${explanation} Press Enter to go on.`);
    this.onward.focus();
  }

  view(name) {
    for (const button of document.querySelectorAll('[data-view]')) button.setAttribute('aria-pressed', String(button.dataset.view === name));
    const from = name ? `, seen from ${FROM[name] ?? name}` : '';
    for (const side of ['left', 'right']) this[side].setAttribute('aria-label', this.single ? `Shape${from}` : `${this.side(side)} shape${from}`);
  }

  side(name) {
    return STACKED.matches ? { left: 'Top', right: 'Bottom' }[name] : { left: 'Left', right: 'Right' }[name];
  }

  flash(choice) {
    const button = document.querySelector(`[data-choice="${choice}"]`);
    button?.classList.add('chosen');
    setTimeout(() => button?.classList.remove('chosen'), 180);
  }

  // Tells a screen reader, and for a while the eye when asked to.
  say(text, visibly = false) {
    this.live.textContent = text;
    if (!visibly) return;
    this.toast.textContent = text;
    this.toast.hidden = false;
    clearTimeout(this.toasting);
    this.toasting = setTimeout(() => { this.toast.hidden = true; }, 5000);
  }
}
