// For the results page: figures of the questions asked besides which is better, and the annotators' comments.

export function showQuestions(panel, body, questions) {
  panel.hidden = !questions.length;
  body.replaceChildren(...questions.map((one) => row([
    one.name, one.n, share(one.left, one.n), share(one.tie, one.n), share(one.right, one.n), `${one.as_overall} of ${one.decided}`,
    one.krippendorff_alpha === null ? '–' : one.krippendorff_alpha.toFixed(2),
  ])));
}

export function showComments(panel, body, comments) {
  panel.hidden = !comments.length;
  body.replaceChildren(...comments.map((one) => row([
    new Date(one.received * 1000).toLocaleString('en-GB', { dateStyle: 'medium', timeStyle: 'short' }), one.annotator, one.choice, one.comment,
  ])));
}

function row(values) {
  const line = document.createElement('tr');
  line.append(...values.map((value) => {
    const cell = document.createElement('td');
    cell.textContent = String(value);
    return cell;
  }));
  return line;
}

function share(count, all) {
  return all ? `${Math.round((100 * count) / all)} %` : '–';
}
