"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const told = JSON.parse($("described").textContent);
  const data = await unpacked($("data").textContent);
  const T = told.tokens.length;
  const array = (name) => {
    const { at, type, shape } = told.arrays[name];
    const kinds = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array };
    return new kinds[type](data, at, shape.reduce((a, b) => a * b, 1));
  };
  const keys = array(told.attention.keys);
  const weights = array(told.attention.weights);
  const pictures = array(told.attention.pictures);
  const [L, H, , K] = told.arrays[told.attention.keys].shape;
  const P = told.arrays[told.attention.pictures].shape[2];
  const state = { layer: 0, head: 0, token: Math.min(T - 1, 8), from: true, average: false, skipFirst: false, zoom: 1 };

  async function unpacked(text) {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  // ---- small things ------------------------------------------------------------------------

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = (name) => color(name).split(",").map(Number);
  const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toPrecision(2)) + " %";
  const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
  const visible = (text) => text.replace(/^ /, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  const name = (id) => visible(told.vocabulary[id]);
  const make = (tag, text, parent) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };
  const sized = (canvas, width, height, ratio = 1) => {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    return context;
  };
  const ratio = () => Math.min(2, window.devicePixelRatio || 1);

  /** The text as one span a token; `onToken` is told which one was pointed at. */
  function spans(box, onToken) {
    const made = told.tokens.map((text, index) => {
      const span = make("span", index ? text : "");
      if (!index) make("span", "⟨start⟩", span).className = "sign";
      span.dataset.token = index;
      return span;
    });
    box.replaceChildren(...made);
    const pointed = (event) => {
      const span = event.target.closest("[data-token]");
      if (span && box.contains(span)) onToken(Number(span.dataset.token));
    };
    box.addEventListener("mouseover", pointed);
    box.addEventListener("click", pointed);
    return made;
  }

  function arrows(element, move) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    element.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      move(...steps[event.key]);
    });
  }

  /** Calls `draw` at most once a frame, however often it is asked. */
  function onceAFrame(draw) {
    let waiting = false;
    return () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; draw(); });
    };
  }

  // ---- attention ---------------------------------------------------------------------------

  const share = (weight) => (weight / 255) ** 2;
  const heads = () => (state.average ? [...Array(H).keys()] : [state.head]);

  /** What `token` gives each token, or gets from each, as (T,) numbers. */
  function attention(token) {
    const found = new Float32Array(T);
    for (const head of heads()) {
      const base = (state.layer * H + head) * T * K;
      if (state.from) {
        for (let i = base + token * K, end = i + K; i < end; i++) found[keys[i]] += share(weights[i]);
      } else {
        for (let query = token; query < T; query++) {
          for (let i = base + query * K, end = i + K; i < end; i++) {
            if (keys[i] === token && weights[i]) found[query] += share(weights[i]);
          }
        }
      }
    }
    const many = heads().length;
    for (let t = 0; t < T; t++) found[t] /= many;
    if (state.skipFirst) found[0] = 0;
    return found;
  }

  const attentionSpans = spans($("attention-text"), (token) => { state.token = token; drawText(); });
  let tinted = [];

  const drawText = onceAFrame(() => {
    const found = attention(state.token);
    const most = Math.max(...found, 1e-6);
    const tint = rgb("--accent-rgb").join(",");
    for (const span of tinted) { span.style.background = ""; span.classList.remove("at"); }
    tinted = [attentionSpans[state.token]];
    let sum = 0;
    for (let t = 0; t < T; t++) {
      sum += found[t];
      if (found[t] < most / 100) continue;
      attentionSpans[t].style.background = `rgba(${tint},${0.85 * Math.sqrt(found[t] / most)})`;
      tinted.push(attentionSpans[t]);
    }
    attentionSpans[state.token].classList.add("at");
    const best = [...found.keys()].sort((a, b) => found[b] - found[a]).slice(0, 4).filter((t) => found[t] > 0);
    const list = best.map((t) => `${t ? visible(told.tokens[t]) : "⟨start⟩"} (${t}) ${percent(found[t])}`).join(", ");
    const rest = state.from && !state.skipFirst && sum < 0.985 ? `; in all the others ${percent(1 - sum)}` : "";
    $("head-readout").textContent = `Token ${state.token} ${state.from ? "looks at" : "is looked at by"}: ${list || "nothing kept"}${rest}`;
  });

  const mapCanvas = $("head-map");

  function drawMap() {
    const [r, g, b] = rgb("--accent-rgb");
    const many = heads().length;
    const sums = many > 1 ? new Float32Array(T * T) : null;
    const image = new ImageData(T, T);
    const pixels = new Uint32Array(image.data.buffer);
    const solid = (b << 16) | (g << 8) | r;
    const put = (at, value) => { pixels[at] = (Math.round(255 * Math.sqrt(value)) << 24) | solid; };
    for (const head of heads()) {
      const base = (state.layer * H + head) * T * K;
      for (let query = 0; query < T; query++) {
        for (let i = base + query * K, end = i + K; i < end && weights[i]; i++) {
          if (state.skipFirst && keys[i] === 0) continue;
          const at = query * T + keys[i];
          if (sums) sums[at] += share(weights[i]); else put(at, share(weights[i]));
        }
      }
    }
    if (sums) for (let at = 0; at < sums.length; at++) if (sums[at]) put(at, sums[at] / many);
    mapCanvas.width = mapCanvas.height = T;
    mapCanvas.getContext("2d").putImageData(image, 0, 0);
    zoom(0);
  }

  function zoom(step) {
    const least = Math.min(1, 600 / T);
    state.zoom = clamp(step ? state.zoom * 2 ** step : state.zoom, least, 32);
    mapCanvas.style.width = mapCanvas.style.height = `${Math.max(8, Math.round(T * state.zoom))}px`;
  }

  function drawModel() {
    const canvas = $("model-view");
    const cell = clamp(Math.floor(520 / H), 20, 56);
    const context = sized(canvas, H * cell, L * cell, ratio());
    canvas.style.width = `${H * cell}px`;
    canvas.style.height = `${L * cell}px`;
    const [r, g, b] = rgb("--accent-rgb");
    const small = new OffscreenCanvas(P, P);
    const image = new ImageData(P, P);
    for (let index = 0; index < L * H; index++) {
      const base = index * P * P;
      for (let at = 0; at < P * P; at++) image.data.set([r, g, b, pictures[base + at]], 4 * at);
      small.getContext("2d").putImageData(image, 0, 0);
      const x = (index % H) * cell, y = Math.floor(index / H) * cell;
      context.drawImage(small, x + 2, y + 2, cell - 4, cell - 4);
      context.strokeStyle = color("--line");
      context.strokeRect(x + 1.5, y + 1.5, cell - 3, cell - 3);
    }
    context.strokeStyle = color("--accent");
    context.lineWidth = 3;
    const column = state.average ? 0 : state.head, width = state.average ? H : 1;
    context.strokeRect(column * cell + 1.5, state.layer * cell + 1.5, width * cell - 3, cell - 3);
  }

  const drawHead = onceAFrame(() => {
    $("head-title").textContent = state.average ? `Layer ${state.layer}, average of ${H} heads` : `Layer ${state.layer}, head ${state.head}`;
    drawModel();
    drawMap();
    drawText();
  });

  function chooseHead(layer, head) {
    state.layer = clamp(layer, 0, L - 1);
    state.head = clamp(head, 0, H - 1);
    drawHead();
  }

  function startAttention() {
    state.zoom = clamp(Math.floor(560 / T), Math.min(1, 600 / T), 32);
    const canvas = $("model-view");
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      chooseHead(Math.floor(((event.clientY - box.top) / box.height) * L), Math.floor(((event.clientX - box.left) / box.width) * H));
    });
    arrows(canvas, (x, y) => chooseHead(state.layer + y, state.head + x));
    arrows($("attention-text"), (x, y) => {
      state.token = clamp(state.token + (x || 10 * y), 0, T - 1);
      attentionSpans[state.token].scrollIntoView({ block: "nearest" });
      drawText();
    });
    for (const radio of document.getElementsByName("direction")) {
      radio.addEventListener("change", () => { state.from = radio.value === "from"; drawText(); });
    }
    $("average").addEventListener("change", (event) => { state.average = event.target.checked; drawHead(); });
    $("skip-first").addEventListener("change", (event) => { state.skipFirst = event.target.checked; drawHead(); });
    $("zoom-in").addEventListener("click", () => zoom(1));
    $("zoom-out").addEventListener("click", () => zoom(-1));
    mapCanvas.addEventListener("mousemove", (event) => {
      const box = mapCanvas.getBoundingClientRect();
      const query = clamp(Math.floor(((event.clientY - box.top) / box.height) * T), 0, T - 1);
      const key = clamp(Math.floor(((event.clientX - box.left) / box.width) * T), 0, T - 1);
      state.token = query;
      const from = state.from;
      state.from = true;
      const value = attention(query)[key];
      state.from = from;
      $("map-readout").textContent = `${visible(told.tokens[query]) || "⟨start⟩"} (${query}) → ${key ? visible(told.tokens[key]) : "⟨start⟩"} (${key}): ${value ? percent(value) : "not among the strongest"}`;
      drawText();
    });
    drawHead();
  }

  // ---- logit lens --------------------------------------------------------------------------

  function startLens() {
    const ids = array(told.lens.ids), logprobs = array(told.lens.logprobs);
    const ranks = array(told.lens.ranks), target = array(told.lens.target), kl = array(told.lens.kl);
    const top = told.arrays[told.lens.ids].shape[2];
    const slider = $("lens-at");
    const columns = () => clamp(Math.floor((document.body.clientWidth - 120) / 92), 3, 16);
    const label = (row) => (row === 0 ? "embedding" : `layer ${row - 1}`);

    function draw() {
      const first = Number(slider.value), shown = Math.min(columns(), T - first);
      const table = $("lens-table"), rows = [];
      const head = document.createElement("tr");
      make("th", "after", head);
      for (let t = first; t < first + shown; t++) make("th", t ? visible(told.tokens[t]) : "⟨start⟩", head).title = `token ${t}`;
      rows.push(head);
      const tint = rgb("--accent-rgb").join(",");
      for (let row = L; row >= 0; row--) {
        const line = document.createElement("tr");
        make("th", label(row), line);
        for (let t = first; t < first + shown; t++) {
          const at = (row * T + t) * top;
          const cell = make("td", name(ids[at]), line);
          cell.style.background = `rgba(${tint},${0.8 * Math.exp(logprobs[at])})`;
          if (t + 1 < T && ids[at] === told.ids[t + 1]) cell.className = "right";
          cell.dataset.row = row;
          cell.dataset.token = t;
        }
        rows.push(line);
      }
      table.replaceChildren(...rows);
    }

    function tell(event) {
      const cell = event.target.closest("td");
      if (!cell) return;
      const row = Number(cell.dataset.row), t = Number(cell.dataset.token);
      const best = [];
      for (let i = 0; i < top; i++) best.push(`${name(ids[(row * T + t) * top + i])} ${percent(Math.exp(logprobs[(row * T + t) * top + i]))}`);
      const right = t + 1 < T ? `right: ${visible(told.tokens[t + 1])}, ${percent(Math.exp(target[row * T + t]))}, rank ${ranks[row * T + t] + 1}; ` : "";
      $("lens-readout").textContent = `After ${label(row)}, token ${t}: ${best.join(", ")}; ${right}divergence from the end ${kl[row * T + t].toFixed(2)} nats`;
    }

    slider.max = Math.max(0, T - columns());
    slider.addEventListener("input", onceAFrame(draw));
    const move = (step) => { slider.value = Number(slider.value) + step * Math.max(1, columns() - 1); draw(); };
    $("lens-left").addEventListener("click", () => move(-1));
    $("lens-right").addEventListener("click", () => move(1));
    $("lens-table").addEventListener("mouseover", tell);
    $("lens-table").addEventListener("click", tell);
    return draw;
  }

  // ---- probabilities -----------------------------------------------------------------------

  function startProbabilities() {
    const logprobs = array(told.probabilities.logprobs), entropy = array(told.probabilities.entropy);
    const ranks = array(told.probabilities.ranks), ids = array(told.probabilities.ids), tops = array(told.probabilities.top);
    const top = told.arrays[told.probabilities.ids].shape[1];
    let at = Math.min(1, T - 1);
    const made = spans($("probability-text"), choose);
    const bits = (nats) => nats / Math.LN2;

    function draw() {
      const warm = rgb("--warm-rgb").join(",");
      for (let t = 1; t < T; t++) made[t].style.background = `rgba(${warm},${0.8 * clamp(bits(-logprobs[t - 1]) / 12, 0, 1)})`;
      const canvas = $("strip"), width = canvas.clientWidth, height = 90;
      const context = sized(canvas, width, height, ratio());
      const most = Math.max(...Array.from(logprobs, (p) => bits(-p)), 1), step = width / Math.max(1, T - 1);
      context.fillStyle = `rgba(${warm},.75)`;
      for (let t = 1; t < T; t++) { const tall = (height * bits(-logprobs[t - 1])) / most; context.fillRect((t - 1) * step, height - tall, Math.max(step - 0.5, 0.5), tall); }
      context.strokeStyle = color("--accent");
      context.lineWidth = 1.5;
      context.beginPath();
      for (let t = 1; t < T; t++) context.lineTo((t - 0.5) * step, height - (height * bits(entropy[t - 1])) / most);
      context.stroke();
      const mean = logprobs.reduce((a, b) => a + b, 0) / Math.max(1, T - 1);
      $("legend").textContent = `The warmer a token, the less likely the model found it. Bars: surprisal of each token, at most ${most.toFixed(1)} bits; line: entropy of what was expected. Mean ${bits(-mean).toFixed(2)} bits a token.`;
      choose(at);
    }

    function choose(t) {
      made[at].classList.remove("at");
      at = clamp(t, 1, T - 1);
      made[at].classList.add("at");
      const box = $("probability-readout");
      const grid = document.createElement("div");
      grid.className = "choices";
      for (let i = 0; i < top; i++) {
        const p = Math.exp(tops[(at - 1) * top + i]);
        make("span", name(ids[(at - 1) * top + i]), grid);
        make("span", percent(p), grid);
        make("i", "", grid).style.width = `${100 * p}%`;
      }
      box.replaceChildren(make("span", `Token ${at} ${visible(told.tokens[at])}: ${percent(Math.exp(logprobs[at - 1]))}, ${bits(-logprobs[at - 1]).toFixed(2)} bits, rank ${ranks[at - 1] + 1}, entropy ${bits(entropy[at - 1]).toFixed(2)} bits. Expected:`), grid);
    }

    arrows($("probability-text"), (x, y) => { choose(at + (x || 10 * y)); made[at].scrollIntoView({ block: "nearest" }); });
    $("strip").addEventListener("mousemove", (event) => choose(1 + Math.floor((event.offsetX / $("strip").clientWidth) * (T - 1))));
    return draw;
  }

  // ---- sparsity ----------------------------------------------------------------------------

  function startSparsity() {
    if (!told.sparsity) {
      return () => { $("sparsity-hint").textContent = "This model has no ReLU: none of its feed-forward units is exactly zero."; $("sparsity-map").hidden = true; };
    }
    const shares = array(told.sparsity.shares), tokens = array(told.sparsity.tokens);
    const columns = told.arrays[told.sparsity.tokens].shape[1];

    function draw() {
      $("sparsity-hint").textContent = `Share of the ${told.sparsity.units} feed-forward units that are not zero, mean over the text. The others need not be read: that is what makes decoding fast.`;
      const most = Math.max(...shares, 1e-6);
      $("bars").replaceChildren(...Array.from(shares, (value, layer) => {
        const bar = document.createElement("div");
        bar.className = "bar";
        make("span", `layer ${layer}`, bar);
        make("i", "", bar).style.width = `${(100 * value) / most}%`;
        make("span", `${percent(value)}, ${told.sparsity.never[layer]} never`, bar);
        return bar;
      }));
      const canvas = $("sparsity-map");
      canvas.width = columns;
      canvas.height = L;
      const image = new ImageData(columns, L), [r, g, b] = rgb("--accent-rgb");
      const highest = tokens.reduce((a, v) => Math.max(a, v), 1e-6);
      for (let at = 0; at < L * columns; at++) image.data.set([r, g, b, Math.round((255 * tokens[at]) / highest)], 4 * at);
      canvas.getContext("2d").putImageData(image, 0, 0);
      canvas.style.imageRendering = "pixelated";
      canvas.style.height = `${clamp(12 * L, 60, 320)}px`;
    }

    $("sparsity-map").addEventListener("mousemove", (event) => {
      const box = $("sparsity-map").getBoundingClientRect();
      const t = clamp(Math.floor((event.offsetX / box.width) * columns), 0, columns - 1);
      const layer = clamp(Math.floor((event.offsetY / box.height) * L), 0, L - 1);
      $("sparsity-readout").textContent = `Layer ${layer}, token ${t} ${t ? visible(told.tokens[t]) : "⟨start⟩"}: ${percent(tokens[layer * columns + t])} active`;
    });
    return draw;
  }

  // ---- the page ----------------------------------------------------------------------------

  function startTabs(draws) {
    const tabs = [...document.querySelectorAll("[role=tab]")];
    const show = (tab, focus) => {
      for (const other of tabs) {
        other.setAttribute("aria-selected", String(other === tab));
        other.tabIndex = other === tab ? 0 : -1;
        $(other.getAttribute("aria-controls")).hidden = other !== tab;
      }
      if (focus) tab.focus();
      draws[tab.getAttribute("aria-controls")]();
    };
    tabs.forEach((tab, index) => {
      tab.addEventListener("click", () => show(tab));
      arrows(tab, (x) => { if (x) show(tabs[(index + x + tabs.length) % tabs.length], true); });
    });
    const again = onceAFrame(() => show(tabs.find((tab) => tab.getAttribute("aria-selected") === "true")));
    window.addEventListener("resize", again);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  }

  $("title").textContent = `${told.model} · ${T} tokens · ${L} layers of ${H} heads`;
  document.querySelector("main").hidden = false;
  startAttention();
  startTabs({ attention: drawHead, lens: startLens(), probabilities: startProbabilities(), sparsity: startSparsity() });
  $("waiting").remove();
})();
