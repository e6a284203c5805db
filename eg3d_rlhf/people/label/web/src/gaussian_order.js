// The order in which Gaussians are drawn: the furthest first, exactly, by two passes of a counting sort over the depths' 32 bits.

const BINS = 65536;

// positions [N, 3]; direction [3]: from the eye into the scene, in their coordinates. Returns a Uint32Array [length] whose first N are the order;
// Gaussians at one depth keep theirs.
export function orderOf(positions, [x, y, z], length) {
  const count = positions.length / 3;
  const [keys, first, order] = [new Uint32Array(count), new Uint32Array(count), new Uint32Array(length)];
  const depths = new Float32Array(keys.buffer);
  const [low, high] = [new Uint32Array(BINS), new Uint32Array(BINS)];
  for (let i = 0, p = 0; i < count; i += 1, p += 3) {
    depths[i] = x * positions[p] + y * positions[p + 1] + z * positions[p + 2];
    const bits = keys[i];
    const key = bits & 0x80000000 ? bits : ~bits & 0x7fffffff; // grows as the depth falls
    keys[i] = key;
    low[key & 0xffff] += 1;
    high[key >>> 16] += 1;
  }
  starts(low);
  starts(high);
  for (let i = 0; i < count; i += 1) first[low[keys[i] & 0xffff]++] = i;
  for (let i = 0; i < count; i += 1) order[high[keys[first[i]] >>> 16]++] = first[i];
  return order;
}

// Counts to the places where each bin begins.
function starts(bins) {
  let sum = 0;
  for (let i = 0; i < BINS; i += 1) {
    const count = bins[i];
    bins[i] = sum;
    sum += count;
  }
}
