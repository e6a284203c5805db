// The pages' texts, in the reader's language. The tables texts.*.json have the same keys; a new text goes into each of them.

import de from './texts.de.json';
import en from './texts.en.json';
import es from './texts.es.json';

const KEY = 'eg3d-language';
const TABLES = { en, de, es };

let language = remembered() ?? wanted();

// Fixes the language of a page that exists in one only.
export function speak(code) {
  language = code;
}

// The text of a key with its {placeholders} filled; numbers as the language writes them. A text with plural forms takes the one for `count`.
export function t(key, values = {}) {
  const entry = TABLES[language][key] ?? en[key] ?? key;
  const text = typeof entry === 'string' ? entry : entry[new Intl.PluralRules(language).select(values.count)] ?? entry.other;
  return text.replace(/\{(\w+)\}/g, (_, name) => (typeof values[name] === 'number' ? values[name].toLocaleString(language) : values[name]));
}

// A moment, in seconds since 1970, as the language writes it.
export function when(seconds) {
  return new Date(seconds * 1000).toLocaleString(language, { dateStyle: 'medium', timeStyle: 'short' });
}

// A sentence that the server keeps in English, as the explanations of practice pairs: translated where the table has it under known.*.
export function known(sentence) {
  const key = Object.keys(en).find((one) => one.startsWith('known.') && en[one] === sentence);
  return key ? t(key) : sentence;
}

// Fills elements with the texts that their attributes name: data-text the content, data-label the accessible name, data-alt an image's.
export function fillTexts() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll('[data-text]')) element.textContent = t(element.dataset.text);
  for (const element of document.querySelectorAll('[data-label]')) element.setAttribute('aria-label', t(element.dataset.label));
  for (const element of document.querySelectorAll('[data-alt]')) element.alt = t(element.dataset.alt);
}

// The switch: a choice is kept on this device, and the page starts anew in that language.
export function watchLanguage(select) {
  select.value = language;
  select.addEventListener('change', () => {
    localStorage.setItem(KEY, select.value);
    location.reload();
  });
}

function remembered() {
  const code = localStorage.getItem(KEY);
  return code in TABLES ? code : null;
}

// The first of the browser's languages that there is a table for.
function wanted() {
  return navigator.languages.map((tag) => tag.slice(0, 2).toLowerCase()).find((code) => code in TABLES) ?? 'en';
}
