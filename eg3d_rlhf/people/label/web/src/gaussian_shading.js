// Gaussians on the screen (Kerbl et al. 2023, after Zwicker et al. 2001): each is projected to the ellipse J W S Wᵀ Jᵀ + 0.3 pixels², seen with
// opacity * exp(-d²/2), at most 0.99 and not below 1/255, and laid over those behind it. Colours are the display's own.

import { PER_ROW, REST_PER_ROW, REST_TEXELS } from './gaussian_file.js';

export const BATCH = 128; // Gaussians in one instance of the geometry

const HARMONICS = /* glsl */ `
uniform highp usampler2D rest;
uniform vec3 eye; // in the Gaussians' coordinates
vec3 harmonics(uint i, vec3 centre) {
  float f[8 * TEXELS];
  for (uint k = 0u; k < uint(TEXELS); k++) {
    uvec4 t = texelFetch(rest, ivec2((i % ${REST_PER_ROW}u) * uint(TEXELS) + k, i / ${REST_PER_ROW}u), 0);
    for (uint j = 0u; j < 4u; j++) {
      vec2 pair = unpackHalf2x16(t[j]);
      f[8u * k + 2u * j] = pair.x;
      f[8u * k + 2u * j + 1u] = pair.y;
    }
  }
  vec3 d = normalize(centre - eye);
  float x = d.x, y = d.y, z = d.z, xx = x * x, yy = y * y, zz = z * z;
  float b[15];
  b[0] = -0.4886025119029199 * y; b[1] = 0.4886025119029199 * z; b[2] = -0.4886025119029199 * x;
#if DEGREE > 1
  b[3] = 1.0925484305920792 * x * y; b[4] = -1.0925484305920792 * y * z; b[5] = 0.31539156525252005 * (2.0 * zz - xx - yy);
  b[6] = -1.0925484305920792 * x * z; b[7] = 0.5462742152960396 * (xx - yy);
#endif
#if DEGREE > 2
  b[8] = -0.5900435899266435 * y * (3.0 * xx - yy); b[9] = 2.890611442640554 * x * y * z;
  b[10] = -0.4570457994644658 * y * (4.0 * zz - xx - yy); b[11] = 0.3731763325901154 * z * (2.0 * zz - 3.0 * xx - 3.0 * yy);
  b[12] = -0.4570457994644658 * x * (4.0 * zz - xx - yy); b[13] = 1.445305721320277 * z * (xx - yy);
  b[14] = -0.5900435899266435 * x * (xx - 3.0 * yy);
#endif
  vec3 sum = vec3(0.0);
  for (int k = 0; k < EACH; k++) sum += b[k] * vec3(f[k], f[k + EACH], f[k + 2 * EACH]);
  return sum;
}`;

// Defines for a degree 0..3 of the colours.
export function defines(degree) {
  return { DEGREE: degree, TEXELS: REST_TEXELS[degree], EACH: (degree + 1) ** 2 - 1 };
}

export const VERTEX = /* glsl */ `
uniform highp usampler2D splats;
uniform highp usampler2D order;
uniform uint count;
uniform vec2 viewport; // pixels
out vec2 from; // in standard deviations along the ellipse's axes
flat out vec4 colour;
#if DEGREE > 0
${HARMONICS}
#endif
void main() {
  gl_Position = vec4(0.0, 0.0, 2.0, 1.0); // nowhere
  uint rank = uint(gl_InstanceID) * ${BATCH}u + uint(gl_VertexID >> 2);
  if (rank >= count) return;
  uint i = texelFetch(order, ivec2(rank % ${PER_ROW}u, rank / ${PER_ROW}u), 0).r;
  ivec2 at = ivec2(3u * (i % ${PER_ROW}u), i / ${PER_ROW}u);
  uvec4 first = texelFetch(splats, at, 0);
  vec3 centre = uintBitsToFloat(first.xyz);
  vec4 seen = modelViewMatrix * vec4(centre, 1.0);
  vec4 clip = projectionMatrix * seen;
  if (clip.z < -clip.w) return; // before the near plane
  uvec4 third = texelFetch(splats, at + ivec2(2, 0), 0);
  float opacity = float(third.z >> 16u) / 255.0;
  if (opacity < 1.0 / 255.0) return;
  vec4 a = uintBitsToFloat(texelFetch(splats, at + ivec2(1, 0), 0));
  vec2 b = uintBitsToFloat(third.xy);
  mat3 spread = mat3(a.x, a.y, a.z, a.y, a.w, b.x, a.z, b.x, b.y);
  vec2 focal = 0.5 * viewport * vec2(projectionMatrix[0][0], projectionMatrix[1][1]);
  float depth = -seen.z;
  vec2 edge = 1.3 / vec2(projectionMatrix[0][0], projectionMatrix[1][1]);
  vec2 slope = clamp(seen.xy / depth, -edge, edge);
  mat3 w = transpose(mat3(modelViewMatrix)); // rows as columns
  vec3 dx = w * (focal.x / depth * vec3(1.0, 0.0, slope.x));
  vec3 dy = w * (focal.y / depth * vec3(0.0, 1.0, slope.y));
  float xx = dot(dx, spread * dx) + 0.3, xy = dot(dx, spread * dy), yy = dot(dy, spread * dy) + 0.3;
  float middle = 0.5 * (xx + yy), half_gap = length(vec2(0.5 * (xx - yy), xy));
  vec2 deviations = sqrt(vec2(middle + half_gap, max(middle - half_gap, 0.1)));
  vec2 major = half_gap < 1e-6 * middle ? vec2(1.0, 0.0) : xx > yy ? normalize(vec2(0.5 * (xx - yy) + half_gap, xy)) : normalize(vec2(xy, 0.5 * (yy - xx) + half_gap));
  float reach = sqrt(2.0 * log(255.0 * opacity));
  from = reach * (2.0 * vec2(gl_VertexID & 1, (gl_VertexID >> 1) & 1) - 1.0);
  vec2 pixels = from.x * deviations.x * major + from.y * deviations.y * vec2(-major.y, major.x);
  gl_Position = vec4(clip.xy / clip.w + 2.0 * pixels / viewport, 0.0, 1.0);
  vec3 rgb = vec3(unpackHalf2x16(first.w), unpackHalf2x16(third.z & 0xffffu).x);
  rgb = 0.28209479177387814 * rgb + 0.5;
#if DEGREE > 0
  rgb += harmonics(i, centre);
#endif
  colour = vec4(max(rgb, 0.0), opacity);
}`;

export const FRAGMENT = /* glsl */ `
in vec2 from;
flat in vec4 colour;
out vec4 result;
void main() {
  float alpha = min(0.99, colour.a * exp(-0.5 * dot(from, from)));
  if (alpha < 1.0 / 255.0) discard;
  result = vec4(colour.rgb * alpha, alpha);
}`;
