// Plots as inline SVG, drawn from the report's figures; colours come from the style sheet.

const SVG = 'http://www.w3.org/2000/svg';

// Bars of judgements over time. bins: [{time, seconds, judgements, median_seconds}], empty ones left out.
export function timelinePlot(bins) {
  if (!bins.length) return nothing();
  const [width, height, low] = [960, 170, 140];
  const start = bins[0].time;
  const end = bins.at(-1).time + bins[0].seconds;
  const most = Math.max(...bins.map((bin) => bin.judgements));
  const x = (time) => 36 + ((time - start) / (end - start)) * (width - 44);
  const plot = canvas(width, height, `${sum(bins)} judgements from ${moment(start)} to ${moment(end)}, at most ${most} in ${span(bins[0].seconds)}`);
  for (const share of [0, 0.5, 1]) {
    const y = low - share * (low - 14);
    plot.append(line('axis', 36, y, width - 8, y), label('', 30, y + 4, niceCount(share * most), 'end'));
  }
  for (const bin of bins) {
    const tall = (bin.judgements / most) * (low - 14);
    const bar = node('rect', { class: 'mark', x: x(bin.time), y: low - tall, height: tall, width: Math.max(1, x(bin.time + bin.seconds) - x(bin.time) - 1) });
    bar.append(titled(`${moment(bin.time)}: ${bin.judgements} judgements, median ${bin.median_seconds.toFixed(1)} s`));
    plot.append(bar);
  }
  plot.append(label('', 36, height - 10, moment(start), 'start'), label('', width - 8, height - 10, moment(end), 'end'));
  plot.append(label('', width / 2, height - 10, `judgements in ${span(bins[0].seconds)}`, 'middle'));
  return plot;
}

// One row per entry: a mark with its interval, the value and a note. entries: [{label, value, ci95 | null, note, more}]; `more` is in the tip alone.
export function rowsPlot(entries, { low, high, middle, digits = 2, percent = false, width = 480 }) {
  const known = entries.filter((entry) => entry.value !== null && entry.value !== undefined);
  if (!known.length) return nothing();
  const [row, left, right] = [22, 130, 116];
  const height = known.length * row + 26;
  const x = (value) => left + ((Math.min(high, Math.max(low, value)) - low) / (high - low)) * (width - left - right);
  const format = (value) => (percent ? `${Math.round(100 * value)} %` : value.toFixed(digits));
  const plot = canvas(width, height, known.map((entry) => `${entry.label}: ${format(entry.value)}`).join('; '));
  plot.append(line('middle', x(middle), 4, x(middle), height - 20));
  known.forEach((entry, place) => {
    const y = 14 + place * row;
    const group = node('g', {});
    group.append(label('name', left - 10, y + 4, shortened(entry.label), 'end'));
    if (entry.ci95) group.append(line('range', x(entry.ci95[0]), y, x(entry.ci95[1]), y));
    group.append(node('circle', { class: 'mark', cx: x(entry.value), cy: y, r: 4.5 }), label('', width - right + 12, y + 4, format(entry.value), 'start'),
      label('', width - 4, y + 4, entry.note ?? '', 'end'));
    group.append(titled(`${entry.label}: ${format(entry.value)}${entry.ci95 ? ` (${entry.ci95.map(format).join(' to ')})` : ''} ${[entry.note, entry.more].filter(Boolean).join(', ')}`));
    plot.append(group);
  });
  for (const value of [low, middle, high]) plot.append(label('', x(value), height - 4, format(value), 'middle'));
  return plot;
}

// Generators, best first: place, name, points with their interval, an arrow where it is open; wins, losses, ties and n in numbers.
export function boardPlot(group) {
  const [row, top, left, right, width] = [34, 26, 250, 420, 960];
  const ends = group.flatMap((one) => [one.points, ...one.ci95]).filter((value) => value !== null);
  const [low, high] = [50 * Math.floor((Math.min(...ends, 950) - 10) / 50), 50 * Math.ceil((Math.max(...ends, 1050) + 10) / 50)];
  const x = (value) => left + ((value - low) / (high - low)) * (width - left - right);
  const bottom = top + group.length * row;
  const columns = [['points', 350], ['95 %', 235], ['won', 185], ['lost', 150], ['tied', 114], ['both bad', 45], ['n', 0]];
  const at = (back) => width - 4 - back;
  const plot = canvas(width, bottom + 24, group.map((one, place) => `${place + 1}. ${one.name}: ${formatScore(one)}, n = ${one.n}`).join('; '));
  plot.classList.add('board');
  const step = 50 * Math.ceil((high - low) / 300);
  for (let value = step * Math.ceil(low / step); value <= high; value += step) {
    plot.append(line(value === 1000 ? 'middle' : 'axis', x(value), top, x(value), bottom), label('', x(value), bottom + 16, String(value), 'middle'));
  }
  for (const [name, back] of columns) plot.append(label('', at(back), 14, name, 'end'));
  group.forEach((one, place) => {
    const y = top + (place + 0.5) * row;
    const entry = node('g', {});
    const [from, to] = [one.ci95[0] === null ? left : x(one.ci95[0]), one.ci95[1] === null ? width - right : x(one.ci95[1])];
    entry.append(label('', 24, y + 5, `${place + 1}.`, 'end'), label('name', 34, y + 5, shortened(one.name, 28), 'start'));
    entry.append(line('range', from, y, to, y));
    if (one.ci95[0] === null) entry.append(node('path', { class: 'open', d: `M${from + 7},${y - 6} L${from},${y} L${from + 7},${y + 6}` }));
    if (one.ci95[1] === null) entry.append(node('path', { class: 'open', d: `M${to - 7},${y - 6} L${to},${y} L${to - 7},${y + 6}` }));
    entry.append(node('circle', { class: 'mark', cx: x(one.points), cy: y, r: 6 }));
    const figures = [Math.round(one.points), bounds(one.ci95), one.wins, one.losses, one.ties - one.both_bad, one.both_bad, one.n];
    figures.forEach((figure, k) => entry.append(label(k ? '' : 'name', at(columns[k][1]), y + 5, String(figure), 'end')));
    entry.append(titled(`${one.name}: ${formatScore(one)}; won ${Math.round(100 * one.score)} %, ties half, n = ${one.n} over ${one.prompts} prompts or pairs`));
    plot.append(entry);
  });
  return plot;
}

function formatScore(one) {
  return `${Math.round(one.points)} points (${bounds(one.ci95)})`;
}

function bounds([low, high]) {
  if (low === null && high === null) return 'open';
  if (low === null) return `≤ ${Math.round(high)}`;
  return high === null ? `≥ ${Math.round(low)}` : `${Math.round(low)} to ${Math.round(high)}`;
}

function canvas(width, height, description) {
  const plot = node('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img' });
  plot.append(titled(description));
  return plot;
}

function node(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, typeof value === 'number' ? value.toFixed(2) : value);
  return element;
}

function line(kind, x1, y1, x2, y2) {
  return node('line', { class: kind, x1, y1, x2, y2 });
}

function label(kind, x, y, text, anchor) {
  const element = node('text', { class: kind, x, y, 'text-anchor': anchor });
  element.textContent = text;
  return element;
}

function titled(text) {
  const element = node('title', {});
  element.textContent = text.trim();
  return element;
}

function nothing() {
  const text = document.createElement('p');
  text.className = 'quiet';
  text.textContent = 'Nothing yet.';
  return text;
}

function sum(bins) {
  return bins.reduce((total, bin) => total + bin.judgements, 0);
}

function niceCount(value) {
  return Number.isInteger(value) ? String(value) : value.toFixed(1);
}

function shortened(text, most = 18) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

function moment(seconds) {
  return new Date(1000 * seconds).toLocaleString('en-GB', { day: 'numeric', month: 'short', hour: '2-digit', minute: '2-digit' });
}

function span(seconds) {
  if (seconds < 3600) return seconds === 60 ? 'a minute' : `${Math.round(seconds / 60)} minutes`;
  if (seconds < 86_400) return seconds === 3600 ? 'an hour' : `${Math.round(seconds / 3600)} hours`;
  return seconds === 86_400 ? 'a day' : `${Math.round(seconds / 86_400)} days`;
}
