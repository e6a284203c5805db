// Draws isosurfaces (SHP1): grey, lit from the viewer, as wireframe or with normals as colours. Other painters borrow its materials.

import { BufferAttribute, BufferGeometry, DoubleSide, Group, Mesh, Scene, ShaderMaterial } from 'three';

import { decodeMesh } from './mesh.js';
import { FRAGMENT, LINE_FRAGMENT, VERTEX } from './shading.js';

export class Surfaces {
  clay = new ShaderMaterial({
    vertexShader: VERTEX, fragmentShader: FRAGMENT, side: DoubleSide, uniforms: { normals: { value: 0 } },
    polygonOffsetFactor: 1, polygonOffsetUnits: 1,
  });
  lines = new ShaderMaterial({ vertexShader: VERTEX, fragmentShader: LINE_FRAGMENT, wireframe: true });
  scene = new Scene();

  // renderer: three.js'; backstage: a render target of one pixel.
  constructor(renderer, backstage) {
    Object.assign(this, { renderer, backstage });
  }

  // The bytes of a file as something that can be drawn at once.
  async keep(data, camera) {
    const mesh = decodeMesh(data);
    const geometry = new BufferGeometry();
    geometry.setAttribute('position', new BufferAttribute(mesh.positions, 3));
    geometry.setAttribute('normal', new BufferAttribute(mesh.normals, 3));
    geometry.setIndex(new BufferAttribute(mesh.indices, 1));
    const root = new Group().add(new Mesh(geometry, this.clay));
    root.matrixAutoUpdate = false;
    this.upload(root, [geometry], camera);
    const centre = mesh.minimum.map((low, axis) => (low + mesh.maximum[axis]) / 2);
    const bytes = 2 * (mesh.positions.byteLength + mesh.normals.byteLength + mesh.indices.byteLength); // here and on the GPU
    return { root, geometry, minimum: mesh.minimum, maximum: mesh.maximum, ball: { centre, radius: reach(mesh.positions, centre) }, bytes };
  }

  drop(shape) {
    shape.geometry.dispose();
  }

  // Draws one triangle of each geometry into a single pixel off the screen, which takes them to the GPU.
  upload(root, geometries, camera) {
    for (const geometry of geometries) geometry.setDrawRange(0, 3);
    this.renderer.setRenderTarget(this.backstage);
    this.renderer.clear();
    this.draw(root, camera, this.clay);
    this.renderer.setRenderTarget(null);
    for (const geometry of geometries) geometry.setDrawRange(0, Infinity);
  }

  paint(shape, camera, look) {
    return this.plain(shape.root, camera, look);
  }

  // Geometry alone: clay or normals, with lines where they are asked for. Returns the triangles drawn.
  plain(root, camera, { normals, wireframe }) {
    this.clay.uniforms.normals.value = normals ? 1 : 0;
    this.clay.polygonOffset = wireframe; // else no: at the outline it pushes the front behind the back, which shows as dark specks
    const drawn = this.draw(root, camera, this.clay);
    if (wireframe) this.draw(root, camera, this.lines);
    return drawn;
  }

  draw(root, camera, material) {
    this.scene.overrideMaterial = material;
    this.scene.add(root);
    this.renderer.render(this.scene, camera);
    this.scene.remove(root);
    return this.renderer.info.render.triangles;
  }
}

// The largest distance of a point [.., 3] from the centre.
function reach(positions, [x, y, z]) {
  let most = 0;
  for (let i = 0; i < positions.length; i += 3) {
    const [dx, dy, dz] = [positions[i] - x, positions[i + 1] - y, positions[i + 2] - z];
    most = Math.max(most, dx * dx + dy * dy + dz * dz);
  }
  return Math.sqrt(most) || 1;
}
