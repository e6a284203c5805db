// The workers that read Gaussians and, beside the page, put them in order or draw them.

import { t } from './texts.js';

const WORKER = '/static/gaussian_worker.js';

export class GaussianWorkers {
  last = 0; // id
  reading = new Map(); // id -> {resolve, reject}

  // heard(message): what comes after the reading.
  constructor(count, heard) {
    this.heard = heard;
    this.workers = Array.from({ length: count }, () => new Worker(WORKER, { type: 'module' }));
    for (const worker of this.workers) {
      worker.onmessage = ({ data }) => this.receive(data);
      worker.onerror = () => this.fail();
    }
  }

  // Reads a file; the promise holds {id, count, degree, ball, splats, rest}, the last two null where the worker keeps them for drawing.
  read(buffer, draws) {
    this.last += 1;
    const id = this.last;
    return new Promise((resolve, reject) => {
      if (this.broken) reject(this.broken);
      this.reading.set(id, { resolve, reject });
      this.tell(id, { buffer, draws }, [buffer]);
    });
  }

  receive({ id, found, error, ...rest }) {
    const reader = this.reading.get(id);
    this.reading.delete(id);
    if (error) reader?.reject(new Error(t('error.shape')));
    else if (found) reader?.resolve({ id, ...found });
    else this.heard({ id, ...rest });
  }

  fail() {
    this.broken = new Error(t('error.worker'));
    for (const { reject } of this.reading.values()) reject(this.broken);
  }

  // Without a message: the shape is forgotten.
  tell(id, message = {}, transfer = []) {
    this.workers[id % this.workers.length].postMessage({ id, ...message }, transfer);
  }

  end() {
    for (const worker of this.workers) worker.terminate();
  }
}
