// Everything that changes how the pair is looked at, and the note of what was used, which goes with the answer.

import { calm } from './theme.js';

const TOGGLES = ['normals', 'wireframe', 'render'];

export class Looking {
  views = new Set();
  pair = null;

  constructor(ui, viewer, withPictures) {
    Object.assign(this, { ui, viewer, withPictures });
  }

  // A pair is on its way, or none: from the front again, with the toggles as they are.
  begin(pair) {
    this.pair = pair;
    this.views = new Set(['front', ...TOGGLES.filter((name) => this.on(name))]);
    this.ui.view('front');
  }

  show(shapes) {
    this.viewer.show(shapes);
    this.showRenders();
  }

  on(name) {
    return this.ui[name].getAttribute('aria-pressed') === 'true';
  }

  moved(view) {
    if (view !== 'zoom') this.ui.view(null);
    this.views.add(view);
    this.viewer.turning = null;
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
    this.viewer.orbit.reset();
    this.moved('front');
    this.ui.view('front');
  }

  view(name) {
    this.views.add(name);
    this.ui.view(name);
    this.viewer.turnTo(name, calm());
  }

  normals() {
    this.viewer.normals = this.toggle('normals');
    this.viewer.request();
  }

  wireframe() {
    this.viewer.wireframe = this.toggle('wireframe');
    this.viewer.request();
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
