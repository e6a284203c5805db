// The worker beside the page: reads files of Gaussians and puts them in order, so that the page stays at hand.

import { decodeGaussians, PER_ROW } from './gaussian_file.js';
import { orderOf } from './gaussian_order.js';

const kept = new Map(); // id -> positions

onmessage = ({ data: { id, buffer, direction } }) => {
  if (buffer) read(id, buffer);
  else if (direction) sort(id, direction);
  else kept.delete(id);
};

function read(id, buffer) {
  try {
    const { positions, ...found } = decodeGaussians(buffer);
    kept.set(id, positions);
    postMessage({ id, found }, [found.splats.buffer, ...(found.rest ? [found.rest.buffer] : [])]);
  } catch (error) {
    postMessage({ id, error: error.message });
  }
}

function sort(id, direction) {
  const positions = kept.get(id);
  if (!positions) return;
  const order = orderOf(positions, direction, PER_ROW * Math.ceil(positions.length / 3 / PER_ROW));
  postMessage({ id, order, direction }, [order.buffer]);
}
