// The page's texts and controls around the shapes.

import { paceText } from './pace.js';
import { known, t } from './texts.js';

const STACKED = matchMedia('(max-aspect-ratio: 4/5)'); // as in app.css: the left shape is on top
const NOTICES = ['loading', 'waiting', 'offline', 'sending', 'finished', 'failed', 'refused']; // states without shapes to judge

export class Ui {
  constructor() {
    this.root = document.documentElement;
    for (const element of document.querySelectorAll('[id]')) this[element.id] = element;
  }

  // The kind of question: 'pairs', or, of one shape at a time, 'thumbs' or 'scores'.
  arrange(scale) {
    this.single = scale !== 'pairs';
    this.root.dataset.scale = scale;
    this.right.hidden = this.single;
    for (const element of document.querySelectorAll('[data-for]')) element.hidden = !element.dataset.for.split(' ').includes(scale);
    if (this.single) for (const [element, key] of [[this.bar, 'progress.single'], [this.tools, 'tools.single']]) element.setAttribute('aria-label', t(key));
    this.view('front');
  }

  get state() {
    return this.root.dataset.state;
  }

  // Shows shapes ('label', 'checking', 'explained') or a notice in their place.
  show(state, text = '', share = null) {
    this.root.dataset.state = state;
    const notice = NOTICES.includes(state);
    this.notice.hidden = !notice;
    this.explanation.hidden = state !== 'explained';
    for (const button of document.querySelectorAll('[data-choice]')) button.disabled = state !== 'label' || button.dataset.later === 'true';
    this.skip.disabled = state !== 'label' && state !== 'failed';
    if (!notice) return;
    this.noticeTitle.textContent = t(`notice.${state}`);
    this.noticeText.textContent = text;
    this.noticeBar.hidden = share === null;
    if (share !== null) this.noticeBar.value = share;
    if (this.noticed !== state) this.say(`${this.noticeTitle.textContent}. ${text}`);
    this.noticed = state;
  }

  pair(pair, place, total, said) {
    this.noticed = null;
    for (const side of ['left', 'right']) this[side].classList.remove('better');
    this.root.dataset.training = String(pair.training);
    const what = this.single ? 'single' : 'pairs';
    const where = pair.training ? t(`place.practice.${what}`) : t(`place.${what}`, { place, total });
    this.say(said ? `${this.answered(said)} ${where}` : where);
  }

  // Beside each shape, what is not shown as in its original file, so that nobody takes it for the generator's fault.
  note(shapes) {
    for (const side of ['left', 'right']) {
      const text = (shapes?.[side].notes ?? []).map((kind) => t(`shown.${kind}`)).join(' ');
      this[`${side}Note`].textContent = text;
      this[`${side}Note`].hidden = !text;
    }
  }

  // The question about the pair, above the answers; '' is none.
  ask(text) {
    this.askedText.textContent = text;
    this.asked.hidden = !text && !this.askedNote.textContent;
  }

  // The text about an earlier answer that is open again, and the answer on its button; '' and null for a new pair.
  review(text, choice) {
    this.askedNote.textContent = text;
    this.backToWork.hidden = !text;
    this.ask(this.askedText.textContent);
    for (const button of document.querySelectorAll('[data-choice]')) button.classList.toggle('given', button.dataset.choice === choice);
  }

  answered(said) {
    return /^\d$/.test(said) ? t('said.score', { score: said }) : t(`said.${this.side(said)}`);
  }

  progress(done, { total, training_left: practice }, pace, training) {
    this.bar.max = Math.max(total, 1);
    this.bar.value = done;
    this.count.textContent = training ? t(practice ? 'practice' : 'practice.done', { left: practice }) : t('count', { done, total });
    this.pace.textContent = training ? t('practice.pace') : paceText(pace.perHour, total - done);
  }

  queued(count, late) {
    this.root.dataset.queued = String(count);
    const text = count && late ? t('queue', { count }) : '';
    if (this.queue.textContent === text) return;
    this.queue.textContent = text;
    this.queue.hidden = !text;
  }

  // The lesson of a practice pair; better: the known answer, 'left' or 'right' of two shapes, or null.
  explain({ correct, explanation, better }) {
    const praise = t(`lesson.${correct === null ? 'noted' : correct ? 'yes' : 'again'}`);
    this.explanationTitle.textContent = !this.single && better && !correct ? `${praise}: ${t(`lesson.${this.side(better)}`)}` : praise;
    for (const side of ['left', 'right']) this[side].classList.toggle('better', side === better);
    this.explanation.dataset.correct = String(correct);
    this.explanationText.textContent = known(explanation);
    this.show('explained');
    this.say(`${this.explanationTitle.textContent}. ${known(explanation)} ${t('lesson.enter')}`);
    this.onward.focus();
  }

  // Shows the generators of the two shapes.
  reveal({ left, right }) {
    this.explanationTitle.textContent = t('reveal');
    this.explanationText.textContent = `${t(this.side('left'))}: ${left} · ${t(this.side('right'))}: ${right}`;
    this.explanation.dataset.correct = 'null';
    this.show('explained');
    this.say(`${this.explanationTitle.textContent}. ${this.explanationText.textContent}. ${t('lesson.enter')}`);
    this.onward.focus();
  }

  view(name) {
    for (const button of document.querySelectorAll('[data-view]')) button.setAttribute('aria-pressed', String(button.dataset.view === name));
    const from = name ? `, ${t(`from.${name}`)}` : '';
    for (const side of ['left', 'right']) this[side].setAttribute('aria-label', `${t(this.single ? 'shape' : `shape.${this.side(side)}`)}${from}`);
  }

  // Name of a side in the page's layout; another word stays as it is.
  side(name) {
    return (STACKED.matches && { left: 'top', right: 'bottom' }[name]) || name;
  }

  flash(choice) {
    const button = document.querySelector(`[data-choice="${choice}"]`);
    button?.classList.add('chosen');
    setTimeout(() => button?.classList.remove('chosen'), 180);
  }

  // Announces a text to screen readers; visibly too, for a while, on request.
  say(text, visibly = false) {
    this.live.textContent = text;
    if (!visibly) return;
    this.toast.textContent = text;
    this.toast.hidden = false;
    clearTimeout(this.toasting);
    this.toasting = setTimeout(() => { this.toast.hidden = true; }, 5000);
  }
}
