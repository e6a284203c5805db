// The annotator's pace, and an estimate of the remaining time.

import { t } from './texts.js';

const LATEST = 30; // answers that count
const ENOUGH = 8; // below, nothing is claimed
const KEY = 'eg3d-pace';
const BREAK = 180_000; // milliseconds: a longer gap is a pause, not slow work

export class Pace {
  gaps = readKept();
  last = null;

  answered(now = Date.now()) {
    if (this.last !== null && now - this.last < BREAK) this.gaps = [...this.gaps, now - this.last].slice(-LATEST);
    this.last = now;
    try {
      sessionStorage.setItem(KEY, JSON.stringify(this.gaps));
    } catch { /* full or forbidden: a reload forgets the pace */ }
  }

  // Judgements per hour, reloads included; null until there are enough. A gap counts for five usual ones at most.
  get perHour() {
    if (this.gaps.length < ENOUGH) return null;
    const usual = [...this.gaps].sort((a, b) => a - b)[Math.floor(this.gaps.length / 2)];
    return 3_600_000 / (this.gaps.reduce((sum, gap) => sum + Math.min(gap, 5 * usual), 0) / this.gaps.length);
  }
}

function readKept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY)) ?? [];
  } catch {
    return [];
  }
}

export function paceText(perHour, left) {
  if (!perHour || left <= 0) return '';
  const rounded = perHour >= 100 ? Math.round(perHour / 10) * 10 : Math.round(perHour);
  return t('pace', { rate: rounded, time: duration((left / perHour) * 3600) });
}

export function duration(seconds) {
  if (seconds < 60) return t('duration.moment');
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return t('duration.minutes', { minutes });
  return t(minutes % 60 ? 'duration.both' : 'duration.hours', { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
}
