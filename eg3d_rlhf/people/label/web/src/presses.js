// Decides which press of a key, mouse or finger may answer: one that began after its pair had been on the screen for long enough to be seen, and
// after a pause. What follows sooner belongs to the burst on whose pair it began: a double click, a double tap, two keys at once.

const SEEN = 200; // milliseconds on the screen: nobody sees and decides faster
// Longer than slips, which come 120 to 300 ms after the press before, and shorter than the 500 ms between deliberate answers by keys. A
// slow double click takes longer than a key that bounces, and a mouse does not reach another button so fast.
const PAUSE = { key: 350, pointer: 450 }; // milliseconds
const KEPT = 8; // presses that a click may still belong to

export class Presses {
  scene = 0; // grows with every change of what is on the screen
  since = Infinity; // when that came there; Infinity: it is on its way
  last = -Infinity; // the burst's latest press
  begun = []; // the latest presses
  current = null; // the one that is being handled

  constructor() {
    const listen = (name, act) => addEventListener(name, act, { capture: true });
    listen('pointerdown', (event) => this.begin('pointer', event));
    listen('keydown', (event) => this.key(event));
    listen('click', (event) => this.click(event));
  }

  // Something else comes to the screen; returns its number.
  change() {
    this.since = Infinity;
    this.scene += 1;
    return this.scene;
  }

  // It is there.
  shown(scene) {
    if (scene === this.scene) this.since = performance.now();
  }

  // True, once, if the press that is being handled may act. seen: on what must have been seen; opens: a dialog, where a key may follow at once.
  take({ seen = true, opens = false } = {}) {
    const press = this.current;
    if (!press || press.taken) return false;
    press.taken = true;
    if (!opens || press.kind !== 'key') this.last = Math.max(this.last, press.handled);
    return press.paused && (!seen || (press.scene === this.scene && press.at - this.since >= SEEN));
  }

  begin(kind, event) {
    const at = event.timeStamp;
    const paused = at - this.last >= PAUSE[kind];
    if (!paused) this.last = Math.max(this.last, at);
    this.current = { kind, at, paused, handled: at, scene: this.scene, on: button(event), taken: false };
    this.begun = [...this.begun, this.current].slice(-KEPT);
  }

  key(event) {
    if (!event.repeat) {
      this.begin('key', event);
      return;
    }
    this.current = null;
    if (event.timeStamp - this.last < PAUSE.key) this.last = event.timeStamp;
    if (event.key === 'Enter' && button(event)) event.preventDefault(); // held, it would click again and again
  }

  // A click belongs to the press that it ends. One without, as screen readers and voice control make, is a press itself.
  click(event) {
    if (!event.isTrusted) return; // a script's, as the number keys of a dialog make: the key is the press
    const kind = event.detail === 0 ? 'key' : 'pointer';
    const press = this.begun.findLast((one) => one.kind === kind && one.on === button(event) && !one.taken);
    if (!press) {
      this.begin(kind, event);
      return;
    }
    press.handled = event.timeStamp;
    this.current = press;
  }
}

function button(event) {
  return event.target.closest?.('button') ?? null;
}
