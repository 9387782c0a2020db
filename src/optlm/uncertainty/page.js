"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = document.getElementById("by");
const main = document.querySelector("main");
const spans = [];

function add(parent, tag, text, className) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (className) element.className = className;
  parent.append(element);
  return element;
}

function shown(token) {
  return token.replaceAll("\n", "\u23ce\n");
}

function describe(token) {
  const detail = document.getElementById("detail");
  const list = document.createElement("dl");
  const facts = {
    "token": JSON.stringify(token.token),
    "log-probability": token.logprob.toFixed(4) + " nats",
    "rank": token.rank,
    "entropy": token.entropy.toFixed(4) + " nats",
    "margin": token.margin.toFixed(4),
    "self-certainty": token.self_certainty.toFixed(4) + " nats",
    "likeliest": JSON.stringify(token.top) + " " + (100 * token.top_prob).toFixed(1) + " %",
  };
  for (const [name, value] of Object.entries(facts)) {
    const item = add(list, "div", "");
    add(item, "dt", name);
    add(item, "dd", String(value));
  }
  detail.replaceChildren(list);
}

function paint() {
  document.getElementById("scale").textContent = data.by[by.value] + ".";
  for (const span of spans) {
    span.element.style.backgroundColor = `rgba(232, 110, 20, ${0.85 * span.token.doubt[by.value]})`;
  }
}

function focus(index) {
  const span = spans[Math.max(0, Math.min(spans.length - 1, index))];
  for (const other of main.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  span.element.tabIndex = 0;
  span.element.focus();
}

document.querySelector("h1").textContent = document.title = data.title;
document.getElementById("note").textContent = data.note;
for (const name of Object.keys(data.by)) add(by, "option", name).value = name;

data.texts.forEach((text, number) => {
  if (data.texts.length > 1) add(main, "h2", `Text ${number + 1}`);
  const s = text.summary;
  add(main, "p", `${s.tokens} tokens, log-likelihood ${s.log_likelihood.toFixed(2)} nats ` +
    `(${s.log_likelihood_per_token.toFixed(3)} a token), mean entropy ${s.mean_entropy.toFixed(3)} nats, ` +
    `${(100 * s.top_share).toFixed(0)} % of the tokens were the likeliest`, "summary");
  const paragraph = add(main, "div", text.first, "text");
  for (const token of text.tokens) {
    const element = add(paragraph, "span", shown(token.token));
    const index = spans.length;
    element.tabIndex = index === 0 ? 0 : -1;
    element.addEventListener("mouseenter", () => describe(token));
    element.addEventListener("focus", () => describe(token));
    element.addEventListener("click", () => focus(index));
    element.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) focus(index + step);
      else if (event.key === "Home") focus(0);
      else if (event.key === "End") focus(spans.length - 1);
      else return;
      event.preventDefault();
    });
    spans.push({ element, token });
  }
});

by.addEventListener("change", paint);
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
paint();
