// Draws the two shapes with one camera and one light into two parts of one canvas, whatever their kind. Draws only when something has changed.

import { Color, Matrix4, PerspectiveCamera, WebGLRenderer, WebGLRenderTarget } from 'three';

import { FIELD_OF_VIEW, OrbitCamera } from './camera.js';
import { GaussianPictures } from './gaussian_pictures.js';
import { Gaussians } from './gaussians.js';
import { Surfaces } from './surfaces.js';
import { Textured } from './textured.js';
import { calm } from './theme.js';
import { Videos } from './videos.js';

const SIDES = ['left', 'right'];
const TURN = 180; // milliseconds to a canonical view
const REST = 160; // milliseconds without a movement after which everything is drawn as well as it can be
const PAUSE = 400; // milliseconds between two drawings that tell nothing of the speed

export class Viewer {
  cameras = { left: null, right: null }; // what each side was last drawn with: {view, projection}, 16 numbers each
  triangles = { left: 0, right: 0 };
  places = { left: null, right: null }; // where each shape stands in the camera's world, 16 numbers each
  look = { wireframe: false, normals: false, clay: false, moving: false };
  painters = {}; // kind -> what keeps, draws and drops its shapes
  drawn = 0; // when, performance.now()

  // up: the axis of files that points up, 'y' or 'z'; start: the view that pairs open with; on: {lost(): what was on the GPU is gone, playing(whether)}
  constructor(canvas, panes, up, start, on) {
    this.orbit = new OrbitCamera(start);
    this.upright = up === 'z' ? new Matrix4().makeRotationX(-Math.PI / 2) : new Matrix4();
    this.canvas = canvas;
    this.panes = panes; // {left, right}: elements whose rectangles are drawn
    this.on = on;
    this.gpu = !software();
    this.renderer = new WebGLRenderer({ canvas, context: context(canvas, this.gpu) });
    this.renderer.setScissorTest(true);
    this.renderer.autoClear = false;
    this.camera = new PerspectiveCamera(FIELD_OF_VIEW, 1, 0.1, 10);
    this.painters.surface = new Surfaces(this.renderer, new WebGLRenderTarget(1, 1));
    this.shown = null;
    new ResizeObserver(() => this.request()).observe(canvas);
    canvas.addEventListener('webglcontextrestored', () => {
      this.painters.gaussians?.end();
      this.painters = { surface: this.painters.surface };
      this.on.lost();
    });
  }

  // The painter of a kind of shapes, made for the first of them.
  painter(kind) {
    this.painters[kind] ??= {
      textured: () => new Textured(this.renderer, this.painters.surface, this.gpu),
      gaussians: () => new (this.gpu ? Gaussians : GaussianPictures)(this.renderer, () => this.request(false)),
      video: () => new Videos(this.panes, (playing) => this.played(playing)),
    }[kind]();
    return this.painters[kind];
  }

  // The bytes of a file as something that can be drawn at once: {kind, ball, bytes, ...}.
  async keep(data) {
    const kind = kindOf(data);
    const shape = Object.assign(await this.painter(kind).keep(data, this.camera), { kind });
    await this.foresee(shape);
    return shape;
  }

  // Prepares the first view, in case the pair is framed by balls.
  async foresee(shape) {
    const { width, height, aspect } = this.size();
    const painter = this.painters[shape.kind];
    if (!painter.foresee || !width || !height) return;
    place(shape, false, this.upright);
    const [orbit, camera] = [new OrbitCamera(this.orbit.start), new PerspectiveCamera(FIELD_OF_VIEW)];
    orbit.frameBall([0, 0, 0], 1, aspect);
    orbit.apply(camera, aspect);
    await painter.foresee(shape, camera, this.pixels(width, height));
  }

  drop(shape) {
    this.painters[shape.kind]?.drop(shape);
  }

  // Shows a pair from the front; null shows nothing.
  show(pair) {
    this.turning = null;
    this.shown = pair;
    this.look.moving = false;
    if (pair) this.frame(pair);
    const films = Object.fromEntries(SIDES.filter((side) => pair?.[side].kind === 'video' && !this.panes[side].hidden).map((side) => [side, pair[side]]));
    if (Object.keys(films).length || this.painters.video) this.painter('video').show(films, calm());
    this.draw();
  }

  // One camera for both. Isosurfaces of one world keep their sizes and places; other shapes are moved and scaled, never distorted,
  // so that the ball around each is the ball of radius 1 about the origin.
  frame({ left, right }) {
    const { aspect } = this.size();
    const world = left.kind === 'surface' && right.kind === 'surface';
    for (const shape of [left, right]) place(shape, world, this.upright);
    if (world) {
      const low = left.minimum.map((value, axis) => Math.min(value, right.minimum[axis]));
      this.orbit.frame(low, left.maximum.map((value, axis) => Math.max(value, right.maximum[axis])), aspect);
    } else this.orbit.frameBall([0, 0, 0], 1, aspect);
    this.orbit.flat = left.kind === 'video' && right.kind === 'video';
    if (this.orbit.flat) this.orbit.look('front');
  }

  // The table turns by itself: the camera's angle follows it.
  play(whether) {
    const { video } = this.painters;
    if (!video?.first || whether === video.playing) return;
    if (whether) video.play();
    else {
      this.orbit.yaw = -2 * Math.PI * video.turn;
      video.pause();
    }
  }

  played(playing) {
    this.on.playing(playing);
    const step = () => {
      if (!this.painters.video.playing) return;
      this.painters.video.draw(this.orbit);
      requestAnimationFrame(step);
    };
    if (playing) step();
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
      if (this.painters.gaussians) this.move();
      this.draw();
      if (share < 1) requestAnimationFrame(turn);
    });
    turn();
  }

  // Draws with the next frame; moving: the camera is on its way, so quickly before sharply.
  request(moving = true) {
    if (moving && this.painters.gaussians) this.move();
    this.requested ??= requestAnimationFrame(() => {
      this.requested = null;
      this.draw();
    });
  }

  move() {
    this.look.moving = true;
    clearTimeout(this.resting);
    this.resting = setTimeout(() => {
      this.look.moving = false;
      this.request(false);
    }, REST);
  }

  // True if the screen shows the final quality.
  get settled() {
    const still = !this.requested && !this.look.moving;
    return still && SIDES.every((side) => this.shown?.[side].kind !== 'gaussians' || this.painters.gaussians.settled(this.shown[side]));
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
    this.pace();
    this.painters.video?.draw(this.orbit);
    for (const side of SIDES) {
      if (this.panes[side].hidden) continue; // one shape at a time
      const pane = this.panes[side].getBoundingClientRect();
      const [x, y] = [pane.left - box.left, box.bottom - pane.top - height]; // WebGL counts from the bottom
      this.fill('--pane', x, y, width, height); // both sides get the left one's size
      if (!this.shown) continue;
      const { kind } = this.shown[side];
      if (kind !== 'video') this.triangles[side] = this.painters[kind].paint(this.shown[side], this.camera, this.look, this.pixels(width, height));
      this.places[side] = this.shown[side].root?.matrix.toArray() ?? null;
      this.cameras[side] = { view: this.camera.matrixWorldInverse.toArray(), projection: this.camera.projectionMatrix.toArray() };
    }
  }

  pixels(width, height) {
    const ratio = this.renderer.getPixelRatio();
    return { width: Math.round(width * ratio), height: Math.round(height * ratio) };
  }

  pace() {
    const now = performance.now();
    const after = now - this.drawn;
    this.drawn = now;
    this.painters.gaussians?.pace?.(this.look.moving && after < PAUSE ? after : null);
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

// Puts a shape where its own coordinates say, or its ball where the ball of radius 1 about the origin is.
function place({ root, ball }, world, upright) {
  if (!root) return;
  const scale = world ? 1 : 1 / ball.radius;
  root.matrix.makeScale(scale, scale, scale);
  if (!world) root.matrix.multiply(upright).multiply(new Matrix4().makeTranslation(...ball.centre.map((value) => -value)));
  root.matrixWorldNeedsUpdate = true;
}

// Kind of a file, by its first bytes.
function kindOf(data) {
  const [first, second] = data.byteLength < 8 ? [0, 0] : new Uint32Array(data, 0, 2);
  if (first === 0x46546c67) return 'textured'; // 'glTF'
  if (first === 0x31505347) return 'gaussians'; // 'GSP1'
  if (second === 0x70797466) return 'video'; // 'ftyp'
  return 'surface';
}

// The angle that means the same as `angle` and lies nearest to `from`.
function nearest(angle, from) {
  return angle + 2 * Math.PI * Math.round((from - angle) / (2 * Math.PI));
}

// Smooth edges where a GPU draws; where the processor has to, they would halve the speed.
function context(canvas, smooth) {
  const found = canvas.getContext('webgl2', { alpha: false, stencil: false, antialias: smooth, powerPreference: 'high-performance' });
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
