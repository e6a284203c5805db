// Neutral shading, the same for every shape: grey clay under lights that stay with the viewer, so that only geometry shows.

export const VERTEX = /* glsl */ `
varying vec3 shadeNormal; // in view space
void main() {
  shadeNormal = normalMatrix * normal;
  gl_Position = projectionMatrix * modelViewMatrix * vec4(position, 1.0);
}`;

export const FRAGMENT = /* glsl */ `
uniform float normals; // 1.0: show the normal as a colour
varying vec3 shadeNormal;
const vec3 KEY = vec3(-0.44, 0.58, 0.68);
const vec3 FILL = vec3(0.80, 0.12, 0.59);
void main() {
  vec3 n = normalize(shadeNormal) * (gl_FrontFacing ? 1.0 : -1.0);
  float key = max(dot(n, KEY), 0.0);
  float fill = max(dot(n, FILL), 0.0);
  float gloss = pow(max(dot(n, normalize(KEY + vec3(0.0, 0.0, 1.0))), 0.0), 28.0);
  float light = 0.24 + 0.08 * n.y + 0.56 * key + 0.20 * fill;
  vec3 clay = vec3(0.80, 0.79, 0.77) * light + 0.06 * gloss;
  if (!gl_FrontFacing) clay *= 0.45; // the inside of a body
  gl_FragColor = vec4(mix(clay, 0.5 + 0.5 * n, normals), 1.0);
}`;

export const LINE_FRAGMENT = /* glsl */ `
varying vec3 shadeNormal;
void main() {
  gl_FragColor = vec4(0.05, 0.22, 0.38, 1.0);
}`;
