// The keyboard: which key means what. A held key turns and zooms, but answers only once.

const STEP = Math.PI / 18; // 10 degrees

const ONCE = {
  ArrowLeft: ['choose', 'left'], ArrowRight: ['choose', 'right'], ArrowDown: ['choose', 'tie'], ArrowUp: ['choose', 'bad'],
  s: ['skip'], u: ['undo'], '?': ['openHelp'], n: ['normals'], w: ['wireframe'], m: ['clay'], p: ['play'], r: ['render'],
  c: ['comment'], a: ['ownAnswers'], Backspace: ['questionBack'], Escape: ['backToWork'],
  1: ['view', 'front'], 2: ['view', 'left'], 3: ['view', 'right'], 4: ['view', 'back'], 5: ['view', 'above'], 6: ['view', 'below'],
  0: ['reset'], Home: ['reset'],
};

const ALONE = { // where one shape is shown: other answers, and digits that are scores are no views
  thumbs: { ArrowLeft: null, ArrowRight: null, ArrowUp: ['choose', 'up'], ArrowDown: ['choose', 'down'] },
  scores: { ArrowLeft: null, ArrowRight: null, ArrowUp: null, ArrowDown: null, 6: null, ...Object.fromEntries([...'012345'].map((score) => [score, ['choose', score]])) },
};

const HELD = {
  '+': ['zoom', 1.15], '=': ['zoom', 1.15], '-': ['zoom', 1 / 1.15], _: ['zoom', 1 / 1.15],
  j: ['pan', -0.05, 0], l: ['pan', 0.05, 0], i: ['pan', 0, 0.05], k: ['pan', 0, -0.05],
};

const TURNS = { ArrowLeft: ['orbit', -STEP, 0], ArrowRight: ['orbit', STEP, 0], ArrowUp: ['orbit', 0, STEP], ArrowDown: ['orbit', 0, -STEP] };

// command(name, ...arguments) is called for a key that means something. scale: what is asked, 'pairs', 'thumbs' or 'scores'.
export function watchKeys(command, scale = 'pairs') {
  const answers = { ...ONCE, ...ALONE[scale] };
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (document.querySelector('dialog[open]') || event.target.closest?.('input, select, textarea')) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const held = (event.shiftKey && TURNS[key]) || HELD[key];
    const once = held ? null : answers[key];
    if (!held && !once) return;
    event.preventDefault();
    if (held || !event.repeat) command(...(held || once));
  });
}
