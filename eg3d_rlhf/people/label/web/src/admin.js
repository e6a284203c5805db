// The results page: figures of annotators and answers while they come in, and who has access.

import { Api, signIn } from './api.js';
import { showComments, showQuestions } from './asked_results.js';
import { showLearning } from './learning.js';
import { duration } from './pace.js';
import { People } from './people.js';
import { boardPlot, rowsPlot, timelinePlot } from './plots.js';
import { speak } from './texts.js';
import { watchTheme } from './theme.js';

const EVERY = 3000; // milliseconds
const STRENGTHS = 40; // of the strongest and weakest shapes that are drawn

const api = new Api();
const page = Object.fromEntries([...document.querySelectorAll('[id]')].map((element) => [element.id, element]));
const people = new People(page, api, poll);
let me = ''; // who is logged in
let seen = ''; // the figures on the page, to leave it alone while nothing changes

async function start() {
  speak('en');
  watchTheme(page.theme);
  for (const button of document.querySelectorAll('[data-close]')) button.addEventListener('click', () => button.closest('dialog').close());
  document.addEventListener('visibilitychange', () => { if (!document.hidden) poll(); });
  await poll();
}

async function poll() {
  clearTimeout(poll.timer);
  try {
    if (!api.csrf) me = (await api.session()).annotator;
    const asked = ['quality', 'annotators', 'comments'].map((name) => api.json('GET', `/api/admin/${name}`));
    const [quality, annotators, comments] = await Promise.all(asked);
    const text = JSON.stringify([quality, annotators, comments]);
    if (text !== seen) {
      show(quality, annotators);
      showQuestions(page.questions, page.questionRows, quality.questions);
      showComments(page.comments, page.commentRows, comments);
    }
    seen = text;
    page.fresh.textContent = `Live, as of ${new Date().toLocaleTimeString('en-GB')}`;
  } catch (error) {
    if (error.status === 401) signIn();
    page.fresh.textContent = `${error.message} Trying again …`;
  }
  if (!document.hidden) poll.timer = setTimeout(poll, EVERY);
}

function show(quality, annotators) {
  overview(quality);
  leaderboards(quality.leaderboards ?? []);
  showLearning(page, quality.learning);
  table(quality.annotators);
  people.show(annotators, new Map(quality.annotators.map((one) => [one.name, one])), me);
  page.timeline.replaceChildren(timelinePlot(quality.timeline));
  page.sides.replaceChildren(rowsPlot(
    quality.annotators.filter((one) => one.left_share_ci95)
      .map((one) => ({ label: one.name, value: one.left_share, ci95: one.left_share_ci95, note: `n = ${one.left_right_n}` })),
    { low: 0, high: 1, middle: 0.5, percent: true },
  ));
  page.kappas.replaceChildren(...kappas(quality.agreement));
  page.strengths.replaceChildren(strengthsPlot(quality.bradley_terry));
}

// One figure per question and group of generators that met; notes on it stand below.
function leaderboards(all) {
  page.leaderboardPanel.hidden = !all.length;
  page.leaderboards.replaceChildren(...all.flatMap((board) => {
    const heading = document.createElement('h3');
    heading.textContent = board.question === null ? 'Which is better' : `Question: ${board.question}`;
    return [...(all.length > 1 ? [heading] : []), ...board.groups.map(boardPlot), ...board.notes.map(quiet)];
  }));
}

function kappas({ cohen_kappa: all, least }) {
  const shown = all.filter((one) => one.kappa !== null).map((one) => (
    { label: `${one.a} – ${one.b}`, value: one.kappa, ci95: one.ci95, note: `n = ${one.n}`, more: `${Math.round(100 * one.same)} % the same` }
  ));
  const few = all.filter((one) => one.same_needs > 0).length;
  const same = all.filter((one) => one.kappa === null && !one.same_needs);
  const notes = [
    few && `${few} ${few === 1 ? 'pair of annotators has' : 'pairs of annotators have'} fewer than ${least} pairs in common: too few for a figure.`,
    ...same.map((one) => `${one.a} – ${one.b}: one and the same answer to all ${one.n}, as chance alone would give.`),
  ].filter(Boolean);
  return [...(shown.length || !notes.length ? [rowsPlot(shown, { low: -1, high: 1, middle: 0 })] : []), ...notes.map(quiet)];
}

function quiet(text) {
  const line = document.createElement('p');
  line.className = 'quiet';
  line.textContent = text;
  return line;
}

function strengthsPlot(all) {
  const half = STRENGTHS / 2;
  const drawn = all.length > STRENGTHS ? [...all.slice(0, half), ...all.slice(-half)] : all;
  const reach = Math.max(1, ...drawn.flatMap((one) => one.ci95 ?? [one.strength]).filter(Number.isFinite).map(Math.abs));
  const entries = drawn.map((one) => ({ label: one.label, value: one.strength, ci95: one.ci95, note: `n = ${one.comparisons}` }));
  return rowsPlot(entries, { low: -reach, high: reach, middle: 0, width: 960 });
}

function overview({ judgements, agreement, cycles, annotators, preparation, label_use: use }) {
  page.judgements.textContent = judgements.toLocaleString('en-GB');
  // Answers of vision-language models are stored beside those of people, and used for none of the figures.
  const judged = use.left_out.judges ? `; ${use.left_out.judges} answers of judges not used` : '';
  page.judgementsNote.textContent = `by ${annotators.length} ${annotators.length === 1 ? 'annotator' : 'annotators'}${judged}`;
  const alpha = agreement.krippendorff_alpha;
  page.alpha.textContent = alpha === null ? '–' : alpha.toFixed(2);
  page.alphaNote.textContent = alphaNote(agreement);
  page.cyclic.textContent = cycles.triples ? `${cycles.cyclic} of ${cycles.triples}` : '–';
  page.cyclicNote.textContent = cycles.triples ? 'A beats B, B beats C, C beats A' : 'no three shapes compared with each other';
  page.prepared.textContent = `${preparation.done} of ${preparation.total}`;
  page.preparedBar.value = preparation.total ? preparation.done / preparation.total : 0;
  const left = preparation.seconds_left;
  const notes = [
    left && `${duration(left)} left`,
    preparation.failed && `${preparation.failed} failed`,
    preparation.error,
  ];
  page.preparedNote.textContent = notes.filter(Boolean).join('. ');
}

function alphaNote({ alpha_ci95: bounds, alpha_n: n, alpha_needs: needs }) {
  if (bounds) return `95 %: ${bounds.map((bound) => bound.toFixed(2)).join(' to ')}, n = ${n} pairs`;
  if (needs) return `${n} ${n === 1 ? 'pair' : 'pairs'} judged by two; ${needs} more for a figure`;
  return `all answers to ${n} pairs are the same`;
}

function table(qualities) {
  page.annotators.replaceChildren(...qualities.map(row));
}

function row(quality) {
  const line = document.createElement('tr');
  line.append(cell(quality.name));
  const figures = [
    [quality.judgements], [quality.per_hour === null ? '–' : Math.round(quality.per_hour)],
    [quality.median_seconds === null ? '–' : `${quality.median_seconds.toFixed(1)} s`],
    share(quality.left_share, quality.left_share_ci95, quality.left_right_n), share(quality.self_consistency, quality.self_consistency_ci95, quality.self_consistency_n),
    share(quality.swap_consistency, quality.swap_consistency_ci95, quality.swap_consistency_n),
    share(quality.gold_accuracy, quality.gold_ci95, quality.gold_n), [quality.ties, quality.both_bad ? `and ${quality.both_bad} both bad` : ''], [quality.skips],
  ];
  for (const [value, note] of figures) {
    const figure = cell(value, note);
    figure.dataset.number = '';
    line.append(figure);
  }
  line.append(flags(quality.flags));
  return line;
}

function share(value, interval, count) {
  if (value === null) return ['–'];
  if (!interval) return [`${Math.round(count * value)} of ${count}`, 'too few for a share'];
  return [`${Math.round(100 * value)} %`, `${interval.map((bound) => Math.round(100 * bound)).join('–')} %, n = ${count}`];
}

function cell(text, note = '') {
  const element = document.createElement('td');
  element.textContent = String(text);
  if (note) {
    const small = document.createElement('small');
    small.textContent = note;
    element.append(small);
  }
  return element;
}

function flags(words) {
  const element = document.createElement('td');
  for (const word of words) {
    const flag = document.createElement('span');
    flag.className = 'flag';
    flag.textContent = `⚑ ${word}`;
    element.append(flag);
  }
  return element;
}

start();
