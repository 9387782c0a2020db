"use strict";
(() => {
  const { createApp, h, nextTick, onMounted, reactive, ref, resolveComponent, watch } = Vue;
  const ALTERNATIVES = 5;

  /** A Vuetify component as a render function: v("btn", {…}, "text" or [children] or {slots}). */
  const v = (name, props = {}, children) => {
    const slots = typeof children === "string" || Array.isArray(children) ? { default: () => children } : children;
    return h(resolveComponent(`v-${name}`), props, slots);
  };

  // ---- the request ---------------------------------------------------------------------------

  const FIELDS = [
    { key: "max_tokens", label: "Tokens at most", start: 120, min: 1, step: 1 },
    { key: "temperature", label: "Temperature", start: 0.7, min: 0, max: 2, step: 0.1 },
    { key: "top_p", label: "Top p", start: 0.95, min: 0, max: 1, step: 0.05 },
    { key: "top_k", label: "Top k (0: all)", start: 0, min: 0, step: 1 },
    { key: "min_p", label: "Min p", start: 0, min: 0, max: 1, step: 0.05 },
    { key: "seed", label: "Seed (empty: random)", start: "", min: 0, step: 1, optional: true },
    { key: "stop", label: "Stop at", start: "", text: true, optional: true },
  ];

  const settings = () => Object.fromEntries([["model", ""], ...FIELDS.map(({ key, start }) => [key, start])]);

  function body(pane, prompt, extra = {}) {
    const sent = { model: pane.settings.model, prompt };
    for (const { key, text, optional } of FIELDS) {
      const value = pane.settings[key];
      if (optional && (value === "" || value === null)) continue;
      sent[key] = text ? value.replaceAll("\\n", "\n") : Number(value);
    }
    return { ...sent, ...extra };
  }

  const address = () => new URL("v1/completions", location.href).href;

  function asCurl(request) {
    const quoted = JSON.stringify(request, null, 2).replaceAll("'", "'\\''");
    const key = state.key ? ' \\\n  -H "Authorization: Bearer $OPTLM_API_KEY"' : "";
    return `curl ${address()} \\\n  -H "Content-Type: application/json"${key} \\\n  -d '${quoted}'`;
  }

  function asPython(request) {
    const own = ["top_k", "min_p"];
    const literal = (value) => (typeof value === "string" ? JSON.stringify(value) : String(value));
    const named = Object.entries(request).filter(([key]) => !own.includes(key)).map(([key, value]) => `    ${key}=${literal(value)},`);
    const extra = own.filter((key) => key in request).map((key) => `"${key}": ${request[key]}`).join(", ");
    return [
      ...(state.key ? ["import os", ""] : []),
      "from openai import OpenAI",
      "",
      `client = OpenAI(base_url=${JSON.stringify(new URL("v1", location.href).href)}, api_key=${state.key ? 'os.environ["OPTLM_API_KEY"]' : '"none"'})`,
      "completion = client.completions.create(",
      ...named,
      ...(extra ? [`    extra_body={${extra}},`] : []),
      ")",
      "print(completion.choices[0].text)",
    ].join("\n");
  }

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        if (line === "data: [DONE]") return;
        yield JSON.parse(line.slice(6));
      }
    }
  }

  const headers = () => ({ "Content-Type": "application/json", ...(state.key ? { Authorization: `Bearer ${state.key}` } : {}) });

  async function refusal(response) {
    const text = await response.text();
    try {
      return JSON.parse(text).error.message;
    } catch {
      return `${response.status} ${text.slice(0, 300)}`;
    }
  }

  // ---- the state -----------------------------------------------------------------------------

  const newPane = () => reactive({ settings: settings(), tokens: [], prompt: "", at: -1, running: null, note: "", problem: "" });
  const state = reactive({ prompt: "Once upon a time", panes: [newPane()], models: [], key: "", askKey: false, problem: "", exporting: false, dark: false });

  async function loadModels() {
    state.problem = "";
    try {
      const response = await fetch("v1/models", { headers: headers() });
      if (response.status === 401) state.askKey = true;
      if (!response.ok) throw new Error(await refusal(response));
      state.models = (await response.json()).data.map((model) => model.id);
      for (const pane of state.panes) pane.settings.model ||= state.models[0];
    } catch (error) {
      state.problem = `The server did not list its models: ${error.message}`;
    }
  }

  async function run(pane) {
    pane.running?.abort();
    const mine = new AbortController();
    Object.assign(pane, { tokens: [], prompt: state.prompt, at: -1, note: "", problem: "", running: mine });
    const begun = performance.now();
    let first = 0, reason = null;
    try {
      const request = body(pane, state.prompt, { stream: true, logprobs: ALTERNATIVES });
      const response = await fetch("v1/completions", { method: "POST", headers: headers(), body: JSON.stringify(request), signal: mine.signal });
      if (response.status === 401) state.askKey = true;
      if (!response.ok) throw new Error(await refusal(response));
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        first ||= performance.now();
        for (const choice of event.choices ?? []) {
          reason = choice.finish_reason ?? reason;
          pane.tokens.push(...read(choice));
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") pane.problem = error.message;
      else reason = "stopped";
    }
    if (pane.running !== mine) return;
    pane.running = null;
    const seconds = (performance.now() - first) / 1000, count = pane.tokens.length;
    if (count) pane.note = `${count} tokens, ${(Math.max(0, count - 1) / Math.max(seconds, 1e-3)).toFixed(0)} tokens/s, first after ${(first - begun).toFixed(0)} ms; ended by ${reason ?? "the server"}`;
  }

  /** The tokens of one event, with what else could have stood there. */
  function read(choice) {
    const told = choice.logprobs;
    if (!told?.tokens?.length) return choice.text ? [{ text: choice.text, logprob: null, others: [] }] : [];
    return told.tokens.map((text, i) => ({
      text,
      logprob: told.token_logprobs[i],
      others: Object.entries(told.top_logprobs?.[i] ?? {}).sort((a, b) => b[1] - a[1]),
    }));
  }

  const runAll = () => Promise.all(state.panes.map(run));
  const stopAll = () => state.panes.forEach((pane) => pane.running?.abort());
  const anyRunning = () => state.panes.some((pane) => pane.running);

  function compare() {
    if (state.panes.length > 1) { state.panes.pop().running?.abort(); return; }
    const other = newPane();
    Object.assign(other.settings, state.panes[0].settings);
    if (state.models.length > 1) other.settings.model = state.models.find((model) => model !== other.settings.model);
    else other.settings.temperature = Number(other.settings.temperature) ? 0 : 0.7;
    state.panes.push(other);
  }

  // ---- looking -------------------------------------------------------------------------------

  const shown = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ /, "·");
  const percent = (p) => `${p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toPrecision(2)} %`;
  const bits = (nats) => nats / Math.LN2;
  const WARM = { light: "200, 85, 61", dark: "235, 130, 105" };
  const warm = () => WARM[state.dark ? "dark" : "light"];

  function tint(token) {
    if (token.logprob === null) return {};
    return { background: `rgba(${warm()}, ${0.75 * Math.min(1, bits(-token.logprob) / 10)})` };
  }

  /** A lower bound in bits: what is not among the alternatives counts as one. */
  function entropy(token) {
    const known = token.others.map(([, logprob]) => Math.exp(logprob));
    const rest = Math.max(0, 1 - known.reduce((a, b) => a + b, 0));
    return [...known, rest].reduce((sum, p) => sum - (p > 0 ? p * Math.log2(p) : 0), 0);
  }

  function drawStrip(canvas, pane) {
    if (!canvas) return;
    const ratio = Math.min(2, devicePixelRatio || 1), width = canvas.clientWidth, height = 56;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const surprisals = pane.tokens.map((token) => bits(-(token.logprob ?? 0)));
    const entropies = pane.tokens.map(entropy);
    const most = Math.max(3, ...surprisals, ...entropies), step = width / Math.max(24, pane.tokens.length);
    context.fillStyle = `rgba(${warm()}, .8)`;
    surprisals.forEach((value, i) => context.fillRect(i * step, height * (1 - value / most), Math.max(1, step - 1), (height * value) / most));
    context.strokeStyle = getComputedStyle(canvas).color;
    context.lineWidth = 1.5;
    context.beginPath();
    entropies.forEach((value, i) => context.lineTo((i + 0.5) * step, height * (1 - value / most)));
    context.stroke();
  }

  const Output = {
    props: ["pane", "name"],
    setup({ pane, name }) {
      const canvas = ref(null);
      const redraw = () => nextTick(() => drawStrip(canvas.value, pane));
      watch(() => [pane.tokens.length, state.dark, state.panes.length], redraw);
      onMounted(() => { redraw(); window.addEventListener("resize", redraw); });
      const choose = (event) => {
        const at = event.target.dataset?.at;
        if (at !== undefined) pane.at = Number(at);
      };
      const keys = (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!step || !pane.tokens.length) return;
        event.preventDefault();
        pane.at = Math.max(0, Math.min(pane.tokens.length - 1, pane.at + step));
      };
      return () => {
        const token = pane.tokens[pane.at];
        return h("div", { "data-pane": name }, [
          pane.problem && v("alert", { type: "error", variant: "tonal", class: "mb-2", role: "alert" }, pane.problem),
          v("card", { variant: "outlined" }, [
            h("div", { class: "output", tabindex: 0, role: "group", "aria-label": `${name}; left and right arrow keys move from token to token`, onMouseover: choose, onClick: choose, onKeydown: keys }, [
              h("span", { class: "prompt" }, pane.prompt),
              ...pane.tokens.map((one, at) => h("span", { class: ["token", { at: at === pane.at }], style: tint(one), "data-at": at, key: at }, one.text)),
            ]),
          ]),
          h("canvas", { class: "strip", ref: canvas, role: "img", "aria-label": "Surprisal of each token as bars, entropy as a line" }),
          h("div", { class: "quiet" }, pane.note || (pane.running ? "…" : "Bars: surprisal. Line: entropy, at least. Point at a token, or use the arrow keys.")),
          h("div", { class: "choices mt-2", "aria-live": "polite" }, token ? [
            [token.text, token.logprob ?? 0, true],
            ...token.others.filter(([text]) => text !== token.text).map(([text, logprob]) => [text, logprob, false]),
          ].flatMap(([text, logprob, chosen]) => [
            h("span", { class: { chosen } }, shown(text)),
            h("span", percent(Math.exp(logprob))),
            h("span", { class: "bar", style: { width: `${100 * Math.exp(logprob)}%` } }),
          ]) : []),
        ]);
      };
    },
  };

  const Settings = {
    props: ["pane"],
    setup({ pane }) {
      return () => h("div", { class: "parameters" }, [
        v("select", { label: "Model", items: state.models, modelValue: pane.settings.model, "onUpdate:modelValue": (value) => { pane.settings.model = value; }, density: "compact", variant: "underlined", hideDetails: true }),
        ...FIELDS.map(({ key, label, text, min, max, step }) => v("text-field", {
          label, density: "compact", variant: "underlined", hideDetails: true, name: key,
          type: text ? "text" : "number", min, max, step,
          modelValue: pane.settings[key], "onUpdate:modelValue": (value) => { pane.settings[key] = value; },
        })),
      ]);
    },
  };

  // ---- the page ------------------------------------------------------------------------------

  function exportDialog() {
    const request = body(state.panes[0], state.prompt);
    return v("dialog", { modelValue: state.exporting, "onUpdate:modelValue": (open) => { state.exporting = open; }, maxWidth: 760 }, [
      v("card", { title: "This request elsewhere" }, [
        ...[["curl", asCurl(request)], ["Python", asPython(request)]].map(([title, text]) => h("div", { class: "px-4 pb-3" }, [
          h("div", { class: "d-flex align-center justify-space-between" }, [
            h("strong", title),
            v("btn", { size: "small", variant: "text", onClick: () => navigator.clipboard?.writeText(text) }, "Copy"),
          ]),
          v("sheet", { class: "export", border: true, rounded: true, "data-export": title }, text),
        ])),
        v("card-actions", {}, [v("spacer"), v("btn", { onClick: () => { state.exporting = false; } }, "Close")]),
      ]),
    ]);
  }

  const App = {
    setup() {
      const theme = Vuetify.useTheme();
      const system = matchMedia("(prefers-color-scheme: dark)");
      watch(() => state.dark, (dark) => theme.change(dark ? "dark" : "light"));
      state.dark = system.matches;
      system.addEventListener("change", (event) => { state.dark = event.matches; });
      onMounted(() => {
        loadModels();
        window.addEventListener("keydown", (event) => {
          if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); runAll(); }
          if (event.key === "Escape" && !state.exporting) stopAll();
        });
      });
      return () => v("app", {}, [
        v("app-bar", { density: "compact", flat: true, border: true }, [
          v("app-bar-title", {}, "optlm playground"),
          v("btn", { icon: state.dark ? "mdi-white-balance-sunny" : "mdi-weather-night", "aria-label": state.dark ? "Light colours" : "Dark colours", onClick: () => { state.dark = !state.dark; } }),
          v("btn", { icon: "mdi-key", "aria-label": "API key", onClick: () => { state.askKey = !state.askKey; } }),
        ]),
        v("main", {}, [v("container", { fluid: true, class: "pa-3" }, [
          state.problem && v("alert", { type: "error", variant: "tonal", class: "mb-3", role: "alert" }, state.problem),
          state.askKey && h("form", { onSubmit: (event) => event.preventDefault() }, [v("text-field", { label: "API key", type: "password", autocomplete: "off", density: "compact", variant: "outlined", modelValue: state.key, hint: "Kept in this page only, until it is closed", persistentHint: true, class: "mb-3", "onUpdate:modelValue": (value) => { state.key = value; }, onChange: loadModels })]),
          v("textarea", { label: "Prompt", rows: 3, autoGrow: true, maxRows: 14, variant: "outlined", hideDetails: true, modelValue: state.prompt, "onUpdate:modelValue": (value) => { state.prompt = value; } }),
          h("div", { class: "d-flex flex-wrap ga-2 my-3" }, [
            anyRunning() ? v("btn", { color: "primary", variant: "flat", onClick: stopAll }, "Stop (Esc)") : v("btn", { color: "primary", variant: "flat", onClick: runAll }, "Continue the text (Ctrl+Enter)"),
            v("btn", { variant: "outlined", onClick: compare }, state.panes.length > 1 ? "One text" : "Side by side"),
            v("btn", { variant: "outlined", onClick: () => { state.exporting = true; } }, "Export"),
          ]),
          v("row", {}, state.panes.map((pane, index) => v("col", { cols: 12, md: state.panes.length > 1 ? 6 : 12, key: index }, [
            h(Settings, { pane, class: "mb-3" }),
            h(Output, { pane, name: state.panes.length > 1 ? `Text ${"AB"[index]}` : "Text" }),
          ]))),
        ])]),
        exportDialog(),
      ]);
    },
  };

  const nonce = document.querySelector('meta[name="csp-nonce"]').content;
  createApp(App).use(Vuetify.createVuetify({ components: Vuetify.components, defaults: { VBtn: { class: "text-none" } }, theme: { cspNonce: nonce } })).mount("#app");
})();
