// Reads Gaussians (GSP1, little-endian) into textures for the GPU: 'GSP1', uint32 N, uint32 degree d of the colours, float32 least corner [3],
// float32 extent [3]; then arrays, each from a multiple of 4 bytes on: positions [N, 3] float32; log-scales [N, 3] float16; rotations [N, 4] int16,
// unit quaternions w, x, y, z as q / 32767; opacities [N] uint8 / 255; colours [N, 3] float16, the spherical harmonics' constant part; and the rest
// [N, 3, (d + 1)^2 - 1] float16.

const HEADER = 36; // bytes
const MOST = 1.6e7; // Gaussians: what a texture of 16,384 rows holds

// Every float16 x as a number; and exp(x).
export const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
  const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024);
  return bits & 0x8000 ? -size : size;
});
const EXP = HALVES.map((x) => Math.exp(x));

export const PER_ROW = 1024; // Gaussians in a row of the texture `splats`, three texels each
export const REST_PER_ROW = 512; // in a row of the texture `rest`
export const REST_TEXELS = [0, 2, 3, 6]; // of each, by degree: eight float16 in a texel

// {count, degree, positions [N, 3], splats, rest, ball}: textures are Uint32Arrays of whole rows, four to a texel.
export function decodeGaussians(buffer) {
  const view = new DataView(buffer);
  const short = buffer.byteLength < HEADER;
  const [count, degree] = short ? [0, 0] : [view.getUint32(4, true), view.getUint32(8, true)];
  if (short || view.getUint32(0, true) !== 0x31505347 || degree > 3 || !count || count > MOST) throw new Error('expected a file of Gaussians (GSP1)');
  const rest = 3 * ((degree + 1) ** 2 - 1);
  const at = [HEADER];
  for (const bytes of [12, 6, 8, 1, 6]) at.push(4 * Math.ceil((at.at(-1) + bytes * count) / 4));
  if (buffer.byteLength < at[4] + 6 * count || buffer.byteLength < at[5] + 2 * rest * count) throw new Error('expected a whole file, got a part of one');
  const positions = new Float32Array(buffer.slice(HEADER, HEADER + 12 * count));
  const opacities = new Uint8Array(buffer, at[3], count);
  const parts = {
    positions, opacities, scales: new Uint16Array(buffer, at[1], 3 * count), rotations: new Int16Array(buffer, at[2], 4 * count),
    colours: new Uint16Array(buffer, at[4], 3 * count),
  };
  return {
    count, degree, positions, splats: splatTexels(count, parts), rest: restTexels(count, degree, new Uint16Array(buffer, at[5], rest * count)),
    ball: ball(parts),
  };
}

// Texels of a Gaussian: x y z | red, green; covariance xx xy xz yy; covariance yz zz | blue, opacity (uint8) | 0.
function splatTexels(count, { positions, opacities, scales, rotations, colours }) {
  const words = new Uint32Array(12 * PER_ROW * Math.ceil(count / PER_ROW));
  const floats = new Float32Array(words.buffer);
  for (let i = 0, o = 0; i < count; i += 1, o += 12) {
    floats[o] = positions[3 * i]; floats[o + 1] = positions[3 * i + 1]; floats[o + 2] = positions[3 * i + 2];
    words[o + 3] = colours[3 * i] | (colours[3 * i + 1] << 16);
    let w = rotations[4 * i], x = rotations[4 * i + 1], y = rotations[4 * i + 2], z = rotations[4 * i + 3];
    const length = Math.sqrt(w * w + x * x + y * y + z * z) || 1;
    w /= length; x /= length; y /= length; z /= length;
    const a = EXP[scales[3 * i]], b = EXP[scales[3 * i + 1]], c = EXP[scales[3 * i + 2]];
    const xa = (1 - 2 * (y * y + z * z)) * a, xb = 2 * (x * y - w * z) * b, xc = 2 * (x * z + w * y) * c; // rotation times scale
    const ya = 2 * (x * y + w * z) * a, yb = (1 - 2 * (x * x + z * z)) * b, yc = 2 * (y * z - w * x) * c;
    const za = 2 * (x * z - w * y) * a, zb = 2 * (y * z + w * x) * b, zc = (1 - 2 * (x * x + y * y)) * c;
    floats[o + 4] = xa * xa + xb * xb + xc * xc;
    floats[o + 5] = xa * ya + xb * yb + xc * yc;
    floats[o + 6] = xa * za + xb * zb + xc * zc;
    floats[o + 7] = ya * ya + yb * yb + yc * yc;
    floats[o + 8] = ya * za + yb * zb + yc * zc;
    floats[o + 9] = za * za + zb * zb + zc * zc;
    words[o + 10] = colours[3 * i + 2] | (opacities[i] << 16);
  }
  return words;
}

function restTexels(count, degree, values) {
  if (!degree) return null;
  const [each, stride] = [3 * ((degree + 1) ** 2 - 1), 8 * REST_TEXELS[degree]];
  const halves = new Uint16Array(stride * REST_PER_ROW * Math.ceil(count / REST_PER_ROW));
  for (let i = 0; i < count; i += 1) halves.set(values.subarray(each * i, each * (i + 1)), stride * i);
  return new Uint32Array(halves.buffer);
}


// The framed ball: the middle of the box that holds all but a hundredth of the centres on each side, and the radius that holds all but a hundredth
// of them with a standard deviation around, estimated from some 50,000. A few outliers must not make the rest small; they are drawn all the same. Centres that can hardly be seen do not count.
function ball({ positions, opacities, scales }) {
  const seen = [];
  const step = Math.ceil(opacities.length / 50_000);
  for (let i = 0; i < opacities.length; i += step) if (opacities[i] > 25) seen.push(i);
  if (!seen.length) for (let i = 0; i < opacities.length; i += step) seen.push(i);
  const share = (values, part) => values.sort()[Math.min(values.length - 1, Math.floor(part * values.length))];
  const centre = [0, 1, 2].map((axis) => {
    const along = Float32Array.from(seen, (i) => positions[3 * i + axis]);
    return (share(along, 0.01) + share(along, 0.99)) / 2;
  });
  const distances = Float32Array.from(seen, (i) => {
    const size = Math.max(EXP[scales[3 * i]], EXP[scales[3 * i + 1]], EXP[scales[3 * i + 2]]);
    return Math.hypot(...centre.map((middle, axis) => positions[3 * i + axis] - middle)) + size;
  });
  return { centre, radius: share(distances, 0.99) || 1 };
}
