// Draws every <figure class="chart"> from its JSON with uPlot. All texts are set as textContent.
const KINDS = { line: lineKind, points: pointsKind, bars: barKind };

// --- a chart: plot, legend, keyboard -----------------------------------------------------------------------------

const announcer = make("div", "unseen");
announcer.setAttribute("aria-live", "polite");

function heightFor(width) {
  return Math.round(Math.min(270, Math.max(190, width * 0.52)));
}

class Chart {
  constructor(element) {
    this.spec = JSON.parse(element.querySelector("script").textContent);
    this.plot = element.querySelector(".plot");
    this.hidden = new Set();
    this.widest = [];
    this.log = this.spec.log === "on";
    this.kind = KINDS[this.spec.kind](this.spec, this);
    this.makeLegend(element.querySelector(".legend"));
    this.plot.replaceChildren(this.at);
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("touchmove", (event) => this.touch(event.touches[0]), { passive: true });
    this.draw();
    new ResizeObserver(() => this.fit()).observe(this.plot);
  }

  draw() {
    if (this.u) this.u.destroy();
    const width = this.plot.clientWidth;
    const options = {
      width,
      height: heightFor(width),
      legend: { show: false },
      padding: [8, 10, 0, 0],
      ...this.kind.options(),
      hooks: { draw: [(u) => this.kind.draw(u)], setCursor: [() => this.show()] },
    };
    this.u = new uPlot(options, this.kind.data(), this.plot);
    this.hidden.forEach((k) => this.apply(k));
    this.show();
  }

  fit() {
    const width = this.plot.clientWidth;
    if (width && width !== this.u.width) this.u.setSize({ width, height: heightFor(width) });
  }

  makeLegend(legend) {
    this.at = make("span", "at");
    this.values = this.spec.series.map((s, k) => {
      const button = make("button", "entry");
      const swatch = make("span", this.spec.kind === "line" ? `swatch dash-${s.dash}` : "swatch block");
      swatch.style.setProperty("--series", `var(--series-${s.color})`);
      const value = make("span", "value");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.append(swatch, make("span", "entry-name", s.name), value);
      button.addEventListener("click", () => this.toggle(k, button));
      legend.append(button);
      return value;
    });
    if (this.spec.log !== "never") {
      const button = make("button", "entry log", "log scale");
      button.type = "button";
      button.setAttribute("aria-pressed", String(this.log));
      button.addEventListener("click", () => {
        this.log = !this.log;
        button.setAttribute("aria-pressed", String(this.log));
        this.draw();
      });
      legend.append(button);
    }
  }

  toggle(k, button) {
    if (!this.hidden.delete(k)) this.hidden.add(k);
    button.setAttribute("aria-pressed", String(!this.hidden.has(k)));
    this.apply(k);
  }

  apply(k) {
    this.kind.columnsOf(k).forEach((column) => this.u.setSeries(column, { show: !this.hidden.has(k) }));
    this.u.redraw(false);
  }

  show(announce = false) {
    if (!this.u) return;
    const { left } = this.u.cursor;
    const index = left >= 0 ? this.kind.pick(this.u) : null;
    this.index = index ?? null;
    const reading = this.index === null ? this.kind.rest(this.u) : this.kind.read(this.u, this.index);
    this.at.textContent = reading.at;
    reading.values.forEach((text, k) => {
      // Keep the largest width so far, so that the legend doesn't reflow while the cursor moves.
      this.widest[k] = Math.max(this.widest[k] || 0, text.length);
      this.values[k].style.minWidth = `${this.widest[k]}ch`;
      this.values[k].textContent = text;
    });
    if (announce) {
      const named = reading.values.map((text, k) => (text && !this.hidden.has(k) ? `${this.spec.series[k].name} ${text}` : ""));
      announcer.textContent = `${reading.at}: ${named.filter(Boolean).join(", ")}`;
    }
  }

  // A finger that moves sideways moves the cursor; up and down, it scrolls the page.
  touch(finger) {
    const { left, top } = this.u.over.getBoundingClientRect();
    this.u.setCursor({ left: finger.clientX - left, top: finger.clientY - top }, true, true);
  }

  key(event) {
    const { u, kind } = this;
    const [first, last] = [kind.first(u), kind.last(u)];
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" || event.key === "0") {
      u.setCursor({ left: -10, top: -10 }, true, true);
      if (event.key === "0") reset();
    } else if (event.key === "+" || event.key === "-") this.zoom(event.key === "+" ? 0.5 : 2);
    else if (move || event.key === "Home" || event.key === "End") {
      let index = event.key === "End" ? last : first;
      if (move && this.index === null) index = move > 0 ? first : last;
      else if (move) index = kind.next ? kind.next(this.index, move) : this.index + move;
      this.go(Math.max(first, Math.min(last, index)));
    } else return;
    event.preventDefault();
  }

  go(index) {
    if (!(index >= 0)) return;
    const [left, top] = this.kind.position(this.u, index);
    this.u.setCursor({ left, top }, true, true);
    this.show(true);
  }

  // Zoom around the cursor, in all charts with the same x axis together, as with the mouse.
  zoom(factor) {
    const { min, max } = this.u.scales.x;
    const centre = this.index === null ? (min + max) / 2 : this.u.posToVal(this.u.cursor.left, "x");
    const [low, high] = [centre - (centre - min) * factor, centre + (max - centre) * factor];
    const { sync } = this.spec;
    charts.filter((other) => other === this || (sync && other.spec.sync === sync)).forEach(({ u }) => {
      const x = u.data[0];
      u.setScale("x", { min: Math.max(x[0], low), max: Math.min(x[x.length - 1], high) });
    });
  }
}

function reset() {
  charts.forEach(({ u }) => u.setData(u.data, true));
}

// --- the page's smoothing slider------------------------------------------------------------------------------------

const smoothing = { weight: 0 };

function readSlider(slider) {
  const steps = 500 ** (slider.value / 100);
  smoothing.weight = 1 - 1 / steps;
  const text = slider.value === "0" ? "off" : `${format(+steps.toPrecision(2))} steps`;
  slider.setAttribute("aria-valuetext", text);
  slider.parentElement.querySelector("output").textContent = text;
}

function start() {
  const slider = document.querySelector(".chart-controls input");
  if (slider) readSlider(slider);
  document.body.append(announcer);
  document.querySelectorAll("figure.chart").forEach((element) => charts.push(new Chart(element)));
  if (slider) {
    slider.addEventListener("input", () => {
      readSlider(slider);
      charts.filter(({ spec }) => spec.smooth).forEach(({ u, kind }) => u.setData(kind.data(), false));
      charts.filter(({ spec }) => spec.smooth).forEach((chart) => (chart.u.redraw(), chart.show()));
    });
    document.querySelector(".chart-controls button").addEventListener("click", reset);
  }
  document.addEventListener("themechange", () => charts.forEach(({ u }) => u.redraw(false)));
}

start();
