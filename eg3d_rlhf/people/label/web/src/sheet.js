// Draws an image, colours times opacity, over a whole viewport.

import { BufferGeometry, CustomBlending, GLSL3, Mesh, OneFactor, OneMinusSrcAlphaFactor, Scene, ShaderMaterial, Vector2 } from 'three';

export const OVER = { transparent: true, blending: CustomBlending, blendSrc: OneFactor, blendDst: OneMinusSrcAlphaFactor, depthTest: false, depthWrite: false };

const VERTEX = /* glsl */ `
uniform vec2 part; // of the image that is drawn
out vec2 at;
void main() {
  vec2 corner = vec2(gl_VertexID == 1 ? 2.0 : 0.0, gl_VertexID == 2 ? 2.0 : 0.0);
  at = corner * part;
  gl_Position = vec4(2.0 * corner - 1.0, 0.0, 1.0);
}`;

const FRAGMENT = /* glsl */ `
uniform sampler2D picture;
in vec2 at;
out vec4 result;
void main() {
  result = texture(picture, at);
}`;

export class Sheet {
  material = new ShaderMaterial({
    ...OVER, glslVersion: GLSL3, vertexShader: VERTEX, fragmentShader: FRAGMENT, uniforms: { picture: { value: null }, part: { value: new Vector2(1, 1) } },
  });

  constructor(renderer) {
    this.renderer = renderer;
    const triangle = new BufferGeometry().setIndex([0, 1, 2]);
    this.scene = new Scene().add(Object.assign(new Mesh(triangle, this.material), { frustumCulled: false }));
  }

  // part: [x, y] shares of the texture, from its lower left corner.
  lay(texture, camera, part = [1, 1]) {
    this.material.uniforms.picture.value = texture;
    this.material.uniforms.part.value.set(...part);
    this.renderer.render(this.scene, camera);
  }
}
