// Gaussians without a graphics card: the same image as gaussian_shading.js describes, computed by the CPU. The nearest comes first, so that
// what is hidden costs nothing.

import { HALVES, PER_ROW, REST_TEXELS } from './gaussian_file.js';
import { orderOf } from './gaussian_order.js';

const OPAQUE = 1e-4; // share of the background that is still seen where a pixel is done
const STEPS = 4096; // of the table of exp(-x / 2), 0 <= x < 12
const BELL = Float32Array.from({ length: STEPS + 2 }, (_, i) => Math.exp((-6 * i) / STEPS));

// shape: what decodeGaussians returned; camera: {view: 16 numbers as three.js has them, focal [2] and size [2] in pixels, edge [2]: slopes that are seen}.
// Returns [H, W, 4] uint8, colours times opacity, the lowest row first.
export function drawGaussians(shape, { view, focal, size, edge }) {
  const [width, height] = size;
  const seen = new Float32Array(4 * width * height); // red, green, blue, and the share of what lies behind
  for (let p = 3; p < seen.length; p += 4) seen[p] = 1;
  const order = ordered(shape, [-view[2], -view[6], -view[10]]);
  const floats = new Float32Array(shape.splats.buffer);
  const eye = shape.degree ? eyeOf(view) : null;
  const near = 1e-3 * Math.hypot(view[2], view[6], view[10]);
  const ellipse = new Float64Array(9);
  for (let k = shape.count - 1; k >= 0; k -= 1) {
    const o = 12 * order[k];
    const opacity = (shape.splats[o + 10] >>> 16) / 255;
    if (opacity === 0 || !project(ellipse, floats, o, view, focal, size, edge, near, 2 * Math.log(255 * opacity))) continue;
    colour(ellipse, shape, order[k], eye);
    cover(seen, width, height, ellipse, opacity, 2 * Math.log(255 * opacity));
  }
  const picture = new Uint8ClampedArray(seen.length);
  for (let p = 0; p < seen.length; p += 4) {
    for (let c = 0; c < 3; c += 1) picture[p + c] = 255 * seen[p + c];
    picture[p + 3] = 255 * (1 - seen[p + 3]);
  }
  return picture;
}

function ordered(shape, direction) {
  if (!shape.sorted || direction.some((value, axis) => value !== shape.sorted.direction[axis])) {
    shape.sorted = { direction, order: orderOf(shape.positions, direction, PER_ROW * Math.ceil(shape.count / PER_ROW)) };
  }
  return shape.sorted.order;
}

// Fills in the centre (0, 1) and the inverse covariance xx xy yy (2, 3, 4) in pixels, and half the height (8); false where nothing can be seen.
function project(out, f, o, v, focal, size, edge, near, reach) {
  const x = f[o], y = f[o + 1], z = f[o + 2];
  const depth = -(v[2] * x + v[6] * y + v[10] * z + v[14]);
  if (depth < near) return false;
  const sx = (v[0] * x + v[4] * y + v[8] * z + v[12]) / depth;
  const sy = (v[1] * x + v[5] * y + v[9] * z + v[13]) / depth;
  const bx = Math.max(-edge[0], Math.min(edge[0], sx)), by = Math.max(-edge[1], Math.min(edge[1], sy));
  const fx = focal[0], fy = focal[1], width = size[0], height = size[1], gx = fx / depth, gy = fy / depth;
  const ax = gx * (v[0] + bx * v[2]), ay = gx * (v[4] + bx * v[6]), az = gx * (v[8] + bx * v[10]);
  const cx = gy * (v[1] + by * v[2]), cy = gy * (v[5] + by * v[6]), cz = gy * (v[9] + by * v[10]);
  const sxx = f[o + 4], sxy = f[o + 5], sxz = f[o + 6], syy = f[o + 7], syz = f[o + 8], szz = f[o + 9];
  const tx = sxx * ax + sxy * ay + sxz * az, ty = sxy * ax + syy * ay + syz * az, tz = sxz * ax + syz * ay + szz * az;
  const xx = ax * tx + ay * ty + az * tz + 0.3;
  const xy = cx * tx + cy * ty + cz * tz;
  const yy = cx * (sxx * cx + sxy * cy + sxz * cz) + cy * (sxy * cx + syy * cy + syz * cz) + cz * (sxz * cx + syz * cy + szz * cz) + 0.3;
  const px = width / 2 + fx * sx, py = height / 2 + fy * sy;
  const wide = Math.sqrt(reach * xx), high = Math.sqrt(reach * yy);
  if (!(px + wide > 0 && px - wide < width && py + high > 0 && py - high < height)) return false;
  const scale = 1 / (xx * yy - xy * xy);
  out[0] = px; out[1] = py; out[2] = yy * scale; out[3] = -xy * scale; out[4] = xx * scale; out[8] = high;
  return true;
}

// Fills in red, green and blue (5, 6, 7).
function colour(out, { splats, rest, degree }, i, eye) {
  const first = splats[12 * i + 3], last = splats[12 * i + 10];
  out[5] = 0.28209479177387814 * HALVES[first & 0xffff] + 0.5;
  out[6] = 0.28209479177387814 * HALVES[first >>> 16] + 0.5;
  out[7] = 0.28209479177387814 * HALVES[last & 0xffff] + 0.5;
  if (degree) {
    const at = new Float32Array(splats.buffer, 48 * i, 3);
    const basis = harmonics(at[0] - eye[0], at[1] - eye[1], at[2] - eye[2], degree);
    const halves = new Uint16Array(rest.buffer, 16 * REST_TEXELS[degree] * i, 3 * basis.length);
    for (let c = 0; c < 3; c += 1) for (let k = 0; k < basis.length; k += 1) out[5 + c] += basis[k] * HALVES[halves[c * basis.length + k]];
  }
  for (let c = 5; c < 8; c += 1) out[c] = Math.max(0, out[c]);
}

// The real harmonics from degree 1 on, as gaussian_shading.js has them.
function harmonics(dx, dy, dz, degree) {
  const length = Math.hypot(dx, dy, dz);
  const x = dx / length, y = dy / length, z = dz / length;
  const xx = x * x, yy = y * y, zz = z * z;
  return [
    -0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x,
    1.0925484305920792 * x * y, -1.0925484305920792 * y * z, 0.31539156525252005 * (2 * zz - xx - yy), -1.0925484305920792 * x * z, 0.5462742152960396 * (xx - yy),
    -0.5900435899266435 * y * (3 * xx - yy), 2.890611442640554 * x * y * z, -0.4570457994644658 * y * (4 * zz - xx - yy),
    0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy), -0.4570457994644658 * x * (4 * zz - xx - yy), 1.445305721320277 * z * (xx - yy),
    -0.5900435899266435 * x * (xx - 3 * yy),
  ].slice(0, (degree + 1) ** 2 - 1);
}

// Lays one ellipse behind what is seen already.
function cover(seen, width, height, ellipse, opacity, reach) {
  const px = ellipse[0], py = ellipse[1], a = ellipse[2], b = ellipse[3], c = ellipse[4], red = ellipse[5], green = ellipse[6], blue = ellipse[7], high = ellipse[8];
  const last = Math.min(height - 1, Math.floor(py + high - 0.5));
  for (let row = Math.max(0, Math.ceil(py - high - 0.5)); row <= last; row += 1) {
    const dy = row + 0.5 - py;
    const root = b * b * dy * dy - a * (c * dy * dy - reach);
    if (root < 0) continue;
    const middle = px - (b * dy) / a, half = Math.sqrt(root) / a;
    const end = Math.min(width - 1, Math.floor(middle + half - 0.5));
    for (let x = Math.max(0, Math.ceil(middle - half - 0.5)); x <= end; x += 1) {
      const p = 4 * (row * width + x);
      const behind = seen[p + 3];
      if (behind < OPAQUE) continue;
      const dx = x + 0.5 - px;
      const place = (a * dx * dx + 2 * b * dx * dy + c * dy * dy) * (STEPS / 12);
      const step = Math.max(0, Math.floor(place));
      const bell = BELL[step] + (BELL[step + 1] - BELL[step]) * (place - step);
      const alpha = Math.min(0.99, opacity * bell);
      const share = alpha * behind;
      seen[p] += share * red;
      seen[p + 1] += share * green;
      seen[p + 2] += share * blue;
      seen[p + 3] = behind - share;
    }
  }
}

// The camera's position in the Gaussians' coordinates; view is a turn, a uniform scale and a move.
function eyeOf(v) {
  const scale = v[0] * v[0] + v[1] * v[1] + v[2] * v[2];
  return [0, 4, 8].map((column) => -(v[column] * v[12] + v[column + 1] * v[13] + v[column + 2] * v[14]) / scale);
}
