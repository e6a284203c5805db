// Turntable videos: one element for each shape, both in step. A turn of the camera about the vertical axis is a turn of the table, so that
// the same gestures and keys work; the distance enlarges and the target moves the image.

import { t } from './texts.js';

const APART = 0.05; // seconds by which two videos may differ while they play
const PATIENCE = 20_000; // milliseconds until the first image

export class Videos {
  playing = false;
  shown = {}; // side -> shape

  // panes: {left, right}: where the elements go; changed(playing): the state has changed.
  constructor(panes, changed) {
    Object.assign(this, { panes, changed });
  }

  async keep(data) {
    const video = document.createElement('video');
    Object.assign(video, { muted: true, loop: true, playsInline: true, preload: 'auto', disablePictureInPicture: true, disableRemotePlayback: true, tabIndex: -1 });
    video.setAttribute('aria-hidden', 'true');
    const address = URL.createObjectURL(new Blob([data], { type: 'video/mp4' }));
    const shape = { video, address, ball: { centre: [0, 0, 0], radius: 1 }, bytes: data.byteLength };
    try {
      await firstPicture(video, address);
    } catch (error) {
      this.drop(shape);
      throw error;
    }
    shape.bytes += 40 * video.videoWidth * video.videoHeight; // images that the decoder keeps
    return shape;
  }

  drop({ video, address }) {
    video.remove();
    video.removeAttribute('src');
    video.load();
    URL.revokeObjectURL(address);
  }

  // Puts a pair's videos, {left, right} or {}, into the panes. They begin together, and play unless calm.
  show(shapes, calm) {
    this.playing = false;
    for (const { video } of Object.values(this.shown)) {
      video.pause();
      video.remove();
    }
    this.shown = shapes;
    for (const [side, { video }] of Object.entries(shapes)) {
      this.panes[side].prepend(video);
      seek(video, 0);
    }
    if (this.first && !calm) this.play();
    else this.changed(false);
  }

  get first() {
    return Object.values(this.shown)[0]?.video;
  }

  play() {
    this.playing = true;
    for (const { video } of Object.values(this.shown)) {
      video.playbackRate = (video.duration / this.first.duration) || 1; // one turn takes both as long
      video.play().catch(() => this.pause()); // the browser forbids it, or the page has gone on
    }
    this.changed(true);
  }

  pause() {
    this.playing = false;
    for (const { video } of Object.values(this.shown)) video.pause();
    this.changed(false);
  }

  // Share of the turn, 0..1, that is seen.
  get turn() {
    return this.first ? this.first.currentTime / this.first.duration : 0;
  }

  // Sets time, size and place from the camera; while playing, keeps the second in step with the first.
  draw(orbit) {
    const turn = this.playing ? this.turn : ((-orbit.yaw / (2 * Math.PI)) % 1 + 1) % 1;
    for (const { video } of Object.values(this.shown)) {
      const time = Math.min(turn * video.duration, video.duration - 1e-3);
      if (!this.playing || (video !== this.first && distance(video, time) > APART)) seek(video, time);
      const { scale, x, y } = orbit.flatView();
      const { clientHeight } = video;
      video.style.transform = `translate(${x * clientHeight}px, ${y * clientHeight}px) scale(${scale})`;
    }
  }
}

// Seconds between a video's time and another, the short way round.
function distance(video, time) {
  const apart = Math.abs(video.currentTime - time);
  return Math.min(apart, video.duration - apart);
}

// Goes to a time; while a browser still looks for an earlier one, only the last counts.
function seek(video, time) {
  video.dataset.wanted = time;
  if (video.seeking) {
    video.onseeked = () => seek(video, Number(video.dataset.wanted));
    return;
  }
  video.onseeked = null;
  if (Math.abs(video.currentTime - time) > 1e-3) video.currentTime = time;
}

function firstPicture(video, address) {
  return new Promise((resolve, reject) => {
    const fail = () => reject(new Error(t('error.video')));
    video.onloadeddata = () => (video.videoWidth && Number.isFinite(video.duration) && video.duration > 0 ? resolve() : fail());
    video.onerror = fail;
    setTimeout(fail, PATIENCE);
    video.src = address;
  });
}
