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
    one.top = top(one);
  }
  const byId = new Map(data.features.map((one) => [one.id, one]));
  // The piece of text on which a feature is most active.
  function top(one) {
    if (!one.own.length) return "";
    const [place, ...pairs] = one.own[0];
    let best = 0;
    for (let i = 0; i < pairs.length; i += 2) if (pairs[i + 1] > pairs[best + 1]) best = i;
    return data.texts[place].pieces[pairs[best]];
  }

  const simple = (text) => text.normalize("NFC").toLowerCase();
  const searched = {
    texts: data.texts.map((text) => simple(text.pieces.join(""))),
    tokens: data.tokens.map(simple),
  };

  let shown = []; // the features that pass the filters, in order
  let current = null;
  const DEFAULT = { key: "entropy", down: false };
  let sorting = { ...DEFAULT };

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
  const called = (tag) => data.names[data.languages.indexOf(tag)] ?? tag;
  const plural = (count, one) => `${thousands(count)} ${one}${count === 1 ? "" : "s"}`;

  // What a column is sorted by, if that is not the column's own key.
  const COMPARED = {
    feature: (one) => one.at * 1e7 + one.unit,
    languages: (one) => one.of.length * 1000 + one.of[0],
  };

  const filter = () => Object.fromEntries(new FormData(filters));

  function choose() {
    const wanted = filter();
    const words = simple(wanted.words.trim());
    const hits = (all) => new Set(all.flatMap((text, place) => (words && text.includes(words) ? [place] : [])));
    const texts = hits(searched.texts), tokens = hits(searched.tokens);
    // 0: its name, its own texts or its tokens; 1: its texts of other languages; 2: no match.
    const match = (one) => (!words || [one.id, brief(one)].some((name) => name.toLowerCase().includes(words)) || [...one.own, ...one.sample].some(([text]) => texts.has(text)) ||
      [...one.promoted, ...one.suppressed].some(([token]) => tokens.has(token))) ? 0 : one.other.some(([text]) => texts.has(text)) ? 1 : 2;
    for (const one of data.features) one.match = match(one);
    const value = COMPARED[sorting.key] ?? ((one) => one[sorting.key]), way = sorting.down ? -1 : 1;
    shown = data.features.filter((one) => one.match < 2 &&
      (wanted.language === "" || one.names.includes(wanted.language)) &&
      (wanted.hookpoint === "" || data.hookpoints[one.at] === wanted.hookpoint) &&
      (wanted.kind === "" || (wanted.kind === "specific") === (one.of.length === 1)));
    shown.sort((a, b) => { // the sort is stable: ties stay in the order of hookpoint and unit
      const x = value(a), y = value(b);
      if (a.match !== b.match) return a.match - b.match; // the best matches come first
      return x === null || y === null ? (x === null) - (y === null) : way * (x - y); // unknown values come last
    });
    for (const head of list.querySelectorAll("[data-sort]")) {
      if (head.dataset.sort === sorting.key) head.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    const all = plural(data.features.length, "feature"), part = shown.length < data.features.length;
    document.querySelector("#count [role=status]").textContent = part ? `${thousands(shown.length)} of ${all}` : all;
    document.getElementById("clear").hidden = !Object.values(wanted).some(Boolean);
    list.querySelector("table").setAttribute("aria-rowcount", shown.length + 1);
    list.scrollTop = 0;
    draw();
  }

  // Only the rows in view are in the page.
  function draw() {
    const from = Math.max(0, Math.floor(list.scrollTop / ROW) - MARGIN);
    const to = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + MARGIN);
    const space = (count) => {
      const cell = make("td", { colspan: 6 });
      cell.style.height = `${count * ROW}px`;
      return count ? [make("tr", { class: "space", "aria-hidden": "true" }, cell)] : [];
    };
    const rows = shown.slice(from, to).map((one, index) => row(one, from + index));
    if (!shown.length) rows.push(make("tr", {}, make("td", { colspan: 6, class: "label none" }, "No feature passes the filters.")));
    body.replaceChildren(...space(from), ...rows, ...space(shown.length - to));
  }

  // Layer and unit, as on the terminal, if no two hookpoints have the same layer.
  const layers = data.hookpoints.map((name) => name.match(/\d+/)?.[0] ?? name);
  const short = new Set(layers).size === layers.length ? layers : data.hookpoints;
  const brief = (one) => `${short[one.at]}/${one.unit}`;

  function row(one, place) {
    const languages = one.names.length > 3 ? `${one.names.length} languages` : one.names.join(" ");
    const delta = make("td", { class: certain(one) ? "" : "unsure", title: measured(one) }, number(one.delta, 3, true));
    const line = make("tr", { "aria-rowindex": place + 2, "data-id": one.id },
      make("th", { scope: "row", class: "label" }, make("a", { href: address(one), tabindex: "-1", title: one.id }, brief(one))),
      make("td", { class: "label", title: one.names.map(called).join(", ") }, languages),
      make("td", { class: "label top", title: one.top }, make("bdi", { dir: "auto" }, visible(one.top.trim() || one.top))),
      make("td", { title: `entropy ${number(one.entropy, 3)} nats` }, number(Math.exp(one.entropy), 2)),
      make("td", {}, percent(one.rate)),
      delta,
      make("td", {}, one.latin === null ? "–" : `${number(100 * one.latin, 0)} %`));
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

  // Whether the interval of the effect excludes 0.
  const certain = (one) => Boolean(one.range) && (one.range[0] > 0 || one.range[1] < 0);
  const measured = (one) => one.delta === null ? "not measured" : `on ${plural(one.on[0], "held-out text")} (${plural(one.on[1], "token")})${
    one.range ? `, 95 % interval ${number(one.range[0], 4, true)} to ${number(one.range[1], 4, true)}` : ", too few for an interval"}`;

  function show(one, missing = "") {
    current = one;
    const { language, hookpoint } = filter();
    const over = !one && !missing && shown.length > 0 && (language || hookpoint);
    document.title = `${one ? one.id : over ? heading(language, hookpoint) : "features"} · Babelscope`;
    detail.replaceChildren(...(one ? [title, figures, rates, texts, tokens, near].map((part) => part(one))
      : over ? overview(language, hookpoint) : [nothing(missing)]));
    reveal();
    draw();
  }

  function nothing(missing) {
    const text = missing ? `No such feature: ${missing}` : data.features.length ? "No feature passes the filters." : "There is no feature.";
    const all = make("button", { type: "button" }, "Show all features");
    all.addEventListener("click", clear);
    const limit = document.querySelector(".limit"); // what is searched for may be beyond it
    return make("div", {}, make("p", { class: "none" }, text, " ", ...(data.features.length ? [all] : [])), ...(limit ? [limit.cloneNode(true)] : []));
  }

  const heading = (language, hookpoint) => [language && called(language), hookpoint].filter(Boolean).join(" · ");

  // The page on a language, on a hookpoint, or on a language at a hookpoint: on what the filters leave.
  function overview(language, hookpoint) {
    const own = shown.filter((one) => one.of.length === 1), shared = shown.length - own.length;
    const facts = language && hookpoint
      ? [["ΔNLL of the language without its features here, nats/token", data.cells[language]?.[hookpoint] ?? "–"]]
      : data.about[language || hookpoint] ?? [];
    const row = ([label, figure]) => make("tr", {}, make("th", { scope: "row", class: "label" }, label), make("td", {}, figure));
    const parts = [
      make("div", { class: "title" }, make("h2", {}, heading(language, hookpoint))),
      make("p", { class: "what", role: "status" }, `${plural(own.length, "language-specific feature")}, ${thousands(shared)} shared with other languages`),
    ];
    if (facts.length) parts.push(make("table", { class: "facts" }, make("tbody", {}, ...facts.map(row))));
    if (!hookpoint) parts.push(...bars("Features by layer", data.hookpoints, (one) => [data.hookpoints[one.at]],
      (name) => ({ language, hookpoint: name }), language && ((name) => data.cells[language]?.[name])));
    if (!language) parts.push(...bars("Features by language", data.languages, (one) => one.names, (name) => ({ language: name, hookpoint })));
    const first = shown.slice(0, 12).map((one) => make("li", {},
      make("small", {}, make("a", { href: address(one) }, brief(one)),
        ` ${number(Math.exp(one.entropy), 2)} eff. languages, fires ${percent(one.rate)}${one.delta === null ? "" : `, ΔNLL ${number(one.delta, 3, true)}`}${
          one.matched === undefined ? "" : one.matched ? ", found in another seed" : ", not found in another seed"}`),
      ...(one.own.length ? [line(one, one.own[0])] : [])));
    parts.push(make("h3", {}, first.length < shown.length ? `The first ${first.length} in the order of the list` : "All of them"),
      make("ol", { class: "texts wide" }, ...first));
    return parts;
  }

  function bars(text, names, of, link, note) {
    const counts = new Map(names.map((name) => [name, [0, 0]]));
    for (const one of shown) for (const name of of(one)) counts.get(name)[one.of.length === 1 ? 0 : 1] += 1;
    const most = Math.max(1, ...[...counts.values()].map(([a, b]) => a + b));
    const rows = names.map((name) => {
      const [a, b] = counts.get(name);
      const bar = (kind, count) => {
        const piece = make("span", { class: `bar ${kind}` });
        piece.style.width = `${(100 * count) / most}%`;
        return count ? [piece] : [];
      };
      return make("tr", { class: "own" }, make("th", { scope: "row", class: "label" },
        make("a", { href: `#${written(link(name))}` }, data.languages.includes(name) ? called(name) : name)),
      make("td", {}, make("span", { class: "stack" }, ...bar("own", a), ...bar("other", b))), make("td", {}, `${a} + ${b}`),
      ...(note ? [make("td", { class: "note", title: note(name) ?? "" }, note(name) ? `ΔNLL ${note(name).split(" (")[0]}` : "")] : []));
    });
    return [make("h3", {}, text), make("p", { class: "legend" }, make("i", { class: "own" }), "language-specific", make("i", { class: "other" }), "shared"),
      make("table", { class: "rates counts" }, make("tbody", {}, ...rows))];
  }

  function title(one) {
    const step = (by, text) => {
      const button = make("button", { type: "button" }, text);
      button.addEventListener("click", () => move(by));
      return button;
    };
    const second = [...data.languages.keys()].filter((code) => !one.of.includes(code)).sort((a, b) => one.rates[b] - one.rates[a])[0];
    const next = second === undefined ? "" : `, then for ${called(data.languages[second])} (${percent(one.rates[second])})`;
    const what = one.of.length === 1
      ? `Fires most for ${called(one.names[0])} (${percent(one.rate)} of its tokens)${next}` : `Shared by ${one.of.length} languages: ${one.names.map(called).join(", ")}`;
    const more = one.names.map((name) => make("a", { href: `#${written({ language: name })}` }, `all features of ${called(name)}`));
    const layer = make("a", { href: `#${written({ hookpoint: data.hookpoints[one.at] })}` }, `all of ${data.hookpoints[one.at]}`);
    return make("div", {},
      make("div", { class: "title" }, make("h2", {}, one.id), make("div", {}, step(-1, "← previous"), " ", step(1, "next →"))),
      make("p", { class: "what", role: "status" }, what),
      make("p", { class: "more" }, ...more.flatMap((link) => [link, " · "]), layer),
      ...(one.said ? [make("p", { class: "said" }, `“${one.said[0]}”`, make("small", {},
        ` (explanation by a language model; scores: detection ${number(one.said[1], 2)}, fuzzing ${number(one.said[2], 2)}, chance 0.5)`))] : []));
  }

  function figures(one) {
    const all = one.rates.reduce((a, b) => a + b, 0), mine = one.of.reduce((sum, code) => sum + one.rates[code], 0);
    const figure = (value, ...text) => make("div", {}, make("dt", {}, ...text), make("dd", {}, value));
    const seed = one.matched === undefined ? [] : [figure(one.matched ? "yes" : "no", "found one to one in the SAE of another seed")];
    const causal = one.causal ? [figure(number(one.causal[0], 4, true), `estimated change in loss without it on training text, nats/token (others ${
      number(one.causal[1], 5, true)}); rank ${one.causal[2]} in its language by this effect`)] : [];
    return make("dl", { class: "figures" },
      figure(number(Math.exp(one.entropy), 2), `effective languages, of ${data.languages.length} (entropy of the firing rates: ${number(one.entropy, 3)} nats)`),
      figure(all ? percent(mine / all) : "–", one.of.length === 1 ? "of its firing is on its own language, if all had as much text" : "of its firing is on these languages, if all had as much text"),
      figure(percent(one.rate), one.of.length === 1 ? "share of its language’s tokens on which it fires" : "share of tokens on which it fires, in the language with the highest rate"),
      figure(number(one.largest, 2), "largest activation"),
      figure(number(one.delta, 4, true), one.delta === null
        ? "change in loss without it (ΔNLL): not measured"
        : `change in loss without it (ΔNLL), nats/token, ${measured(one)}`), ...causal, ...seed,
      ...(one.latin === null ? [] : [figure(percent(one.latin), "of its usual rate on romanised texts"
        + (one.script[0] === null ? "" : one.script[0] ? ": script-bound" : ": not script-bound"))]));
  }

  function rates(one) {
    const most = Math.max(...one.rates, 1e-9);
    const rows = data.languages.map((name, code) => {
      const bar = make("span", { class: "bar" });
      bar.style.width = `${(100 * one.rates[code]) / most}%`;
      return make("tr", one.of.includes(code) ? { class: "own" } : {},
        make("th", { scope: "row", class: "label" }, data.names[code]), make("td", {}, one.rates[code] ? bar : ""),
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
      make("h3", {}, "Random texts in which it is less active"), some(one.sample),
      make("h3", {}, "Texts of other languages in which it is most active"), some(one.other));
  }

  function text(one, entry) {
    const [place, ...pairs] = entry, most = Math.max(...pairs.filter((_, at) => at % 2));
    const code = data.texts[place].language;
    return make("li", {}, make("small", { title: data.names[code] }, make("b", {}, data.languages[code]), number(most, 2)), line(one, entry));
  }

  // A piece of text in which what was searched for is marked.
  function marked(piece, words) {
    if (!words) return [piece];
    const parts = [], low = simple(piece);
    if (low.length !== piece.length) return [piece]; // folding changed the positions
    let from = 0;
    for (let at = low.indexOf(words); at >= 0; at = low.indexOf(words, from)) {
      parts.push(piece.slice(from, at), make("mark", {}, piece.slice(at, at + words.length)));
      from = at + words.length;
    }
    return [...parts, piece.slice(from)];
  }

  function line(one, [place, ...pairs]) {
    const { language, pieces, rtl } = data.texts[place];
    const words = simple(filter().words.trim());
    const active = new Map();
    for (let i = 0; i < pairs.length; i += 2) active.set(pairs[i], pairs[i + 1]);
    const line = make("p", { lang: data.languages[language], dir: rtl ? "rtl" : "ltr" });
    let quiet = ""; // pieces that are not shaded stay one text, so that their letters join
    pieces.forEach((piece, at) => {
      const value = active.get(at);
      if (value === undefined) { quiet += piece; return; }
      line.append(...marked(quiet, words), make("span", { class: `a${level(value, one)}`, title: `activation ${number(value, 2)}` }, ...marked(piece, words)));
      quiet = "";
    });
    line.append(...marked(quiet, words));
    return line;
  }

  function near(one) {
    const row = ([unit, cosine]) => {
      const id = `${data.hookpoints[one.at]}/${unit}`, other = byId.get(id);
      const text = brief({ at: one.at, unit });
      return make("tr", {}, make("td", { title: id }, other ? make("a", { href: address(other) }, text) : text),
        make("td", { class: "label" }, other ? other.names.map(called).join(", ") : "not a feature shown here"), make("td", {}, number(cosine, 2)));
    };
    return make("div", {}, ...(one.near.length ? [make("h3", {}, "Latents with the nearest decoder directions (cosine)"),
      make("table", { class: "tokens near" }, make("tbody", {}, ...one.near.map(row)))] : []));
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

  // The state of the page is its address: filters, search, order, and the feature shown. A feature alone is `#<id>`.
  function written({ language = "", hookpoint = "", kind = "", words = "", sort = "", feature = "" }) {
    const parts = Object.entries({ language, hookpoint, kind, words, sort }).filter(([, value]) => value);
    if (!parts.length && feature) return feature;
    if (feature) parts.push(["feature", feature]);
    return parts.map(([key, value]) => `${key}=${encodeURIComponent(value)}`).join("&");
  }

  const order = () => sorting.key === DEFAULT.key && !sorting.down ? "" : (sorting.down ? "-" : "") + sorting.key;
  const address = (one) => `#${written({ ...filter(), sort: order(), feature: one ? one.id : "" })}`;

  function fromAddress() {
    const hash = location.hash.slice(1);
    const decoded = (text) => { try { return decodeURIComponent(text); } catch { return text; } };
    const state = hash.includes("=") ? Object.fromEntries(hash.split("&").map((part) => {
      const at = part.indexOf("=");
      return [part.slice(0, at), decoded(part.slice(at + 1))];
    })) : { feature: decoded(hash) };
    for (const name of ["language", "hookpoint", "kind", "words"]) {
      const field = filters.elements[name];
      field.value = state[name] ?? "";
      if (field.value !== (state[name] ?? "")) field.value = ""; // no such language or hookpoint
    }
    const key = (state.sort ?? "").replace("-", "");
    sorting = list.querySelector(`[data-sort="${CSS.escape(key)}"]`) ? { key, down: state.sort.startsWith("-") } : { ...DEFAULT };
    choose();
    const one = state.feature ? byId.get(state.feature) : hash ? null : shown[0];
    show(one ?? null, state.feature && !one ? state.feature : "");
  }

  function keep(one) {
    const to = address(one);
    // A history entry per step or letter would bury the others.
    history.replaceState(null, "", to === "#" ? location.pathname + location.search : to);
  }

  function go(one) {
    if (!one || one === current) return;
    show(one);
    keep(one);
  }

  // After a change of the filters: the feature shown stays only if it is asked for again.
  function filtered() {
    choose();
    const { language, hookpoint } = filter();
    const one = language || hookpoint ? null : shown.includes(current) ? current : shown[0] ?? null;
    show(one);
    keep(language || hookpoint || Object.values(filter()).some(Boolean) ? null : one);
  }

  function clear() {
    filters.reset();
    sorting = { ...DEFAULT };
    filtered();
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
    location.hash = address(byId.get(line.dataset.id)); // an entry in the history
    list.focus({ preventScroll: true });
    if (getComputedStyle(document.querySelector("main")).gridTemplateColumns.split(" ").length === 1) detail.scrollIntoView();
  });
  list.querySelector("thead").addEventListener("click", (event) => {
    const head = event.target.closest("[data-sort]");
    if (!head) return;
    const key = head.dataset.sort;
    sorting = { key, down: key === sorting.key ? !sorting.down : key === "rate" || key === "delta" };
    choose();
    keep(current);
  });
  addEventListener("keydown", (event) => {
    const by = { j: 1, k: -1 }[event.key];
    if (by && !event.target.closest("input, select, textarea") && !event.ctrlKey && !event.altKey && !event.metaKey) move(by);
  });
  document.getElementById("clear").addEventListener("click", clear);
  document.getElementById("csv").addEventListener("click", () => {
    const quoted = (value) => /[",\n]/.test(String(value)) ? `"${String(value).replace(/"/g, '""')}"` : value ?? "";
    const head = ["hookpoint", "unit", "languages", "entropy", "rate", "largest", "delta", "delta_low", "delta_high", "texts", "tokens", "top"];
    const rows = shown.map((one) => [data.hookpoints[one.at], one.unit, one.names.join(" "), one.entropy, one.rate, one.largest, one.delta,
      ...(one.range ?? [null, null]), ...one.on, one.top]);
    const link = make("a", { download: "features.csv" });
    link.href = URL.createObjectURL(new Blob([`${[head, ...rows].map((row) => row.map(quoted).join(",")).join("\n")}\n`], { type: "text/csv" }));
    link.click();
  });
  list.addEventListener("scroll", draw, { passive: true });
  addEventListener("resize", draw);
  filters.addEventListener("input", filtered);
  filters.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", fromAddress);

  fromAddress();
  document.documentElement.dataset.ready = "yes";
})();
