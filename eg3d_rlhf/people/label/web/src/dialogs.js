// The two dialogs: help, which is also the welcome, and the reason of a skip.

import { t } from './texts.js';

export function helpDialog(dialog, welcomeKey) {
  for (const button of dialog.querySelectorAll('[data-close]')) button.addEventListener('click', () => dialog.close());
  dialog.addEventListener('keydown', (event) => {
    if (event.key === '?') dialog.close();
  });
  dialog.addEventListener('close', () => localStorage.setItem(welcomeKey, 'seen'));
  return {
    open() {
      dialog.querySelector('[data-close]').textContent = t('help.back');
      dialog.showModal();
    },
    welcome() {
      if (!localStorage.getItem(welcomeKey)) dialog.showModal();
    },
  };
}

// choose(reason) is called for a reason; Escape calls nothing. The number keys choose as well.
export function skipDialog(dialog, list, reasons, choose) {
  const buttons = reasons.map((reason, place) => {
    const button = document.createElement('button');
    const key = document.createElement('kbd');
    key.textContent = String(place + 1);
    key.setAttribute('aria-hidden', 'true');
    button.type = 'button';
    button.dataset.reason = reason;
    button.setAttribute('aria-keyshortcuts', String(place + 1));
    button.append(key, t(`skip.${reason}`));
    button.addEventListener('click', () => {
      dialog.close();
      choose(reason);
    });
    return button;
  });
  list.replaceChildren(...buttons);
  dialog.querySelector('[data-close]').addEventListener('click', () => dialog.close());
  dialog.addEventListener('keydown', (event) => {
    const focus = buttons.indexOf(document.activeElement);
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (buttons[event.key - 1]) buttons[event.key - 1].click();
    else if (step) buttons[(Math.max(focus, step < 0 ? 0 : -1) + step + buttons.length) % buttons.length].focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return { open: () => dialog.showModal() };
}
