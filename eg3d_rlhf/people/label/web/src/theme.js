// Light or dark: as the device says, unless the reader has chosen.

import { t } from './texts.js';

const KEY = 'eg3d-theme';

export function watchTheme(button, changed = () => {}) {
  const system = matchMedia('(prefers-color-scheme: dark)');
  const chosen = () => localStorage.getItem(KEY) ?? '';
  const dark = () => (chosen() || (system.matches ? 'dark' : 'light')) === 'dark';
  const apply = () => {
    document.documentElement.dataset.theme = dark() ? 'dark' : 'light';
    button.setAttribute('aria-pressed', String(dark()));
    button.title = t(dark() ? 'theme.light' : 'theme.dark');
    changed();
  };
  button.addEventListener('click', () => {
    localStorage.setItem(KEY, dark() ? 'light' : 'dark');
    apply();
  });
  system.addEventListener('change', apply);
  apply();
}

export function calm() {
  return matchMedia('(prefers-reduced-motion: reduce)').matches;
}
