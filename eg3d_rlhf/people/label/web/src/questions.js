// Questions that a campaign asks besides which one is better: one after the other, with the same keys and buttons, the overall answer last.

import { t } from './texts.js';

const VOTES = ['left', 'right', 'tie'];

export class Questions {
  votes = {};
  step = 0; // place of the question that is asked now; one more than there are: which is better

  // asked: [{name, text}], text null where the page has it
  constructor(ui, asked) {
    Object.assign(this, { ui, asked });
    this.chips = [...asked, { name: 'overall', text: null }].map((question, place) => this.chip(question, place));
    ui.askedSteps.replaceChildren(...(asked.length ? this.chips : []));
  }

  // Another pair. votes: given before, where an answer is looked at again.
  begin(votes = {}) {
    this.votes = { ...votes };
    this.step = this.next();
    this.draw();
  }

  // Takes a vote. Returns false where all are given: then it is the answer.
  take(choice) {
    const question = this.asked[this.step];
    if (!question) return false;
    if (!VOTES.includes(choice)) return true;
    this.votes[question.name] = choice;
    this.step = this.next();
    this.draw();
    this.ui.say(`${this.ui.answered(choice)} ${this.text}`);
    return true;
  }

  back() {
    if (this.step > 0) this.go(this.step - 1);
  }

  go(step) {
    this.step = step;
    this.draw();
    this.ui.say(this.text);
  }

  // The first one without a vote.
  next() {
    const open = this.asked.findIndex(({ name }) => !(name in this.votes));
    return open < 0 ? this.asked.length : open;
  }

  get text() {
    if (!this.asked.length) return '';
    const { name, text } = this.asked[this.step] ?? { name: 'overall', text: null };
    return text ?? t(`question.${name}`);
  }

  chip({ name, text }, place) {
    const button = document.createElement('button');
    const title = document.createElement('span');
    button.type = 'button';
    title.textContent = text ? name : t(`asked.${name}`);
    button.append(title, document.createElement('b'));
    button.addEventListener('click', () => this.go(place));
    return button;
  }

  draw() {
    const complete = this.next() === this.asked.length;
    this.chips.forEach((button, place) => {
      const vote = this.votes[this.asked[place]?.name];
      button.lastChild.textContent = vote ? t(`vote.${this.ui.side(vote)}`) : '';
      button.toggleAttribute('aria-current', place === this.step);
      button.disabled = place === this.asked.length ? !complete : place > this.next();
    });
    if (this.asked.length) this.chips[this.step].scrollIntoView({ block: 'nearest', inline: 'nearest' });
    this.ui.bad.dataset.later = String(this.step < this.asked.length); // of the pair as a whole alone
    this.ui.bad.disabled = this.step < this.asked.length || this.ui.state !== 'label';
    this.ui.ask(this.text);
  }
}
