// How fast the annotator works, and how long the rest will take.

import { t } from './texts.js';

const LATEST = 30; // answers that count
const BREAK = 180_000; // milliseconds: a longer gap is a pause, not slow work

export class Pace {
  gaps = [];
  last = null;

  answered(now = Date.now()) {
    if (this.last !== null && now - this.last < BREAK) this.gaps = [...this.gaps, now - this.last].slice(-LATEST);
    this.last = now;
  }

  // Judgements per hour: of this sitting once there are three, else of the last hour; null where nothing is known.
  perHour(lastHour) {
    if (this.gaps.length < 3) return lastHour >= 3 ? lastHour : null;
    return 3_600_000 / (this.gaps.reduce((sum, gap) => sum + gap, 0) / this.gaps.length);
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
