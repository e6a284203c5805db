// Time to an answer: from the pair being drawn, while the page is in view.

export class Stopwatch {
  spent = 0; // milliseconds
  since = null;

  constructor() {
    document.addEventListener('visibilitychange', () => {
      if (document.hidden) this.hold();
      else if (this.running) this.since = performance.now();
    });
  }

  start() {
    this.spent = 0;
    this.running = true;
    this.since = performance.now();
  }

  hold() {
    if (this.since !== null) this.spent += performance.now() - this.since;
    this.since = null;
  }

  stop() {
    this.hold();
    this.running = false;
    return Math.round(this.spent);
  }

  get milliseconds() {
    return this.spent + (this.since === null ? 0 : performance.now() - this.since);
  }
}
