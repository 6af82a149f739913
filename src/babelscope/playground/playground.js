// Shows a reading token by token; a live page asks the server for readings and continuations. Data are text nodes only.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const MOST = 25; // features in the table
  const WAIT = 150; // milliseconds without a move of the slider before the server is asked

  let text = data.text, reading = data.reading, selected = null;

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const number = (value, digits, sign = false) => value === null ? "–" :
    ((sign && value > 0 ? "+" : "") + value.toFixed(digits)).replace("-", "−");
  const english = new Intl.DisplayNames(["en"], { type: "language" });
  const called = (tag) => {
    let name = tag;
    try { name = english.of(tag); } catch { /* not a language tag: show it as it is */ }
    return name === tag ? tag : `${name} (${tag})`;
  };

  for (const name of data.languages) at("language").append(make("option", { value: name }, called(name)));

  const wanted = ([place]) => {
    const language = at("language").value;
    return !language || data.features[place].languages.includes(language);
  };

  function show() {
    at("result").hidden = false;
    const best = Math.max(...Object.values(reading.scores), 1e-9);
    const found = reading.language === null ? "No feature fires." : `The features say ${called(reading.language)}`;
    const [label, probability] = reading.fasttext;
    at("verdict").textContent = `${found}${reading.language === null ? "" : "."} fastText says ${called(label)} (${number(100 * probability, 0)} %).` +
      (reading.left_out ? " The sentence is cut at the largest number of tokens (corpus.max_tokens)." : "");
    const rows = Object.entries(reading.scores).filter(([, score]) => score > 0).slice(0, 5);
    at("scores").querySelector("tbody").replaceChildren(...rows.map(([name, score]) =>
      make("tr", {}, make("th", { scope: "row", class: "label" }, called(name)), make("td", {}, number(score, 2)),
        make("td", {}, make("meter", { min: 0, max: best, value: score, "aria-label": called(name) })))));
    at("pieces").dir = reading.right_to_left ? "rtl" : "ltr";
    selected = null;
    draw();
  }

  function draw() {
    at("pieces").replaceChildren(...reading.pieces.map((piece, place) => {
      const fires = reading.fires[place].filter(wanted);
      const button = make("button", { type: "button", "aria-pressed": String(place === selected), "data-place": place }, piece);
      button.style.setProperty("--share", Math.min(1, fires.length ? fires[0][1] : 0));
      button.title = `${fires.length} features`;
      button.addEventListener("click", () => {
        selected = selected === place ? null : place;
        draw();
        at("pieces").querySelector(`[data-place="${place}"]`).focus();
      });
      return button;
    }));
    const strongest = new Map();
    for (const [place, fires] of reading.fires.entries()) {
      if (selected !== null && selected !== place) continue;
      for (const [feature, share] of fires.filter(wanted)) strongest.set(feature, Math.max(share, strongest.get(feature) ?? 0));
    }
    const rows = [...strongest].sort((a, b) => b[1] - a[1]);
    const where = selected === null ? "the sentence" : `“${reading.pieces[selected].trim()}”`;
    at("listed").textContent = `${rows.length} features fire on ${where}` + (rows.length > MOST ? `; the strongest ${MOST}:` : "");
    at("features").querySelector("tbody").replaceChildren(...rows.slice(0, MOST).map(([place, share]) => row(data.features[place], share)));
  }

  function row(feature, share) {
    const name = data.browser === null ? feature.label :
      make("a", { href: `${data.browser}#${feature.id}`, target: "_blank", title: feature.id }, feature.label);
    const cells = [
      make("th", { scope: "row", class: "label" }, name),
      make("td", { class: "label" }, feature.languages.map(called).join(", ")),
      make("td", { title: "share of its largest activation" }, number(share, 2)),
      make("td", {}, number(feature.effective, 2)), make("td", {}, number(feature.delta, 3, true)),
      make("td", { class: "label promotes" }, ...feature.promotes.map((token) => make("bdi", {}, token.trim() || JSON.stringify(token)))),
    ];
    if (data.live) {
      const button = make("button", { type: "button", "aria-label": `amplify ${feature.label}` }, "amplify");
      button.addEventListener("click", () => {
        offer(feature.id, `feature ${feature.label} (${feature.languages.join(", ")})`);
        at("target").value = feature.id;
        if (Number(at("strength").value) === 0) at("strength").value = data.strongest / 2;
        go();
        at("strength").focus();
      });
      cells.push(make("td", { class: "label" }, button));
    }
    return make("tr", { "data-id": feature.id }, ...cells);
  }

  function offer(value, label) {
    if (![...at("target").options].some((option) => option.value === value)) at("target").append(make("option", { value }, label));
  }

  // Only the answer to the last question is shown.
  let asked = 0;
  async function ask(path, values) {
    const response = await fetch(`${path}?${new URLSearchParams(values)}`);
    const content = await response.json();
    if (!response.ok) throw new Error(content.error);
    return content;
  }
  function say(message, failed = false) {
    at("status").textContent = message;
    at("status").classList.toggle("failed", failed);
  }

  async function read() {
    text = at("text").value;
    say("Reading …");
    const mine = ++asked;
    try {
      const found = await ask("read", { text });
      if (mine !== asked) return;
      reading = found;
      say("");
      show();
      go();
    } catch (error) {
      if (mine === asked) say(error.message, true);
    }
  }

  let timer = null, turn = 0, busy = false;
  function go() {
    at("amount").textContent = number(Number(at("strength").value), 1);
    clearTimeout(timer);
    turn += 1;
    timer = setTimeout(proceed, WAIT);
  }
  // One continuation at a time: while the server writes one, the slider may move on, and only its last place is asked for.
  async function proceed() {
    if (busy) return;
    busy = true;
    at("continuation").classList.add("waiting");
    let done;
    do {
      done = turn;
      const values = { text, target: at("target").value, strength: at("strength").value };
      try {
        const found = await ask("continue", values);
        if (values.text === text) {
          at("continuation").replaceChildren(make("span", { class: "given" }, text), make("span", { class: "new" }, found.text));
          at("continuation").dataset.strength = values.strength;
          at("continuation").dataset.target = values.target;
        }
        say("");
      } catch (error) {
        say(error.message, true);
      }
    } while (done !== turn);
    busy = false;
    at("continuation").classList.remove("waiting");
  }

  at("language").addEventListener("change", draw);
  if (data.live) {
    at("ask").addEventListener("submit", (event) => { event.preventDefault(); read(); });
    at("text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); at("ask").requestSubmit(); }
    });
    for (const name of data.languages) offer(name, called(name));
    at("strength").max = data.strongest;
    at("strength").addEventListener("input", go);
    at("target").addEventListener("change", go);
  }
  if (reading) show();
  document.documentElement.dataset.ready = "";
})();
