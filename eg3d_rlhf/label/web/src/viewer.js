// Draws the two shapes with one camera and one shading into two parts of one canvas. Draws only when something has changed.

import { BufferAttribute, BufferGeometry, Color, DoubleSide, Mesh, PerspectiveCamera, Scene, ShaderMaterial, WebGLRenderer, WebGLRenderTarget } from 'three';

import { FIELD_OF_VIEW, OrbitCamera } from './camera.js';
import { FRAGMENT, LINE_FRAGMENT, VERTEX } from './shading.js';

const SIDES = ['left', 'right'];
const TURN = 180; // milliseconds to a canonical view

export class Viewer {
  orbit = new OrbitCamera();
  cameras = { left: null, right: null }; // what each side was last drawn with: {view, projection}, 16 numbers each
  triangles = { left: 0, right: 0 };
  wireframe = false;
  normals = false;

  constructor(canvas, panes) {
    this.canvas = canvas;
    this.panes = panes; // {left, right}: elements whose rectangles are drawn
    this.renderer = new WebGLRenderer({ canvas, context: context(canvas) });
    this.renderer.setScissorTest(true);
    this.renderer.autoClear = false;
    this.camera = new PerspectiveCamera(FIELD_OF_VIEW, 1, 0.1, 10);
    this.surface = new ShaderMaterial({
      vertexShader: VERTEX, fragmentShader: FRAGMENT, side: DoubleSide, uniforms: { normals: { value: 0 } },
      polygonOffset: true, polygonOffsetFactor: 1, polygonOffsetUnits: 1,
    });
    this.lines = new ShaderMaterial({ vertexShader: VERTEX, fragmentShader: LINE_FRAGMENT, wireframe: true });
    this.scene = new Scene();
    this.mesh = this.scene.add(new Mesh(new BufferGeometry(), this.surface)).children[0];
    this.wires = this.scene.add(new Mesh(this.mesh.geometry, this.lines)).children[1];
    this.backstage = new WebGLRenderTarget(1, 1);
    this.shown = null;
    new ResizeObserver(() => this.request()).observe(canvas);
    canvas.addEventListener('webglcontextrestored', () => this.request());
  }

  // A decoded mesh as something that can be drawn at once.
  keep(mesh) {
    const geometry = new BufferGeometry();
    geometry.setAttribute('position', new BufferAttribute(mesh.positions, 3));
    geometry.setAttribute('normal', new BufferAttribute(mesh.normals, 3));
    geometry.setIndex(new BufferAttribute(mesh.indices, 1));
    const shape = { geometry, minimum: mesh.minimum, maximum: mesh.maximum, triangles: mesh.indices.length / 3 };
    this.upload(shape);
    return shape;
  }

  drop(shape) {
    shape.geometry.dispose();
  }

  // Draws one triangle into a single pixel off the screen, which takes the geometry to the GPU.
  upload(shape) {
    shape.geometry.setDrawRange(0, 3);
    this.renderer.setRenderTarget(this.backstage);
    this.renderer.clear();
    this.render(shape);
    this.renderer.setRenderTarget(null);
    shape.geometry.setDrawRange(0, Infinity);
  }

  // Shows a pair from the front; null shows nothing.
  show(pair) {
    this.turning = null;
    this.shown = pair;
    if (pair) {
      const low = pair.left.minimum.map((value, axis) => Math.min(value, pair.right.minimum[axis]));
      const high = pair.left.maximum.map((value, axis) => Math.max(value, pair.right.maximum[axis]));
      this.orbit.frame(low, high, this.size().aspect);
    }
    this.draw();
  }

  // Turns to a canonical view; at once: without the short movement that helps to keep one's bearings.
  turnTo(name, atOnce) {
    const { yaw, pitch } = this.orbit;
    this.orbit.look(name);
    const [toYaw, toPitch] = [nearest(this.orbit.yaw, yaw), this.orbit.pitch];
    const start = performance.now();
    const turn = (this.turning = () => {
      if (turn !== this.turning) return;
      const share = atOnce ? 1 : Math.min(1, (performance.now() - start) / TURN);
      const eased = share * share * (3 - 2 * share);
      this.orbit.yaw = yaw + (toYaw - yaw) * eased;
      this.orbit.pitch = pitch + (toPitch - pitch) * eased;
      this.draw();
      if (share < 1) requestAnimationFrame(turn);
    });
    turn();
  }

  // Draws with the next frame.
  request() {
    this.requested ??= requestAnimationFrame(() => {
      this.requested = null;
      this.draw();
    });
  }

  size() {
    const { clientWidth, clientHeight } = this.panes.left;
    return { width: clientWidth, height: clientHeight, aspect: clientWidth / Math.max(clientHeight, 1) };
  }

  draw() {
    const { width, height, aspect } = this.size();
    const box = this.canvas.getBoundingClientRect();
    if (!width || !height || !box.width) return;
    this.resize(box);
    this.fill('--page', 0, 0, box.width, box.height);
    if (this.shown) this.orbit.apply(this.camera, aspect);
    for (const side of SIDES) {
      if (this.panes[side].hidden) continue; // one shape at a time
      const pane = this.panes[side].getBoundingClientRect();
      const [x, y] = [pane.left - box.left, box.bottom - pane.top - height]; // WebGL counts from the bottom
      this.fill('--pane', x, y, width, height); // both sides get the left one's size
      if (!this.shown) continue;
      this.render(this.shown[side]);
      this.triangles[side] = this.renderer.info.render.triangles;
      this.cameras[side] = { view: this.camera.matrixWorldInverse.toArray(), projection: this.camera.projectionMatrix.toArray() };
    }
  }

  render(shape) {
    this.mesh.geometry = shape.geometry;
    this.wires.geometry = shape.geometry;
    this.wires.visible = this.wireframe;
    this.surface.uniforms.normals.value = this.normals ? 1 : 0;
    this.renderer.render(this.scene, this.camera);
  }

  resize(box) {
    const ratio = Math.min(devicePixelRatio, 2);
    const key = `${box.width} ${box.height} ${ratio}`;
    if (key === this.sized) return;
    this.sized = key;
    this.renderer.setPixelRatio(ratio);
    this.renderer.setSize(box.width, box.height, false);
  }

  // Fills a rectangle, in pixels from the bottom left, with one of the page's colours.
  fill(colour, x, y, width, height) {
    const background = getComputedStyle(this.panes.left).getPropertyValue(colour).trim() || '#ffffff';
    this.renderer.setClearColor(new Color(background), 1);
    this.renderer.setViewport(x, y, width, height);
    this.renderer.setScissor(x, y, width, height);
    this.renderer.clear();
  }
}

// The angle that means the same as `angle` and lies nearest to `from`.
function nearest(angle, from) {
  return angle + 2 * Math.PI * Math.round((from - angle) / (2 * Math.PI));
}

// Smooth edges where a GPU draws; where the processor has to, they would halve the speed.
function context(canvas) {
  const found = canvas.getContext('webgl2', { alpha: false, stencil: false, antialias: !software(), powerPreference: 'high-performance' });
  if (!found) throw new Error('Viewer: expected WebGL 2, got none.');
  return found;
}

function software() {
  const probe = document.createElement('canvas').getContext('webgl2');
  const names = probe?.getExtension('WEBGL_debug_renderer_info');
  const renderer = names ? probe.getParameter(names.UNMASKED_RENDERER_WEBGL) : '';
  probe?.getExtension('WEBGL_lose_context')?.loseContext();
  return /swiftshader|llvmpipe|software|basic render/i.test(renderer);
}
