(() => {
  const root = document.getElementById("points");
  const data = JSON.parse(document.getElementById("points-data").textContent);
  const svg = root.querySelector("svg"), name = "http://www.w3.org/2000/svg", W = 640, H = 480, EDGE = 18;
  const points = data.points, byReward = points.map((_, i) => i).sort((a, b) => points[a].reward - points[b].reward || a - b);
  const partner = new Map(points.map((p, i) => [p.role + p.seed, i]));
  let layout = data.layouts[0].name, chosen = 0;
  const add = (tag, attributes, parent) => {
    const made = document.createElementNS(name, tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return parent.appendChild(made);
  };
  const place = i => { const [x, y] = points[i].at[layout]; return [EDGE + x * (W - 2 * EDGE), H - EDGE - y * (H - 2 * EDGE)]; };
  const tie = add("line", {class: "tie"}, svg);
  const marks = points.map(p => p.role === "before"
    ? add("circle", {class: "dot", r: 5, fill: p.colour}, svg)
    : add("path", {class: "cross", d: "M-4 -4L4 4M-4 4L4 -4", stroke: p.colour}, svg));
  const ring = add("circle", {class: "chosen", r: 9}, svg);
  const other = i => partner.get((points[i].role === "before" ? "after" : "before") + points[i].seed);
  function draw() {
    marks.forEach((mark, i) => mark.setAttribute("transform", `translate(${place(i).join(" ")})`));
    show(chosen);
  }
  function show(i) {
    chosen = i;
    const [x, y] = place(i), [u, v] = place(other(i));
    ring.setAttribute("cx", x); ring.setAttribute("cy", y);
    for (const [key, value] of Object.entries({x1: x, y1: y, x2: u, y2: v})) tie.setAttribute(key, value);
    for (const k of [i, other(i)]) {
      const p = points[k], cell = root.querySelector(`[data-role="${p.role}"]`), shape = cell.querySelector(".shape");
      const column = p.picture % data.columns, row = Math.floor(p.picture / data.columns);
      shape.style.backgroundPosition = `${100 * column / Math.max(1, data.columns - 1)}% ${100 * row / Math.max(1, data.rows - 1)}%`;
      shape.classList.toggle("here", k === i);
      shape.setAttribute("aria-label", `Shape of seed ${p.seed} ${p.role} tuning`);
      cell.querySelector("output").textContent = `${p.role}: ${p.reward.toFixed(2)}`;
    }
    const p = points[i], rise = points[partner.get("after" + p.seed)].reward - points[partner.get("before" + p.seed)].reward;
    const rank = byReward.indexOf(i) + 1;
    root.querySelector("#points-said").textContent = `Seed ${p.seed}, ${p.role} tuning: reward ${p.reward.toFixed(2)}, ` +
      `${rank} of ${points.length} from the lowest; tuning changed it by ${rise >= 0 ? "+" : ""}${rise.toFixed(2)}.`;
    root.dataset.chosen = `${p.role} ${p.seed}`;
  }
  function toward(dx, dy) {
    const [x, y] = place(chosen);
    let best = null, least = Infinity;
    points.forEach((_, i) => {
      const [u, v] = place(i), along = (u - x) * dx + (v - y) * dy, across = Math.abs((u - x) * dy) + Math.abs((v - y) * dx);
      if (i !== chosen && along > 0 && across <= along && along + across < least) { best = i; least = along + across; }
    });
    if (best !== null) show(best);
  }
  const step = by => show(byReward[Math.min(points.length - 1, Math.max(0, byReward.indexOf(chosen) + by))]);
  const keys = {
    ArrowLeft: () => toward(-1, 0), ArrowRight: () => toward(1, 0), ArrowUp: () => toward(0, -1), ArrowDown: () => toward(0, 1),
    PageUp: () => step(1), PageDown: () => step(-1), Home: () => step(-points.length), End: () => step(points.length),
    Enter: () => show(other(chosen)), " ": () => show(other(chosen)),
  };
  svg.addEventListener("keydown", event => {
    if (!keys[event.key] || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  function near(event, reach) {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * W / box.width, y = (event.clientY - box.top) * H / box.height;
    const gap = i => Math.hypot(place(i)[0] - x, place(i)[1] - y);
    const best = points.map((_, i) => i).reduce((a, b) => gap(b) < gap(a) ? b : a);
    if (gap(best) < reach * W / box.width) show(best);
  }
  svg.addEventListener("pointermove", event => event.pointerType === "mouse" && near(event, 14));
  svg.addEventListener("click", event => near(event, 44));
  root.querySelectorAll("button").forEach(button => button.addEventListener("click", () => keys[button.dataset.key]()));
  root.querySelectorAll("input").forEach(input => input.addEventListener("change", () => { layout = input.value; draw(); }));
  chosen = byReward[0];
  draw();
})();
