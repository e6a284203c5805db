// The prompt of both shapes: a text, an image, or both. On small screens one line, which a button opens.

export class Prompt {
  constructor(ui) {
    this.ui = ui;
    ui.promptPicture.addEventListener('click', () => {
      ui.promptLarge.src = ui.promptImage.src;
      ui.promptDialog.showModal();
    });
    ui.promptDialog.addEventListener('click', () => ui.promptDialog.close()); // wherever
    ui.promptMore.addEventListener('click', () => this.open(ui.promptMore.getAttribute('aria-expanded') !== 'true'));
    new ResizeObserver(() => requestAnimationFrame(() => this.measure())).observe(ui.promptText);
  }

  // prompt: null or {text, image}, either of which may be null.
  show(prompt) {
    const { text, image } = prompt ?? {};
    this.ui.prompt.hidden = !text && !image;
    this.ui.root.toggleAttribute('data-prompt', Boolean(text || image));
    this.ui.promptText.hidden = !text;
    this.ui.promptText.textContent = text ?? '';
    this.ui.promptPicture.hidden = !image;
    if (!image) this.ui.promptImage.removeAttribute('src');
    else if (this.ui.promptImage.getAttribute('src') !== image) this.ui.promptImage.src = image;
    this.open(false);
  }

  open(whether) {
    this.ui.prompt.classList.toggle('open', whether);
    this.ui.promptMore.setAttribute('aria-expanded', String(whether));
    this.measure();
  }

  // The button is there where a line does not hold the text.
  measure() {
    const { promptText: line, promptMore: more } = this.ui;
    more.hidden = line.hidden || (more.getAttribute('aria-expanded') !== 'true' && line.scrollWidth <= line.clientWidth);
  }
}
