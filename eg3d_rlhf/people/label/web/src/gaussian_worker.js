// The worker beside the page: reads files of Gaussians and puts them in order or draws them, so that the page stays at hand.

import { decodeGaussians, PER_ROW } from './gaussian_file.js';
import { orderOf } from './gaussian_order.js';
import { drawGaussians } from './gaussian_software.js';

const kept = new Map(); // id -> what is needed of it

onmessage = ({ data: { id, buffer, draws, direction, camera } }) => {
  if (buffer) read(id, buffer, draws);
  else if (direction) sort(id, direction);
  else if (camera) draw(id, camera);
  else kept.delete(id);
};

function read(id, buffer, draws) {
  let shape;
  try {
    shape = decodeGaussians(buffer);
  } catch (error) {
    postMessage({ id, error: error.message });
    return;
  }
  const { positions, splats, rest, ...found } = shape;
  kept.set(id, draws ? shape : { positions });
  if (draws) postMessage({ id, found: { ...found, splats: null, rest: null } });
  else postMessage({ id, found: { ...found, splats, rest } }, [splats.buffer, ...(rest ? [rest.buffer] : [])]);
}

function sort(id, direction) {
  const { positions } = kept.get(id);
  const order = orderOf(positions, direction, PER_ROW * Math.ceil(positions.length / 3 / PER_ROW));
  postMessage({ id, order, direction }, [order.buffer]);
}

function draw(id, camera) {
  const began = performance.now();
  const picture = drawGaussians(kept.get(id), camera);
  postMessage({ id, picture, camera, milliseconds: performance.now() - began }, [picture.buffer]);
}
