// Decodes the SHP1 mesh: 4 bytes magic, uint32 vertices V, uint32 triangles T, float32 minimum[3], float32 extent[3],
// uint16 positions [V, 3] with q / 65535 * extent + minimum, zero padding to 4 bytes, indices [T, 3] as uint16 (V <= 65536) or uint32.
// Little-endian, as every machine that runs a browser is.

const HEADER = 36; // bytes

export function decodeMesh(buffer) {
  const view = new DataView(buffer);
  if (buffer.byteLength < HEADER || view.getUint32(0, true) !== 0x31504853) { // 'SHP1'
    throw new Error(`decodeMesh: expected a SHP1 mesh, got ${buffer.byteLength} bytes of something else. Prepare the shape again.`);
  }
  const vertices = view.getUint32(4, true);
  const triangles = view.getUint32(8, true);
  const wide = vertices > 65536;
  const start = HEADER + Math.ceil((vertices * 6) / 4) * 4; // of the indices
  const expected = start + triangles * 3 * (wide ? 4 : 2);
  if (buffer.byteLength < expected) {
    throw new Error(`decodeMesh: expected ${expected} bytes, got ${buffer.byteLength}. Prepare the shape again.`);
  }
  const minimum = [0, 1, 2].map((axis) => view.getFloat32(12 + 4 * axis, true));
  const extent = [0, 1, 2].map((axis) => view.getFloat32(24 + 4 * axis, true));
  const positions = dequantise(new Uint16Array(buffer, HEADER, vertices * 3), minimum, extent);
  const indices = wide ? new Uint32Array(buffer, start, triangles * 3) : new Uint16Array(buffer, start, triangles * 3);
  return { positions, normals: vertexNormals(positions, indices), indices, minimum, maximum: minimum.map((low, axis) => low + extent[axis]) };
}

function dequantise(quantised, minimum, extent) {
  const positions = new Float32Array(quantised.length); // [V, 3]
  const step = extent.map((length) => length / 65535);
  for (let i = 0; i < quantised.length; i += 3) {
    positions[i] = quantised[i] * step[0] + minimum[0];
    positions[i + 1] = quantised[i + 1] * step[1] + minimum[1];
    positions[i + 2] = quantised[i + 2] * step[2] + minimum[2];
  }
  return positions;
}

// Sum of the triangles' normals weighted with their area, [V, 3]; the shader normalises.
function vertexNormals(p, indices) {
  const normals = new Float32Array(p.length);
  for (let t = 0; t < indices.length; t += 3) {
    const a = 3 * indices[t];
    const b = 3 * indices[t + 1];
    const c = 3 * indices[t + 2];
    const ux = p[b] - p[a], uy = p[b + 1] - p[a + 1], uz = p[b + 2] - p[a + 2];
    const vx = p[c] - p[a], vy = p[c + 1] - p[a + 1], vz = p[c + 2] - p[a + 2];
    const nx = uy * vz - uz * vy, ny = uz * vx - ux * vz, nz = ux * vy - uy * vx;
    for (const corner of [a, b, c]) {
      normals[corner] += nx;
      normals[corner + 1] += ny;
      normals[corner + 2] += nz;
    }
  }
  for (let i = 0; i < normals.length; i += 3) {
    const length = Math.hypot(normals[i], normals[i + 1], normals[i + 2]) || 1;
    normals[i] /= length;
    normals[i + 1] /= length;
    normals[i + 2] /= length;
  }
  return normals;
}
