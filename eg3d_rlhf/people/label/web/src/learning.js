// How certain the reward of the labels so far is, for a campaign that learns from its answers (--strategy=active).

import { rowsPlot } from './plots.js';

// report: null for any other campaign.
export function showLearning(page, report) {
  page.learningPanel.hidden = !report;
  if (!report) return;
  page.learningAdvice.textContent = `${report.pairs} of ${report.total} pairs are planned. ${advice(report)}`;
  const latest = report.latest;
  page.learning.hidden = !latest;
  if (!latest) return;
  page.learning.replaceChildren(rowsPlot([
    { label: 'Certainty', value: latest.certainty, note: `${latest.labels} labels`, more: 'expected cosine of the direction with one drawn from the posterior' },
    { label: 'Halves’ agreement', value: latest.half_cosine, note: `${latest.labels} labels`, more: 'mean cosine of the directions of two halves of the labels' },
    { label: 'Accuracy', value: latest.accuracy, ci95: latest.accuracy_interval, note: `${latest.random_labels} random`, more: 'on held-out labels of random pairs' },
  ], { low: 0, high: 1, middle: 0.5 }));
}

function advice({ first_labels: first, rise_labels: span, latest, rises }) {
  if (!latest) return `From label ${first} on, a reward of the labels chooses the pairs.`;
  const known = [
    rises.half_cosine !== null && `the agreement of halves rose by ${rises.half_cosine.toFixed(3)}`,
    rises.accuracy !== null && `the accuracy rose by ${rises.accuracy.toFixed(3)}`,
  ].filter(Boolean);
  if (!known.length) return `Whether more labels help can be said ${span} labels after the first estimate. Keep labelling.`;
  const change = `Over the last ${span} labels, ${known.join(' and ')}.`;
  return rises.stop ? `${change} More labels hardly help: you can stop here.` : `${change} More labels still help.`;
}
