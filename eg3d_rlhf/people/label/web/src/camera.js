// The one camera that looks at both shapes: a turn about the vertical axis, a tilt, a distance and the point looked at.
// World axes: y up, shapes face +z.

export const FIELD_OF_VIEW = 30; // degrees, vertical

export const VIEWS = { // name: [yaw, pitch] in radians; yaw > 0 looks from the viewer's right, pitch > 0 from above
  front: [0, 0],
  left: [-Math.PI / 2, 0],
  right: [Math.PI / 2, 0],
  back: [Math.PI, 0],
  above: [0, Math.PI / 2],
  below: [0, -Math.PI / 2],
};

const STRAIGHT = Math.PI / 2;

export class OrbitCamera {
  yaw = 0;
  pitch = 0;
  distance = 4;
  target = [0, 0, 0];
  centre = [0, 0, 0];
  radius = 1;
  share = 1;
  start = 'front'; // of VIEWS: what is framed is looked at from there
  flat = false; // images, not shapes: they are moved in their plane whatever the turn

  constructor(start = 'front') {
    this.start = start;
  }

  // Frames the box that holds both shapes. aspect: width / height of a viewport.
  frame(minimum, maximum, aspect) {
    const half = Math.hypot(...minimum.map((low, axis) => maximum[axis] - low)) / 2 || 1;
    this.frameBall(minimum.map((low, axis) => (low + maximum[axis]) / 2), half, aspect, 0.86); // shapes rarely fill the corners of their box
  }

  // Frames a ball; share: of its radius that must fit.
  frameBall(centre, radius, aspect, share = 1.03) {
    Object.assign(this, { centre, radius, aspect, share });
    this.reset();
  }

  reset() {
    [this.yaw, this.pitch] = VIEWS[this.start];
    this.target = [...this.centre];
    this.distance = this.fitting();
  }

  // Distance at which the framed ball fits into the viewport.
  fitting() {
    const half = (FIELD_OF_VIEW / 360) * Math.PI;
    const narrow = Math.min(half, Math.atan(Math.tan(half) * this.aspect));
    return (this.share * this.radius) / Math.sin(narrow);
  }

  look(view) {
    [this.yaw, this.pitch] = VIEWS[view];
  }

  orbit(yaw, pitch) {
    this.yaw += yaw;
    this.pitch = Math.min(STRAIGHT, Math.max(-STRAIGHT, this.pitch + pitch));
  }

  // factor > 1 comes nearer.
  zoom(factor) {
    const fit = this.fitting();
    this.distance = Math.min(3 * fit, Math.max(0.25 * fit, this.distance / factor));
  }

  // Moves the shapes by (x, y) viewport heights, y up.
  pan(x, y) {
    const height = 2 * this.distance * Math.tan((FIELD_OF_VIEW / 360) * Math.PI); // world units at the target
    const { right, up } = this.axes();
    this.target = this.target.map((value, axis) => {
      const moved = value - height * (x * right[axis] + y * up[axis]);
      return Math.min(this.centre[axis] + this.radius, Math.max(this.centre[axis] - this.radius, moved));
    });
  }

  // World directions of the camera's right, up and back.
  axes() {
    if (this.flat) return { right: [1, 0, 0], up: [0, 1, 0], back: [0, 0, 1] };
    const [cy, sy, cp, sp] = [Math.cos(this.yaw), Math.sin(this.yaw), Math.cos(this.pitch), Math.sin(this.pitch)];
    return { right: [cy, 0, -sy], up: [-sy * sp, cp, -cy * sp], back: [sy * cp, sp, cy * cp] };
  }

  // Sets a three.js perspective camera.
  apply(camera, aspect) {
    if (aspect !== this.aspect) this.distance *= this.refit(aspect);
    const { back } = this.axes();
    camera.rotation.set(-this.pitch, this.yaw, 0, 'YXZ');
    camera.position.set(...this.target.map((value, axis) => value + this.distance * back[axis]));
    camera.aspect = aspect;
    camera.near = Math.max(this.distance - 2.5 * this.radius, 0.01 * this.radius);
    camera.far = this.distance + 2.5 * this.radius;
    camera.updateProjectionMatrix();
    camera.updateMatrixWorld();
  }

  // A turned phone keeps the zoom: factor by which the fitting distance changes.
  refit(aspect) {
    const before = this.fitting();
    this.aspect = aspect;
    return this.fitting() / before;
  }

  // Scale of an image that fills the viewport, and its shift in shares of the viewport's height, y down.
  flatView() {
    const height = 2 * this.distance * Math.tan((FIELD_OF_VIEW / 360) * Math.PI);
    return { scale: this.fitting() / this.distance, x: (this.centre[0] - this.target[0]) / height, y: (this.target[1] - this.centre[1]) / height };
  }

  get state() {
    return { yaw: this.yaw, pitch: this.pitch, distance: this.distance, target: [...this.target] };
  }
}
