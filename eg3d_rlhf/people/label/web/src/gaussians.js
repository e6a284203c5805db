// Draws Gaussians (GSP1). A worker reads the files and keeps them in order; while the camera moves they are drawn coarser where that is slow,
// and with the order at hand, at rest sharp and in the exact order.

import {
  BufferAttribute, DataTexture, GLSL3, Group, HalfFloatType, InstancedBufferGeometry, LinearFilter, Matrix4, Mesh, NearestFilter, RedIntegerFormat, RGBAIntegerFormat,
  Scene, ShaderMaterial, UnsignedByteType, UnsignedIntType, Vector2, Vector3, WebGLRenderTarget,
} from 'three';

import { PER_ROW, REST_PER_ROW, REST_TEXELS } from './gaussian_file.js';
import { BATCH, defines, FRAGMENT, VERTEX } from './gaussian_shading.js';
import { GaussianWorkers } from './gaussian_workers.js';
import { OVER, Sheet } from './sheet.js';
import { t } from './texts.js';

const LEAST = 0.25; // share of the pixels along each axis that is left while moving
const [SLOW, FAST] = [50, 25]; // milliseconds between two drawings: then coarser, then finer

export class Gaussians {
  scale = 1; // share of the pixels along each axis while moving
  shapes = new Map(); // id -> shape

  // changed(): a better image can be drawn.
  constructor(renderer, changed) {
    Object.assign(this, { renderer, changed });
    this.workers = new GaussianWorkers(1, (message) => this.receive(message));
    const fine = renderer.extensions.has('EXT_color_buffer_float') || renderer.extensions.has('EXT_color_buffer_half_float');
    this.target = new WebGLRenderTarget(1, 1, { type: fine ? HalfFloatType : UnsignedByteType, depthBuffer: false, magFilter: LinearFilter, minFilter: LinearFilter });
    this.batch = quads();
    this.scene = new Scene();
    this.sheet = new Sheet(renderer);
  }

  async keep(data) {
    const { id, ...found } = await this.workers.read(data, false);
    const shape = this.made(id, found);
    this.shapes.set(id, shape);
    return shape;
  }

  made(id, { count, degree, splats, rest, ball }) {
    const rows = Math.ceil(count / PER_ROW);
    const order = texture(new Uint32Array(PER_ROW * rows), PER_ROW, rows, RedIntegerFormat, 'R32UI');
    const textures = { splats: texture(splats, 3 * PER_ROW, rows, RGBAIntegerFormat, 'RGBA32UI'), order };
    if (rest) textures.rest = texture(rest, REST_TEXELS[degree] * REST_PER_ROW, Math.ceil(count / REST_PER_ROW), RGBAIntegerFormat, 'RGBA32UI');
    const limit = this.renderer.capabilities.maxTextureSize;
    if (Object.values(textures).some(({ image }) => image.width > limit || image.height > limit)) throw new Error(t('error.large'));
    const bytes = 12 * count + Object.values(textures).reduce((sum, { image }) => sum + image.data.byteLength, 0);
    for (const one of [textures.splats, textures.rest]) if (one) one.onUpdate = () => { one.image.data = null; }; // it is on the GPU now
    for (const one of Object.values(textures)) this.renderer.initTexture(one);
    const geometry = new InstancedBufferGeometry();
    geometry.setIndex(this.batch);
    geometry.instanceCount = Math.ceil(count / BATCH);
    const material = new ShaderMaterial({
      ...OVER, glslVersion: GLSL3, vertexShader: VERTEX, fragmentShader: FRAGMENT, defines: defines(degree),
      uniforms: {
        splats: { value: textures.splats }, order: { value: order }, rest: { value: textures.rest ?? null }, count: { value: count },
        viewport: { value: new Vector2() }, eye: { value: new Vector3() },
      },
    });
    const root = new Group().add(Object.assign(new Mesh(geometry, material), { frustumCulled: false }));
    root.matrixAutoUpdate = false;
    return { id, root, geometry, material, textures, count, ball, bytes, wanted: null, sorted: null, asked: null };
  }

  drop(shape) {
    this.shapes.delete(shape.id);
    this.workers.tell(shape.id);
    shape.geometry.setIndex(null); // shared
    shape.geometry.dispose();
    shape.material.dispose();
    for (const one of Object.values(shape.textures)) one.dispose();
  }

  end() {
    this.workers.end();
    this.target.dispose();
  }

  // ---- the order

  receive({ id, order, direction }) {
    const shape = this.shapes.get(id);
    if (!shape) return;
    shape.textures.order.image.data = order;
    shape.textures.order.needsUpdate = true;
    [shape.sorted, shape.asked] = [direction, null];
    if (shape.wanted) this.sort(shape, shape.wanted);
    shape.seen?.();
    this.changed();
  }

  // Asks for the order along a direction, once the one asked for before has come.
  sort(shape, direction) {
    shape.wanted = direction;
    if (shape.asked || equal(shape.sorted, direction)) return;
    shape.asked = direction;
    this.workers.tell(shape.id, { direction });
  }

  // True if the last drawing had the order of its camera.
  settled(shape) {
    return equal(shape.sorted, shape.wanted);
  }

  // ---- drawing

  // One frame is about to be drawn; after: milliseconds since the one before, null where there was a rest.
  pace(after) {
    if (after === null) return;
    if (after > SLOW) this.scale = Math.max(LEAST, this.scale * 0.8);
    else if (after < FAST) this.scale = Math.min(1, this.scale * 1.1);
  }

  // Puts a shape in order ahead of its use; the promise waits for it.
  foresee(shape, camera) {
    return new Promise((resolve) => {
      shape.seen = resolve;
      this.arrange(shape, camera);
    });
  }

  // Puts a shape in order for a camera; returns what takes it to the camera's coordinates.
  arrange(shape, camera) {
    const view = new Matrix4().multiplyMatrices(camera.matrixWorldInverse, shape.root.matrix);
    const [, , x, , , , y, , , , z] = view.elements; // the third row looks back
    const length = Math.hypot(x, y, z);
    this.sort(shape, [-x / length, -y / length, -z / length].map(Math.fround));
    return view;
  }

  // size: {width, height} in pixels of the screen.
  paint(shape, camera, look, size) {
    const view = this.arrange(shape, camera);
    const share = look.moving ? this.scale : 1;
    const [width, height] = [size.width, size.height].map((pixels) => Math.max(1, Math.round(pixels * share)));
    const { viewport, eye } = shape.material.uniforms;
    viewport.value.set(width, height);
    eye.value.setFromMatrixPosition(view.invert());
    this.draw(shape, camera, size, width, height);
    return 2 * shape.count;
  }

  draw(shape, camera, size, width, height) {
    const { renderer, target } = this;
    if (target.width !== size.width || target.height !== size.height) target.setSize(size.width, size.height);
    target.viewport.set(0, 0, width, height);
    renderer.setRenderTarget(target);
    renderer.setClearColor(0x000000, 0);
    renderer.clear();
    this.scene.add(shape.root);
    renderer.render(this.scene, camera);
    this.scene.remove(shape.root);
    renderer.setRenderTarget(null);
    this.sheet.lay(target.texture, camera, [width / size.width, height / size.height]);
  }
}

function texture(data, width, height, format, internal) {
  const made = new DataTexture(data, width, height, format, UnsignedIntType);
  made.internalFormat = internal;
  made.magFilter = made.minFilter = NearestFilter;
  made.needsUpdate = true;
  return made;
}

// Corners of the quads of one instance; the shader finds the rest by their numbers.
function quads() {
  const index = new Uint16Array(6 * BATCH);
  for (let i = 0; i < BATCH; i += 1) index.set([0, 1, 2, 2, 1, 3].map((corner) => 4 * i + corner), 6 * i);
  return new BufferAttribute(index, 1);
}

function equal(one, other) {
  return Boolean(one && other) && one.every((value, axis) => value === other[axis]);
}
