// The list of one's own answers, newest first, a page at a time; one of them opens its pair again.

import { t, when } from './texts.js';

const PAGE = 20;

export class OwnAnswers {
  // open(answer) is called for the one that is chosen
  constructor(api, ui, open) {
    Object.assign(this, { api, ui, open });
    ui.ownOlder.addEventListener('click', () => this.load());
    ui.ownDialog.querySelector('[data-close]').addEventListener('click', () => ui.ownDialog.close());
  }

  async show() {
    this.before = null;
    this.ui.ownList.replaceChildren();
    this.ui.ownDialog.showModal();
    await this.load();
  }

  async load() {
    this.ui.ownOlder.disabled = true;
    const query = this.before === null ? '' : `&before=${this.before}`;
    try {
      const { answers, more } = await this.api.json('GET', `/api/answers?count=${PAGE}${query}`);
      const lines = answers.map((answer) => this.line(answer));
      this.ui.ownList.append(...lines);
      this.before = answers.at(-1)?.sequence ?? this.before;
      this.ui.ownOlder.hidden = !more;
      this.ui.ownNote.textContent = this.ui.ownList.children.length ? '' : t('own.none');
      lines[0]?.querySelector('button').focus();
    } catch (error) {
      this.ui.ownNote.textContent = `${error.message} ${error.remedy}`;
      this.ui.ownOlder.hidden = false;
    }
    this.ui.ownOlder.disabled = false;
  }

  line(answer) {
    const item = document.createElement('li');
    const button = document.createElement('button');
    const time = document.createElement('time');
    button.type = 'button';
    button.dataset.assignment = answer.assignment;
    time.textContent = when(answer.answered);
    time.dateTime = new Date(answer.answered * 1000).toISOString();
    button.append(time, ` ${this.ui.answered(answer.choice)}`);
    if (answer.comment) {
      const remark = document.createElement('q');
      remark.textContent = answer.comment;
      button.append(' ', remark);
    }
    button.addEventListener('click', () => {
      this.ui.ownDialog.close();
      this.open(answer);
    });
    item.append(button);
    return item;
  }
}
