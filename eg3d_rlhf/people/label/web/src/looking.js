// Everything that changes how the pair is looked at, and the note of what was used, which goes with the answer.

import { calm } from './theme.js';

const TOGGLES = ['normals', 'wireframe', 'clay', 'render'];
const SHOWN_FOR = { normals: ['surface', 'textured'], wireframe: ['surface', 'textured'], clay: ['textured'], play: ['video'] }; // tool: kinds of shapes

export class Looking {
  views = new Set();
  pair = null;

  constructor(ui, viewer, withPictures) {
    Object.assign(this, { ui, viewer, withPictures });
  }

  // A pair is on its way, or none: as at the start again, with the toggles as they are.
  begin(pair) {
    this.pair = pair;
    this.views = new Set([this.start, ...TOGGLES.filter((name) => this.on(name))]);
    this.ui.view(this.start);
  }

  // The view that a pair opens with; films know no other than their own.
  get start() {
    return this.films ? 'front' : this.viewer.orbit.start;
  }

  show(shapes) {
    if (shapes) this.arrange([shapes.left.kind, shapes.right.kind]);
    this.viewer.show(shapes);
    this.ui.note(shapes);
    this.showRenders();
  }

  // Offers the tools that mean something for shapes of these kinds.
  arrange(kinds) {
    for (const [tool, theirs] of Object.entries(SHOWN_FOR)) this.ui[tool].hidden = !theirs.some((kind) => kinds.includes(kind));
    this.films = kinds.every((kind) => kind === 'video');
    for (const button of document.querySelectorAll('[data-view]')) button.hidden = this.films && button.dataset.view !== 'front';
  }

  on(name) {
    return !this.ui[name].hidden && this.ui[name].getAttribute('aria-pressed') === 'true';
  }

  moved(view) {
    if (view !== 'zoom') this.ui.view(null);
    this.views.add(view);
    this.viewer.turning = null;
    if (!['zoom', 'pan'].includes(view)) this.viewer.play(false);
    this.viewer.request();
  }

  orbit(yaw, pitch) {
    this.viewer.orbit.orbit(yaw, pitch);
    this.moved('orbit');
  }

  zoom(factor) {
    this.viewer.orbit.zoom(factor);
    this.moved('zoom');
  }

  pan(x, y) {
    this.viewer.orbit.pan(x, y);
    this.moved('pan');
  }

  reset() {
    this.viewer.play(false);
    this.viewer.orbit.reset();
    this.moved(this.start);
    this.ui.view(this.start);
  }

  view(name) {
    if (this.films && name !== 'front') return; // nobody knows which way a table turns
    this.viewer.play(false);
    this.views.add(name);
    this.ui.view(name);
    this.viewer.turnTo(name, calm());
  }

  normals() {
    this.shade('normals');
  }

  wireframe() {
    this.shade('wireframe');
  }

  clay() {
    this.shade('clay');
  }

  shade(name) {
    if (this.ui[name].hidden) return;
    this.viewer.look[name] = this.toggle(name);
    this.viewer.request(false);
  }

  play() {
    if (this.ui.play.hidden) return;
    this.viewer.play(this.ui.play.getAttribute('aria-pressed') !== 'true');
  }

  // The videos have started or stopped.
  playing(whether) {
    this.ui.play.setAttribute('aria-pressed', String(whether));
    if (whether) this.views.add('play');
  }

  render() {
    if (!this.withPictures) return;
    this.toggle('render');
    this.showRenders();
  }

  toggle(name) {
    const on = !this.on(name);
    this.ui[name].setAttribute('aria-pressed', String(on));
    if (on) this.views.add(name);
    return on;
  }

  showRenders() {
    const on = this.on('render') && this.viewer.shown !== null;
    for (const side of ['left', 'right']) {
      const image = this.ui[`${side}Render`];
      image.hidden = !on;
      if (on) image.src = `/api/renders/${encodeURIComponent(this.pair[side])}`;
      else image.removeAttribute('src');
    }
  }
}
