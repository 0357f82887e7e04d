"use strict";
(() => {
  const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
  const SVG = document.querySelector("svg").namespaceURI;
  const hidden = new Set(); // numbers of runs, for all charts together

  function svg(name, attributes = {}, ...children) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 6 });

  // ---- axes

  function ticks(low, high, wanted, whole) {
    const rough = (high - low) / wanted || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    let step = power * [1, 2, 5, 10].find((s) => s * power >= rough * 0.999);
    if (whole) step = Math.max(1, Math.round(step));
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9 && found.length < 50; k++) {
      found.push(Number((k * step).toPrecision(12)));
    }
    return found;
  }

  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    const parts = decades < 2 ? [1, 2, 5] : decades < 4 ? [1, 3] : [1];
    const found = [];
    const every = Math.max(1, Math.ceil(decades / 8));
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e += every) {
      found.push(...parts.map((part) => Number((part * 10 ** e).toPrecision(3))));
    }
    return found.filter((v) => v >= low && v <= high);
  }

  // The range of what is shown. On a log axis and for thin lines only means count: an interval that comes near 0, or one wild
  // batch, must not take the room.
  function range(chart, shown) {
    const values = [];
    for (const one of shown) {
      for (const p of one.points) values.push(p.y, ...(chart.log ? [] : [p.low, p.high]));
      for (const p of one.thin) values.push(p[1]);
    }
    if (shown.length) for (const [value] of chart.chance) values.push(value);
    const finite = values.filter((v) => v !== null);
    let low = Math.min(...finite), high = Math.max(...finite);
    if (!finite.length) return [0, 1];
    if (chart.log) return [low / (high / low || 2) ** 0.06, high * (high / low || 2) ** 0.06];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    low -= room;
    high += room;
    return chart.percent ? [Math.max(-1.5, low), Math.min(101.5, high)] : [low, high];
  }

  // ---- drawing

  function path(points, x, y) {
    let d = "", pen = "M";
    for (const [at, value] of points) {
      if (value === null) { pen = "M"; continue; }
      d += `${pen}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    }
    return d;
  }

  function bands(points, x, y, floor) {
    const pieces = [[]];
    for (const p of points) {
      if (p.low === null || p.y === null) pieces.push([]);
      else pieces[pieces.length - 1].push(p);
    }
    return pieces.filter((piece) => piece.length > 1).map((piece) => {
      const there = piece.map((p) => `${x(p.x).toFixed(1)} ${y(p.high).toFixed(1)}`);
      const back = piece.map((p) => `${x(p.x).toFixed(1)} ${y(Math.max(p.low, floor)).toFixed(1)}`).reverse();
      return `M${there.join("L")}L${back.join("L")}Z`;
    }).join("");
  }

  function series(chart, one, x, y, floor) {
    const { colour, dash, marker } = runs[one.run];
    const group = svg("g", { class: `series c${colour}`, "data-run": one.run });
    if (one.thin.length) group.append(svg("path", { class: "thin", d: path(one.thin, x, y) }));
    group.append(svg("path", { class: "band", d: bands(one.points, x, y, floor) }));
    group.append(svg("path", { class: `line d${dash}`, d: path(one.points.map((p) => [p.x, p.y]), x, y) }));
    const every = Math.ceil(one.points.length / 14);
    one.points.forEach((p, k) => {
      if (p.y === null) return;
      if (k === one.mark) group.append(svg("circle", { class: "ring", cx: x(p.x), cy: y(p.y), r: 8 }));
      if (k === one.mark || (one.points.length - 1 - k) % every === 0) {
        group.append(svg("use", { class: "marker", href: `#m${marker}`, x: x(p.x).toFixed(1), y: y(p.y).toFixed(1) }));
      }
      if (p.low !== null && one.points.length === 1) {
        group.append(svg("path", { class: "line", d: `M${x(p.x)} ${y(Math.max(p.low, floor))}V${y(p.high)}` }));
      }
    });
    return group;
  }

  function draw(chart) {
    const width = Math.max(280, chart.plot.clientWidth), height = Math.round(Math.min(420, Math.max(250, width * 0.45)));
    const shown = chart.series.filter((one) => !hidden.has(one.run));
    const [low, high] = range(chart, shown);
    const marks = chart.log ? logTicks(low, high) : ticks(low, high, height / 55);
    const left = 30 + 7 * Math.max(...marks.map((v) => number(v).length), 2), right = width - 16;
    const top = 14, bottom = height - 44, middle = (left + right) / 2;
    const places = chart.series.flatMap((one) => [...one.points.map((p) => p.x), ...one.thin.map((p) => p[0])]);
    const first = Math.min(...places), last = Math.max(...places);
    const scale = chart.log ? Math.log : (v) => v;
    const x = (v) => last === first ? middle : left + 8 + (v - first) / (last - first) * (right - left - 16);
    const y = (v) => bottom - (scale(v) - scale(low)) / (scale(high) - scale(low)) * (bottom - top);
    const clip = `clip-${chart.id}`;
    const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
    const line = (kind, d) => drawn.append(svg("path", { class: kind, d }));
    const text = (words, anchor, place) => drawn.append(svg("text", { "text-anchor": anchor, ...place }, words));
    const window = { x: left - 2, y: top - 8, width: right - left + 4, height: bottom - top + 16 };
    drawn.append(svg("clipPath", { id: clip }, svg("rect", window)));
    for (const v of marks) {
      line("grid", `M${left} ${y(v)}H${right}`);
      text(number(v), "end", { x: left - 8, y: y(v) + 4 });
    }
    for (const v of ticks(first, last, Math.min(10, width / 80), true)) {
      line("axis", `M${x(v)} ${bottom}v5`);
      text(number(v), "middle", { x: x(v), y: bottom + 19 });
    }
    line("axis", `M${left} ${bottom}H${right}`);
    text(chart.x, "middle", { x: middle, y: height - 5 });
    text(chart.y, "middle", { transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)` });
    for (const [value, said] of shown.length ? chart.chance : []) {
      line("chance", `M${left} ${y(value)}H${right}`);
      text(said, "end", { class: "halo", x: right - 4, y: y(value) - 6 });
    }
    if (!shown.length) text("No run is chosen.", "middle", { x: middle, y: (top + bottom) / 2 });
    const inside = svg("g", { "clip-path": `url(#${clip})` });
    if (chart.kind === "calibration") {
      inside.append(svg("path", { class: "chance", d: `M${x(0)} ${y(0)}L${x(100)} ${y(100)}` }));
    }
    for (const one of shown) inside.append(series(chart, one, x, y, chart.log ? low : -Infinity));
    drawn.append(inside);
    chart.plot.querySelector("svg")?.remove();
    chart.plot.prepend(drawn);
    const halo = svg("circle", { class: "at", r: 9, visibility: "hidden" });
    Object.assign(chart, { shown, toX: x, toY: y, width, drawn, halo });
    drawn.append(chart.halo);
    point(chart, null);
  }

  // ---- the numbers of a point

  function point(chart, at) {
    chart.at = at;
    const { tip, halo, drawn } = chart;
    for (const group of drawn.querySelectorAll(".series.active")) group.classList.remove("active");
    drawn.classList.toggle("faded", at !== null && chart.shown.length > 1);
    halo.setAttribute("visibility", at ? "visible" : "hidden");
    tip.hidden = !at;
    if (!at) return;
    const one = chart.shown[at.series], p = one.points[at.point];
    drawn.querySelector(`[data-run="${one.run}"]`).classList.add("active");
    halo.setAttribute("class", `at c${runs[one.run].colour}`);
    halo.setAttribute("cx", chart.toX(p.x));
    halo.setAttribute("cy", chart.toY(p.y));
    tip.replaceChildren(element("strong", {}, runs[one.run].name), element("span", { class: "said" }, p.said));
    for (const words of p.beside) tip.append(element("span", { class: "beside" }, words));
    const shrink = chart.plot.clientWidth / chart.width;
    const px = chart.toX(p.x) * shrink, py = chart.toY(p.y) * shrink, gap = 16;
    const fits = px + gap + tip.offsetWidth < chart.plot.clientWidth;
    const leftward = Math.max(0, px - gap - tip.offsetWidth);
    tip.style.left = `${fits ? px + gap : leftward}px`;
    tip.style.top = `${Math.max(0, py - tip.offsetHeight / 2)}px`;
  }

  function nearest(chart, event) {
    const box = chart.drawn.getBoundingClientRect(), shrink = chart.width / box.width;
    const px = (event.clientX - box.left) * shrink, py = (event.clientY - box.top) * shrink;
    let best = null, least = Infinity;
    chart.shown.forEach((one, series) => one.points.forEach((p, k) => {
      if (p.y === null) return;
      const far = Math.hypot(chart.toX(p.x) - px, chart.toY(p.y) - py);
      if (far < least) [least, best] = [far, { series, point: k }];
    }));
    return best;
  }

  // Along a curve to the next point that has a value; between curves to the point of the nearest step.
  function moved(chart, key) {
    const drawable = chart.shown.map((one, k) => k).filter((k) => chart.shown[k].points.some((p) => p.y !== null));
    if (!drawable.length) return null;
    const at = chart.at ?? { series: drawable[0], point: -1 };
    let { series } = at;
    let points = chart.shown[series].points;
    if (key === "ArrowUp" || key === "ArrowDown") {
      const x = points[at.point]?.x ?? 0;
      series = drawable[(drawable.indexOf(series) + (key === "ArrowUp" ? -1 : 1) + drawable.length) % drawable.length];
      points = chart.shown[series].points;
      const far = points.map((p) => p.y === null ? Infinity : Math.abs(p.x - x));
      return { series, point: far.indexOf(Math.min(...far)) };
    }
    const way = key === "ArrowLeft" || key === "End" ? -1 : 1;
    let k = key === "Home" ? 0 : key === "End" ? points.length - 1 : at.point + way;
    while (k >= 0 && k < points.length && points[k].y === null) k += way;
    return k >= 0 && k < points.length ? { series, point: k } : chart.at;
  }

  // ---- which runs are shown

  function show(numbers, yes) {
    for (const run of numbers) yes ? hidden.delete(run) : hidden.add(run);
    for (const box of document.querySelectorAll("input[data-run]")) box.checked = !hidden.has(Number(box.dataset.run));
    charts.forEach(draw);
  }

  function choice(chart) {
    const mine = chart.series.map((one) => one.run);
    const field = element("fieldset", {}, element("legend", {}, `Runs shown: ${chart.title}`));
    for (const run of mine) {
      const box = element("input", { type: "checkbox", "data-run": run });
      box.checked = true;
      box.addEventListener("change", () => show([run], box.checked));
      const swatch = document.querySelector(`#row-${run} .swatch`).cloneNode(true);
      const label = element("label", {}, box, swatch, element("span", {}, runs[run].name));
      label.addEventListener("pointerenter", () => highlight(chart, run));
      label.addEventListener("pointerleave", () => highlight(chart, null));
      field.append(label);
    }
    if (mine.length > 1) {
      for (const [words, yes] of [["Show all", true], ["Show none", false]]) {
        const button = element("button", { type: "button", class: "button" }, words);
        button.addEventListener("click", () => show(mine, yes));
        field.append(button);
      }
    }
    return field;
  }

  function highlight(chart, run) {
    const group = run === null ? null : chart.drawn.querySelector(`[data-run="${run}"]`);
    for (const other of chart.drawn.querySelectorAll(".series.active")) other.classList.remove("active");
    group?.classList.add("active");
    chart.drawn.classList.toggle("faded", group !== null);
  }

  // ---- the table

  function sortable(table) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const numeric = head.classList.contains("number");
      const button = element("button", { type: "button" }, ...head.childNodes);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => {
          const value = row.cells[column].dataset.value;
          return value === undefined || (numeric && Number.isNaN(Number(value))) ? null : numeric ? Number(value) : value;
        };
        const order = (a, b) => numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
        const rows = [...body.rows].map((row) => [key(row), row]);
        rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : down ? order(b, a) : order(a, b));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  // ---- copying

  function copy(code) {
    const button = element("button", { type: "button", class: "button copy", "aria-live": "polite" }, "Copy");
    const done = () => {
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    };
    const old = () => { // where a page from a file may not touch the clipboard
      getSelection().selectAllChildren(code);
      if (document.execCommand("copy")) done();
    };
    button.addEventListener("click", () => {
      if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, old);
      else old();
    });
    code.after(button);
  }

  for (const chart of charts) {
    chart.box = document.getElementById(chart.id);
    chart.tip = element("div", { class: "tip", role: "status", hidden: "" });
    const words = `${chart.title}, runs: ${chart.series.length}. `
      + "The left and right arrow keys go along a curve, up and down to another one.";
    chart.plot = element("div", { class: "plot", tabindex: "0", role: "application", "aria-label": words }, chart.tip);
    chart.box.replaceChildren(chart.plot, choice(chart));
    chart.plot.addEventListener("pointermove", (event) => point(chart, nearest(chart, event)));
    chart.plot.addEventListener("pointerdown", (event) => point(chart, nearest(chart, event)));
    chart.plot.addEventListener("pointerleave", () => point(chart, null));
    chart.plot.addEventListener("blur", () => point(chart, null));
    chart.plot.addEventListener("focus", () => {
      if (chart.plot.matches(":focus-visible")) point(chart, moved(chart, "Home"));
    });
    chart.plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") point(chart, null);
      if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
      event.preventDefault();
      point(chart, moved(chart, event.key));
    });
    draw(chart);
    new ResizeObserver(() => { if (chart.plot.clientWidth !== chart.width) draw(chart); }).observe(chart.plot);
  }
  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll("pre.command").forEach(copy);
})();
