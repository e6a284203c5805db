// A remark that goes with the answer to the pair at hand: asked for by a key, never required.

const UNSAYABLE = /[\p{C}\p{Zl}\p{Zp}\s]+/gu; // control characters and line breaks: the server takes printable text alone

export class Comment {
  text = null;

  constructor(dialog, field, button) {
    Object.assign(this, { dialog, field, button });
    dialog.querySelector('form').addEventListener('submit', () => this.set(field.value));
    dialog.querySelector('[data-close]').addEventListener('click', () => dialog.close());
  }

  // Another pair. text: the remark made before, where an answer is looked at again.
  set(text) {
    this.text = (text ?? '').replace(UNSAYABLE, ' ').trim() || null;
    this.button.setAttribute('aria-pressed', String(this.text !== null));
  }

  open() {
    this.field.value = this.text ?? '';
    this.dialog.showModal();
    this.field.focus();
  }
}
