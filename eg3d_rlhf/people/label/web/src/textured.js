// Draws textured meshes (GLB): physically based under one neutral, fixed light, or geometry alone.

import { DirectionalLight, Group, NeutralToneMapping, PMREMGenerator, Scene, Vector3 } from 'three';
import { RoomEnvironment } from 'three/addons/environments/RoomEnvironment.js';
import { GLTFLoader } from 'three/addons/loaders/GLTFLoader.js';

import { t } from './texts.js';

const ROOM = 0.75; // brightness of the room
const KEY = 1.3; // of the light at the viewer's left shoulder, so that every side can be seen
const SHARP = 8; // anisotropic filtering
const GREY = 0.4; // linear RGB of a surface whose texture cannot be shown, as in geometry/files/appearance.py
const NO_AREA = 1e-9; // as in geometry/files/triangles.py

export class Textured {
  // surfaces: draws geometry alone; sharp: whether there is a GPU, for which sharp textures at a slant cost little.
  constructor(renderer, surfaces, sharp) {
    Object.assign(this, { renderer, surfaces });
    this.anisotropy = sharp ? Math.min(SHARP, renderer.capabilities.getMaxAnisotropy()) : 1;
    this.scene = new Scene();
    this.light = this.scene.add(new DirectionalLight(0xffffff, KEY)).children[0];
    this.scene.add(this.light.target);
    renderer.toneMapping = NeutralToneMapping; // keeps base colours; concerns built-in materials only
    this.furnish();
  }

  furnish() {
    const room = new RoomEnvironment();
    const generator = new PMREMGenerator(this.renderer);
    this.scene.environment = generator.fromScene(room, 0.04).texture;
    this.scene.environmentIntensity = ROOM;
    room.dispose();
    generator.dispose();
  }

  async keep(data, camera) {
    const { scene, textures, notes } = await parse(data);
    const root = new Group().add(scene);
    root.matrixAutoUpdate = false;
    const meshes = [];
    root.traverse((object) => { if (object.isMesh) meshes.push(object); });
    if (!meshes.length) throw new Error(t('error.shape'));
    const geometries = [...new Set(meshes.map((mesh) => mesh.geometry))];
    const materials = [...new Set(meshes.flatMap((mesh) => mesh.material))];
    for (const geometry of geometries) if (!geometry.attributes.normal) geometry.computeVertexNormals();
    const shape = { root, geometries, materials, textures, notes, ball: ball(root, meshes), bytes: 0 };
    shape.bytes = size(shape);
    try {
      await this.upload(shape, camera);
    } catch (error) {
      this.drop(shape);
      throw error;
    }
    return shape;
  }

  // Everything to the GPU, a part at a time; the images' own memory is freed.
  async upload({ root, geometries, textures }, camera) {
    for (const texture of textures) {
      texture.anisotropy = this.anisotropy;
      this.renderer.initTexture(texture);
      await breath();
    }
    for (const texture of textures) texture.image.close?.();
    this.surfaces.upload(root, geometries, camera);
    this.scene.add(root);
    const compiled = this.compile(root, camera);
    this.scene.remove(root);
    await compiled;
  }

  compile(root, camera) {
    const beside = this.renderer.extensions.has('KHR_parallel_shader_compile');
    return beside ? this.renderer.compileAsync(root, camera, this.scene) : this.renderer.compile(root, camera, this.scene);
  }

  drop({ geometries, materials, textures }) {
    for (const part of [...geometries, ...materials, ...textures]) part.dispose();
    for (const texture of textures) texture.image?.close?.();
  }

  paint(shape, camera, look) {
    if (look.clay || look.normals) return this.surfaces.plain(shape.root, camera, look);
    this.light.position.set(-1.2, 1.5, 2).applyQuaternion(camera.quaternion);
    this.scene.add(shape.root);
    this.renderer.render(this.scene, camera);
    this.scene.remove(shape.root);
    const { triangles } = this.renderer.info.render;
    if (look.wireframe) this.surfaces.draw(shape.root, camera, this.surfaces.lines);
    return triangles;
  }
}

// The file's scene, all its textures, and the kinds of its notes: what is not shown as in the original file. Where an image cannot be
// decoded, the surface is grey, and a note says so.
async function parse(data) {
  const loader = new GLTFLoader();
  let broken = false;
  loader.manager.onError = () => { broken = true; };
  let gltf;
  try {
    gltf = await loader.parseAsync(data, '');
  } catch {
    throw new Error(t('error.shape'));
  }
  const textures = new Set();
  gltf.scene.traverse((object) => {
    for (const material of [object.material ?? []].flat()) {
      for (const value of Object.values(material)) if (value?.isTexture) textures.add(value);
    }
  });
  const notes = new Set(gltf.asset.extras?.notes ?? []);
  if (broken) {
    notes.add('untextured');
    gltf.scene.traverse((object) => { for (const material of [object.material ?? []].flat()) makePlain(material, gltf.parser); });
  }
  return { scene: gltf.scene, textures, notes: [...notes].sort() };
}

// A material whose image is missing, without the factors that would have been multiplied by it.
function makePlain(material, parser) {
  const { pbrMetallicRoughness: stated = {}, emissiveTexture } = parser.json.materials?.[parser.associations.get(material)?.materials] ?? {};
  if (stated.baseColorTexture && !material.map) {
    if (!stated.baseColorFactor) material.color.setRGB(GREY, GREY, GREY);
    if (!stated.metallicRoughnessTexture) material.metalness = stated.metallicFactor ?? 0;
  }
  if (stated.metallicRoughnessTexture && !material.metalnessMap) Object.assign(material, { metalness: 0, roughness: 1 });
  if (emissiveTexture && !material.emissiveMap) material.emissive?.setRGB(0, 0, 0);
}

// The middle of the box around the triangles that have an area, and the largest distance of their corners from it. A stray vertex, or a
// triangle that has collapsed, cannot be seen, so it has no influence on the size.
function ball(root, meshes) {
  root.updateMatrixWorld(true);
  const [low, high] = [new Vector3(Infinity, Infinity, Infinity), new Vector3(-Infinity, -Infinity, -Infinity)];
  const [a, b, c, u, v, w] = Array.from({ length: 6 }, () => new Vector3());
  const each = (visit) => {
    for (const mesh of meshes) {
      const { attributes: { position }, index } = mesh.geometry;
      const corner = (vector, i) => vector.fromBufferAttribute(position, index ? index.getX(i) : i).applyMatrix4(mesh.matrixWorld);
      const count = index ? index.count : position.count;
      for (let i = 0; i + 2 < count; i += 3) {
        corner(a, i);
        corner(b, i + 1);
        corner(c, i + 2);
        u.subVectors(b, a);
        v.subVectors(c, b);
        const longest = Math.max(u.lengthSq(), v.lengthSq(), w.subVectors(a, c).lengthSq());
        if (w.crossVectors(u, v).length() > NO_AREA * longest) for (const vertex of [a, b, c]) visit(vertex);
      }
    }
  };
  each((vertex) => {
    low.min(vertex);
    high.max(vertex);
  });
  if (low.x > high.x) throw new Error(t('error.shape')); // there is nothing to see
  const centre = low.add(high).multiplyScalar(0.5);
  let most = 0;
  each((vertex) => { most = Math.max(most, vertex.distanceToSquared(centre)); });
  return { centre: centre.toArray(), radius: Math.sqrt(most) || 1 };
}

// Bytes on the GPU with the textures' smaller copies, and those of the geometry that stay here.
function size({ geometries, textures }) {
  let sum = 0;
  for (const { attributes, index } of geometries) {
    for (const part of [...Object.values(attributes), ...(index ? [index] : [])]) sum += 2 * part.array.byteLength;
  }
  for (const { image } of textures) sum += image ? (image.width * image.height * 16) / 3 : 0;
  return sum;
}

// Yields to a frame and to the annotator's input.
function breath() {
  return new Promise((resolve) => { setTimeout(resolve, 4); });
}
