"use strict";
// The images of all latents, views and strengths are tiles of one image. The strength is its column; the rows
// are the latents, each with all of its views.
const slider = document.getElementById("strength");
const shown = document.getElementById("value");
const views = document.querySelectorAll(".view");
const rows = DATA.coordinates.length * DATA.views;
const columns = DATA.strengths.length;
for (const view of views) {
  view.style.backgroundImage = `url(${DATA.sprite})`;
  view.style.backgroundSize = `${columns * 100}% ${rows * 100}%`;
}
function show() {
  const column = Number(slider.value);
  const strength = DATA.strengths[column];
  shown.textContent = strength === 0 ? "0 (no steering)" : `${strength.toFixed(1)} standard deviations`;
  for (const view of views) {
    const row = Number(view.dataset.latent) * DATA.views + Number(view.dataset.view);
    view.style.backgroundPosition = `${(column / (columns - 1)) * 100}% ${(row / (rows - 1)) * 100}%`;
    const note = view.parentElement.querySelector(".note");
    const coordinate = DATA.coordinates[view.dataset.latent];
    note.textContent = strength > 0 && coordinate < strength ? "moved" : "as generated";
  }
}
slider.addEventListener("input", show);
show();
