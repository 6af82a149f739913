// Lists, filters and shows the features. Data reach the page as text nodes only, never as markup.
"use strict";
(() => {
  const ROW = 30; // pixels; as in browser.css
  const MARGIN = 12; // rows drawn above and below those in view
  const LEVELS = 5;

  const data = JSON.parse(document.getElementById("data").textContent);
  const list = document.getElementById("list");
  const body = list.querySelector("tbody");
  const filters = document.getElementById("filters");
  const detail = document.getElementById("feature");

  for (const one of data.features) {
    one.id = `${data.hookpoints[one.at]}/${one.unit}`;
    one.rate = Math.max(0, ...one.of.map((code) => one.rates[code]));
    one.latin = one.script ? one.script[1] : null;
    one.names = one.of.map((code) => data.languages[code]);
  }
  const byId = new Map(data.features.map((one) => [one.id, one]));
  const simple = (text) => text.normalize("NFC").toLowerCase();
  const searched = {
    texts: data.texts.map((text) => simple(text.pieces.join(""))),
    tokens: data.tokens.map(simple),
  };

  let shown = []; // the features that pass the filters, in order
  let current = null;
  let sorting = { key: "entropy", down: false };

  const maker = (namespace) => (tag, attributes = {}, ...children) => {
    const element = document.createElementNS(namespace, tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children); // strings become text nodes
    return element;
  };
  const make = maker("http://www.w3.org/1999/xhtml"), drawn = maker("http://www.w3.org/2000/svg");
  const number = (value, digits, sign = false) => {
    if (value === null) return "–";
    const text = value.toFixed(digits);
    if (Number(text) === 0) return text.replace("-", "");
    return (sign && value > 0 ? "+" : "") + text.replace("-", "−");
  };
  const percent = (share) => `${number(100 * share, share < 0.1 ? 2 : 1)} %`;
  const thousands = (count) => String(count).replace(/\B(?=(\d{3})+$)/g, "\u202f");
  const english = new Intl.DisplayNames(["en"], { type: "language" });
  const called = (tag) => {
    let name = tag;
    try { name = english.of(tag); } catch { /* not a language tag: show it as it is */ }
    return name === tag ? tag : `${name} (${tag})`;
  };
  const plural = (count, one) => `${thousands(count)} ${one}${count === 1 ? "" : "s"}`;

  // What a column is sorted by, if that is not the column's own key.
  const COMPARED = {
    feature: (one) => one.at * 1e7 + one.unit,
    languages: (one) => one.of.length * 1000 + one.of[0],
  };

  function choose() {
    const wanted = Object.fromEntries(new FormData(filters));
    const words = simple(wanted.words.trim());
    const hits = (all) => new Set(all.flatMap((text, place) => (words && text.includes(words) ? [place] : [])));
    const texts = hits(searched.texts), tokens = hits(searched.tokens);
    const matches = (one) => !words || one.id.includes(words) ||
      [...one.own, ...one.other].some(([text]) => texts.has(text)) ||
      [...one.promoted, ...one.suppressed].some(([token]) => tokens.has(token));
    const value = COMPARED[sorting.key] ?? ((one) => one[sorting.key]), way = sorting.down ? -1 : 1;
    shown = data.features.filter((one) => matches(one) &&
      (wanted.language === "" || one.of.includes(Number(wanted.language))) &&
      (wanted.hookpoint === "" || one.at === Number(wanted.hookpoint)) &&
      (wanted.kind === "" || (wanted.kind === "specific") === (one.of.length === 1)));
    shown.sort((a, b) => { // the sort is stable: ties stay in the order of hookpoint and unit
      const x = value(a), y = value(b);
      return x === null || y === null ? (x === null) - (y === null) : way * (x - y); // unknown values come last
    });
    for (const head of list.querySelectorAll("[data-sort]")) {
      if (head.dataset.sort === sorting.key) head.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    const all = plural(data.features.length, "feature"), part = shown.length < data.features.length;
    document.getElementById("count").textContent = part ? `${thousands(shown.length)} of ${all}` : all;
    list.querySelector("table").setAttribute("aria-rowcount", shown.length + 1);
    list.scrollTop = 0;
    draw();
  }

  // Only the rows in view are in the page.
  function draw() {
    const from = Math.max(0, Math.floor(list.scrollTop / ROW) - MARGIN);
    const to = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + MARGIN);
    const space = (count) => {
      const cell = make("td", { colspan: 5 });
      cell.style.height = `${count * ROW}px`;
      return count ? [make("tr", { class: "space", "aria-hidden": "true" }, cell)] : [];
    };
    const rows = shown.slice(from, to).map((one, index) => row(one, from + index));
    if (!shown.length) rows.push(make("tr", {}, make("td", { colspan: 5, class: "label none" }, "No feature passes the filters.")));
    body.replaceChildren(...space(from), ...rows, ...space(shown.length - to));
  }

  // Shorten a long name in the middle: its layer and unit stay.
  function brief(one) {
    const [name, unit] = [data.hookpoints[one.at], one.unit];
    return one.id.length > 20 ? `${name.slice(0, 9).replace(/\.$/, "")}…/${unit}` : one.id;
  }

  function row(one, place) {
    const languages = one.names.length > 3 ? `${one.names.length} languages` : one.names.join(" ");
    const line = make("tr", { "aria-rowindex": place + 2, "data-id": one.id },
      make("th", { scope: "row", class: "label" }, make("a", { href: `#${one.id}`, tabindex: "-1", title: one.id }, brief(one))),
      make("td", { class: "label", title: one.names.join(" ") }, languages),
      make("td", {}, number(one.entropy, 2)),
      make("td", {}, percent(one.rate)),
      make("td", {}, number(one.delta, 3, true)),
      make("td", {}, one.latin === null ? "–" : percent(one.latin)));
    if (one === current) line.setAttribute("aria-current", "true");
    return line;
  }

  function reveal() {
    const place = shown.indexOf(current);
    if (place < 0) return;
    const head = list.querySelector("thead").offsetHeight;
    const top = place * ROW, bottom = top + ROW - (list.clientHeight - head);
    if (top < list.scrollTop) list.scrollTop = top;
    else if (bottom > list.scrollTop) list.scrollTop = bottom;
    draw();
  }

  function show(one) {
    current = one;
    document.title = one ? `${one.id} · Babelscope` : document.title;
    detail.replaceChildren(...(one
      ? [title, figures, rates, texts, tokens].map((part) => part(one)) : [make("p", { class: "none" }, "No such feature.")]));
    reveal();
    draw();
  }

  function title(one) {
    const step = (by, text) => {
      const button = make("button", { type: "button" }, text);
      button.addEventListener("click", () => move(by));
      return button;
    };
    const what = one.of.length === 1
      ? `Specific to one language: ${called(one.names[0])}` : `Shared by ${one.of.length} languages: ${one.names.map(called).join(", ")}`;
    return make("div", {},
      make("div", { class: "title" }, make("h2", {}, one.id), make("div", {}, step(-1, "← previous"), " ", step(1, "next →"))),
      make("p", { class: "what", role: "status" }, what),
      ...(one.said ? [make("p", { class: "said" }, `“${one.said[0]}”`, make("small", {},
        ` (explanation by a language model; scores: detection ${number(one.said[1], 2)}, fuzzing ${number(one.said[2], 2)}, chance 0.5)`))] : []));
  }

  function figures(one) {
    const [count, size] = one.on;
    const figure = (value, ...text) => make("div", {}, make("dt", {}, ...text), make("dd", {}, value));
    return make("dl", { class: "figures" },
      figure(number(one.entropy, 3), `entropy of the firing rates over ${data.languages.length} languages, nats`),
      figure(percent(one.rate), one.of.length === 1 ? "share of its language’s tokens on which it fires" : "share of tokens on which it fires, in the language with the highest rate"),
      figure(number(one.largest, 2), "largest activation"),
      figure(number(one.delta, 4, true), one.delta === null
        ? "change in loss without it (ΔNLL): not measured"
        : `change in loss without it (ΔNLL), nats/token, on ${plural(count, "held-out text")} (${plural(size, "token")})`),
      ...(one.latin === null ? [] : [figure(percent(one.latin), "of its usual rate on romanised texts"
        + (one.script[0] === null ? "" : one.script[0] ? ": script-bound" : ": not script-bound"))]));
  }

  function rates(one) {
    const most = Math.max(...one.rates, 1e-9);
    const rows = data.languages.map((name, code) => {
      const bar = make("span", { class: "bar" });
      bar.style.width = `${(100 * one.rates[code]) / most}%`;
      return make("tr", one.of.includes(code) ? { class: "own" } : {},
        make("th", { scope: "row", class: "label" }, name), make("td", {}, one.rates[code] ? bar : ""),
        make("td", {}, percent(one.rates[code])));
    });
    return make("div", { class: "pair" },
      make("div", {}, make("h3", {}, "Tokens on which it fires"), make("table", { class: "rates" }, make("tbody", {}, ...rows))),
      make("div", {}, make("h3", {}, "Activations"), ...histogram(one)));
  }

  function histogram(one) {
    const [own, other] = one.histogram;
    const most = Math.max(1, ...own.map((count, bin) => count + other[bin]));
    const [ours, theirs] = one.histogram.map((counts) => plural(counts.reduce((a, b) => a + b, 0), "token"));
    const largest = number(one.largest, 2);
    const picture = drawn("svg", {
      class: "histogram", viewBox: `0 0 ${own.length} 100`, preserveAspectRatio: "none", role: "img",
      "aria-label": `Histogram of the activations, from 0 to ${largest}: ${ours} of its own languages, ${theirs} of others; at most ${most} in a bin`,
    });
    own.forEach((count, bin) => {
      let y = 100;
      for (const [kind, tokens] of [["own", count], ["other", other[bin]]]) {
        const height = (100 * tokens) / most;
        y -= height;
        if (height) picture.append(drawn("rect", { class: kind, x: bin + 0.06, y, width: 0.88, height }));
      }
    });
    const axis = (...parts) => make("p", { class: "axis" }, ...parts.map((part) => make("span", {}, part)));
    return [
      make("p", { class: "legend" }, make("i", { class: "own" }), `own languages: ${ours}`,
        make("i", { class: "other" }), `other languages: ${theirs}`),
      axis(`${plural(most, "token")} ↑`), picture, axis("0", "activation →", largest),
    ];
  }

  const level = (value, one) => Math.min(LEVELS, Math.max(1, Math.ceil((LEVELS * value) / one.largest)));

  function texts(one) {
    const some = (entries) => entries.length
      ? make("ol", { class: "texts" }, ...entries.map((entry) => text(one, entry)))
      : make("p", { class: "none" }, "The feature fires in none.");
    const scale = make("p", { class: "scale" }, "Activation as a share of the feature’s largest: ");
    for (let step = 1; step <= LEVELS; step++) scale.append(make("span", { class: `a${step}` }, `≤ ${(100 * step) / LEVELS} %`));
    return make("div", {},
      make("h3", {}, `Texts of its language${one.of.length === 1 ? "" : "s"} in which it is most active`), scale, some(one.own),
      make("h3", {}, "Texts of other languages in which it is most active"), some(one.other));
  }

  function text(one, [place, ...pairs]) {
    const { language, pieces, rtl } = data.texts[place];
    const active = new Map();
    for (let i = 0; i < pairs.length; i += 2) active.set(pairs[i], pairs[i + 1]);
    const line = make("p", { lang: data.languages[language], dir: rtl ? "rtl" : "ltr" });
    let quiet = ""; // pieces that are not shaded stay one text, so that their letters join
    pieces.forEach((piece, at) => {
      const value = active.get(at);
      if (value === undefined) { quiet += piece; return; }
      line.append(quiet, make("span", { class: `a${level(value, one)}`, title: `activation ${number(value, 2)}` }, piece));
      quiet = "";
    });
    line.append(quiet);
    return make("li", {},
      make("small", {}, make("b", {}, data.languages[language]), number(Math.max(...active.values()), 2)), line);
  }

  function tokens(one) {
    const row = ([token, logit]) => make("tr", {},
      make("td", {}, make("bdi", { dir: "auto" }, visible(data.tokens[token]))), make("td", {}, number(logit, 2, true)));
    const side = (heading, entries) => make("div", {}, make("h3", {}, heading),
      make("table", { class: "tokens" }, make("tbody", {}, ...entries.map(row))));
    if (!one.promoted.length)
      return make("p", { class: "none" }, "There is no logit lens: the decoder direction of this feature is not in the residual stream.");
    return make("div", { class: "pair" },
      side("Tokens that it promotes (logit)", one.promoted), side("Tokens that it suppresses (logit)", one.suppressed));
  }

  // Make white space at the ends, control and format characters visible.
  const visible = (token) => token
    .replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)).replace(/\n/g, "↵").replace(/\t/g, "⇥")
    .replace(/[\p{Cc}\p{Cf}]|[^\S ]/gu, (hidden) => `\\u${hidden.codePointAt(0).toString(16).padStart(4, "0")}`);

  function fromAddress() {
    let id = location.hash.slice(1);
    try { id = decodeURIComponent(id); } catch { /* not encoded */ }
    show(id ? byId.get(id) ?? null : shown[0] ?? null);
  }

  function go(one) {
    if (!one || one === current) return;
    history.replaceState(null, "", `#${one.id}`); // a history entry per step would bury the others
    show(one);
  }

  function move(by) {
    const place = shown.indexOf(current);
    go(shown[place < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, place + by))]);
  }

  list.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    move(steps[event.key]);
  });
  body.addEventListener("click", (event) => {
    const line = event.target.closest("tr[data-id]");
    if (!line || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    location.hash = line.dataset.id; // an entry in the history
    list.focus({ preventScroll: true });
    if (getComputedStyle(document.querySelector("main")).gridTemplateColumns.split(" ").length === 1) detail.scrollIntoView();
  });
  list.querySelector("thead").addEventListener("click", (event) => {
    const head = event.target.closest("[data-sort]");
    if (!head) return;
    const key = head.dataset.sort;
    sorting = { key, down: key === sorting.key ? !sorting.down : key === "rate" || key === "delta" };
    choose();
  });
  list.addEventListener("scroll", draw, { passive: true });
  addEventListener("resize", draw);
  filters.addEventListener("input", choose);
  filters.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", fromAddress);

  choose();
  fromAddress();
  document.documentElement.dataset.ready = "yes";
})();
