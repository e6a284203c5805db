// Pointers, wheel and fingers on a viewport: one turns, two pinch and move; on a mouse the right button, the middle one or Shift moves.

export function watchGestures(pane, orbit, changed) {
  const pointers = new Map(); // id -> [x, y]

  pane.addEventListener('pointerdown', (event) => {
    if (pointers.size >= 2) return;
    pane.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
  });

  pane.addEventListener('pointermove', (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY];
    const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
    if (!dx && !dy) return;
    if (pointers.size === 2) pinch(event.pointerId, before, now);
    else if (event.shiftKey || event.buttons & 6) move(dx, dy, 'pan');
    else turn(dx, dy);
    pointers.set(event.pointerId, now);
  });

  for (const end of ['pointerup', 'pointercancel', 'lostpointercapture']) {
    pane.addEventListener(end, (event) => pointers.delete(event.pointerId));
  }

  pane.addEventListener('wheel', (event) => {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 24 : 1;
    orbit.zoom(Math.exp(-0.0015 * Math.max(-240, Math.min(240, event.deltaY * lines))));
    changed('zoom');
  }, { passive: false });

  pane.addEventListener('contextmenu', (event) => event.preventDefault());

  function turn(dx, dy) {
    const perPixel = Math.PI / Math.min(pane.clientWidth, pane.clientHeight); // half a turn over the short side
    orbit.orbit(-dx * perPixel, dy * perPixel);
    changed('orbit');
  }

  function move(dx, dy, view) {
    orbit.pan(dx / pane.clientHeight, -dy / pane.clientHeight);
    changed(view);
  }

  function pinch(id, before, now) {
    const [other] = [...pointers].filter(([key]) => key !== id).map(([, place]) => place);
    const spread = (place) => Math.max(Math.hypot(place[0] - other[0], place[1] - other[1]), 1);
    orbit.zoom(spread(now) / spread(before));
    move((now[0] - before[0]) / 2, (now[1] - before[1]) / 2, 'zoom'); // the middle of the two fingers
  }
}
