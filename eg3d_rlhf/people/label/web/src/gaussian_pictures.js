// Draws Gaussians where there is no graphics card: workers render the images, this shows them. While the camera moves they are coarser.

import { DataTexture, Group, LinearFilter, RGBAFormat, UnsignedByteType } from 'three';

import { GaussianWorkers } from './gaussian_workers.js';
import { Sheet } from './sheet.js';

const LEAST = 0.2; // share of the pixels along each axis that is left while moving
const AIM = 90; // milliseconds for an image while moving

export class GaussianPictures {
  scale = 0.5; // share of the pixels along each axis while moving
  shapes = new Map(); // id -> shape

  constructor(renderer, changed) {
    this.changed = changed;
    this.workers = new GaussianWorkers(2, (message) => this.receive(message)); // one for each side
    this.sheet = new Sheet(renderer);
  }

  async keep(data) {
    const bytes = 4 * data.byteLength;
    const { id, count, ball } = await this.workers.read(data, true);
    const root = new Group(); // where it stands; nothing hangs on it
    root.matrixAutoUpdate = false;
    const shape = { id, root, count, ball, bytes, texture: null, drawn: null, asked: null, wanted: null };
    this.shapes.set(id, shape);
    return shape;
  }

  drop(shape) {
    this.shapes.delete(shape.id);
    this.workers.tell(shape.id);
    shape.texture?.dispose();
  }

  end() {
    this.workers.end();
  }

  receive({ id, picture, camera, milliseconds }) {
    const shape = this.shapes.get(id);
    if (!shape) return;
    const [width, height] = camera.size;
    if (shape.texture && (shape.texture.image.width !== width || shape.texture.image.height !== height)) {
      shape.texture.dispose();
      shape.texture = null;
    }
    shape.texture ??= Object.assign(new DataTexture(null, width, height, RGBAFormat, UnsignedByteType), { magFilter: LinearFilter, minFilter: LinearFilter });
    shape.texture.image.data = picture;
    shape.texture.needsUpdate = true;
    [shape.drawn, shape.asked] = [camera.name, null];
    if (camera.moving) this.scale = Math.min(1, Math.max(LEAST, this.scale * Math.min(1.3, Math.max(0.6, Math.sqrt(AIM / milliseconds)))));
    if (shape.wanted) this.ask(shape, shape.wanted);
    shape.seen?.();
    this.changed();
  }

  // Requests an image once the previous request has been answered.
  ask(shape, camera) {
    shape.wanted = camera;
    if (shape.asked || shape.drawn === camera.name) return;
    shape.asked = camera.name;
    this.workers.tell(shape.id, { camera });
  }

  settled(shape) {
    return Boolean(shape.wanted) && shape.drawn === shape.wanted.name;
  }

  // Draws ahead of its use what will be seen first; the promise waits for it.
  foresee(shape, camera, size) {
    return new Promise((resolve) => {
      shape.seen = resolve;
      this.ask(shape, this.seen(shape, camera, size, false));
    });
  }

  seen(shape, camera, size, moving) {
    const share = moving ? this.scale : 1;
    const [width, height] = [size.width, size.height].map((pixels) => Math.max(1, Math.round(pixels * share)));
    const view = camera.matrixWorldInverse.clone().multiply(shape.root.matrix).toArray();
    const { elements } = camera.projectionMatrix;
    const focal = [(elements[0] * width) / 2, (elements[5] * height) / 2];
    const edge = [1.3 / elements[0], 1.3 / elements[5]];
    return { view, focal, size: [width, height], edge, moving, name: [...view, ...focal, width, height].join(' ') };
  }

  paint(shape, camera, look, size) {
    this.ask(shape, this.seen(shape, camera, size, look.moving));
    if (shape.texture) this.sheet.lay(shape.texture, camera);
    return 2 * shape.count;
  }
}
