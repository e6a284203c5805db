// Parts of the page that small screens keep behind a button: the button names its part by aria-controls.

export function watchMenus() {
  for (const button of document.querySelectorAll('button[aria-expanded]')) watchMenu(button, document.getElementById(button.getAttribute('aria-controls')));
}

function watchMenu(button, menu) {
  const set = (open) => {
    button.setAttribute('aria-expanded', String(open));
    menu.classList.toggle('open', open);
  };
  button.addEventListener('click', () => {
    set(!menu.classList.contains('open'));
    if (menu.classList.contains('open')) menu.querySelector(':is(a, button, select):not([hidden])').focus();
  });
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || !menu.classList.contains('open')) return;
    set(false);
    button.focus();
  });
  document.addEventListener('click', ({ target }) => { // elsewhere, but shapes may be turned meanwhile
    if (!menu.contains(target) && !button.contains(target) && !target.closest('.stage')) set(false);
  });
}
