// A viewer for coloured meshes: WebGL2, no library, no network. Reads window.MESHES = [{name, positions, faces, layers}], see mesh_page.py.
"use strict";
(() => {
  const canvas = document.querySelector("canvas"), status = document.getElementById("status");
  const gl = canvas.getContext("webgl2", { antialias: true });
  if (!gl) { status.textContent = "This browser offers no WebGL2, so the mesh cannot be turned here; the report's pictures show the same."; return; }

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const VERTEX = `#version 300 es
    in vec3 position; in vec3 normal; in vec3 colour;
    uniform mat3 turn; uniform float zoom; uniform vec2 aspect;
    out vec3 vNormal; out vec3 vColour;
    void main() {
      vec3 p = turn * position; vNormal = turn * normal; vColour = colour;
      gl_Position = vec4(p.xy * zoom * aspect, -p.z * 0.5, 1.0 - 0.25 * p.z);
    }`;
  const FRAGMENT = `#version 300 es
    precision mediump float;
    in vec3 vNormal; in vec3 vColour; out vec4 pixel;
    void main() {
      vec3 n = normalize(vNormal);
      float light = 0.35 + 0.55 * max(dot(n, normalize(vec3(0.35, 0.5, 0.8))), 0.0) + 0.1 * max(n.z, 0.0);
      pixel = vec4(vColour * light, 1.0);
    }`;

  function shader(kind, source) {
    const made = gl.createShader(kind);
    gl.shaderSource(made, source);
    gl.compileShader(made);
    if (!gl.getShaderParameter(made, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(made));
    return made;
  }
  const program = gl.createProgram();
  gl.attachShader(program, shader(gl.VERTEX_SHADER, VERTEX));
  gl.attachShader(program, shader(gl.FRAGMENT_SHADER, FRAGMENT));
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  gl.useProgram(program);
  gl.enable(gl.DEPTH_TEST);
  const at = (name) => gl.getUniformLocation(program, name);
  const where = { turn: at("turn"), zoom: at("zoom"), aspect: at("aspect") };

  function vertexNormals(p, f) { // area-weighted
    const n = new Float32Array(p.length);
    for (let i = 0; i < f.length; i += 3) {
      const [a, b, c] = [3 * f[i], 3 * f[i + 1], 3 * f[i + 2]];
      const u = [p[b] - p[a], p[b + 1] - p[a + 1], p[b + 2] - p[a + 2]], v = [p[c] - p[a], p[c + 1] - p[a + 1], p[c + 2] - p[a + 2]];
      const w = [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]];
      for (const k of [a, b, c]) for (let j = 0; j < 3; j++) n[k + j] += w[j];
    }
    for (let i = 0; i < n.length; i += 3) {
      const length = Math.hypot(n[i], n[i + 1], n[i + 2]) || 1;
      for (let j = 0; j < 3; j++) n[i + j] /= length;
    }
    return n;
  }

  function attribute(name, data, type, normalised) {
    const place = gl.getAttribLocation(program, name), buffer = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, 3, type, normalised, 0, 0);
  }

  function upload(mesh) {
    const positions = Float32Array.from(new Int16Array(bytes(mesh.positions).buffer), (v) => v / 32767);
    const faces = new Uint32Array(bytes(mesh.faces).buffer), normals = vertexNormals(positions, faces);
    mesh.layers.forEach((layer) => {
      layer.array = gl.createVertexArray();
      gl.bindVertexArray(layer.array);
      attribute("position", positions, gl.FLOAT, false);
      attribute("normal", normals, gl.FLOAT, false);
      attribute("colour", bytes(layer.colours), gl.UNSIGNED_BYTE, true);
      gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
      gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, faces, gl.STATIC_DRAW);
    });
    mesh.count = faces.length;
  }

  const view = { yaw: 0.35, pitch: 0.1, zoom: 1.6 };
  const meshChoice = document.getElementById("mesh"), layerChoice = document.getElementById("layer"), legend = document.getElementById("legend");
  let waiting = false;

  function draw() {
    waiting = false;
    const mesh = MESHES[meshChoice.value], layer = mesh.layers[layerChoice.value];
    if (mesh.count === undefined) upload(mesh);
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    const [sy, cy, sp, cp] = [Math.sin(view.yaw), Math.cos(view.yaw), Math.sin(view.pitch), Math.cos(view.pitch)];
    gl.uniformMatrix3fv(where.turn, false, [cy, sp * sy, -cp * sy, 0, cp, sp, sy, -sp * cy, cp * cy]); // columns: pitch after yaw
    const least = Math.min(canvas.width, canvas.height);
    gl.uniform2f(where.aspect, least / canvas.width, least / canvas.height);
    gl.uniform1f(where.zoom, view.zoom);
    gl.bindVertexArray(layer.array);
    gl.drawElements(gl.TRIANGLES, mesh.count, gl.UNSIGNED_INT, 0);
    canvas.setAttribute("aria-label", `${mesh.name}, ${layer.name}; yaw ${Math.round((view.yaw * 180) / Math.PI)} degrees`);
  }
  const redraw = () => { if (!waiting) { waiting = true; requestAnimationFrame(draw); } };

  function showLegend() {
    legend.replaceChildren(...MESHES[meshChoice.value].layers[layerChoice.value].legend.map(([text, colour]) => {
      const item = document.createElement("li"), patch = document.createElement("span");
      patch.style.background = colour;
      item.append(patch, text);
      return item;
    }));
  }
  function showLayers() {
    const kept = layerChoice.selectedIndex;
    layerChoice.replaceChildren(...MESHES[meshChoice.value].layers.map((layer, i) => new Option(layer.name, i)));
    layerChoice.selectedIndex = Math.min(Math.max(kept, 0), layerChoice.length - 1);
    showLegend();
    redraw();
  }
  function move(yaw, pitch, factor) {
    view.yaw += yaw;
    view.pitch = Math.min(1.5, Math.max(-1.5, view.pitch + pitch));
    view.zoom = Math.min(8, Math.max(0.5, view.zoom * factor));
    redraw();
  }

  const KEYS = {
    ArrowLeft: [-0.1, 0, 1], ArrowRight: [0.1, 0, 1], ArrowUp: [0, -0.1, 1], ArrowDown: [0, 0.1, 1],
    "+": [0, 0, 1.1], "=": [0, 0, 1.1], "-": [0, 0, 1 / 1.1],
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Home") { Object.assign(view, { yaw: 0, pitch: 0, zoom: 1.6 }); redraw(); }
    else if (KEYS[event.key] && !event.ctrlKey && !event.metaKey) move(...KEYS[event.key]);
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) move(event.movementX / 150, event.movementY / 150, 1); });
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); move(0, 0, Math.exp(-event.deltaY / 600)); }, { passive: false });
  window.addEventListener("resize", redraw);
  meshChoice.replaceChildren(...MESHES.map((mesh, i) => new Option(mesh.name, i)));
  meshChoice.addEventListener("change", showLayers);
  layerChoice.addEventListener("change", () => { showLegend(); redraw(); });
  showLayers();
})();
