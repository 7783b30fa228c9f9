// --- kinds of charts: data and options for uPlot, and the values at the cursor-----------------------------------

const axisOf = (label, more) => ({
  stroke: () => color("quiet"),
  font: FONT,
  labelFont: FONT,
  label,
  labelSize: label ? 18 : 0,
  labelGap: 0,
  grid: { stroke: () => color("line"), width: 1 },
  ticks: { stroke: () => color("line"), width: 1, size: 4 },
  ...more,
});
const acrossAxis = (label, more) => axisOf(label, { values: ticks, size: 30, space: 56, ...more });
const upAxis = (label, log) =>
  axisOf(label, {
    values: log ? (u, splits) => splits.map((v) => (v === null ? "" : format(v))) : ticks,
    size: (u, values) => 14 + 6.7 * Math.max(2, ...(values || []).map((v) => String(v ?? "").length)),
    space: 34,
  });

const WHOLE = [...Array(10).keys()].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power));

function lineKind(spec, chart) {
  const whole = spec.series.every((s) => s.x.every(Number.isInteger)); // steps have no ticks between them
  const columnsOfSeries = []; // the columns of each series
  const series = [{}];
  const bands = [];
  const tint = (s, alpha) => () => (alpha < 1 ? shade(`series-${s.color}`, alpha) : color(`series-${s.color}`));
  for (const s of spec.series) {
    const columns = { raw: series.length, line: series.length + 1 };
    const few = s.x.length <= 40;
    series.push({ stroke: tint(s, 0.3), width: 1, points: { show: false } });
    series.push({
      stroke: tint(s, 1),
      width: 2,
      dash: DASHES[s.dash],
      points: { show: few, size: 5, fill: tint(s, 1) },
    });
    if (s.low) {
      columns.band = [series.length + 1, series.length];
      series.push({ stroke: "transparent", points: { show: false } });
      series.push({ stroke: "transparent", points: { show: false } });
      bands.push({ series: columns.band, fill: tint(s, 0.14) });
    }
    columnsOfSeries.push(columns);
  }
  const valuesOf = (s) => {
    const weight = spec.smooth ? smoothing.weight : 0;
    const average = (values) => (weight ? smoothed(s.x, values, weight) : values);
    const line = weight ? average(basis(s)) : s.y;
    return [s.x, s.y, line, ...(s.low ? [average(s.low), average(s.high)] : [])];
  };
  const data = () => (spec.series.length > 1 ? uPlot.join(spec.series.map(valuesOf)) : valuesOf(spec.series[0]));
  // The smoothed value and, if it differs, the measured one.
  const shown = (line, raw) => format(line) + (raw != null && line !== raw ? ` (${format(raw)})` : "");
  const inView = (u) => u.series[0].idxs || [0, u.data[0].length - 1];
  const valueOf = (column, i) => {
    const at = (j) => column[j] !== undefined && column[j] !== null;
    let last = column.length - 1;
    while (last > 0 && !at(last)) last -= 1;
    if (i > last) return null;
    let j = i;
    while (j > 0 && column[j] === undefined) j -= 1; // this run has no point at this x
    return column[j];
  };
  return {
    data,
    options: () => ({
      series,
      bands,
      scales: { x: { time: false }, y: { distr: chart.log ? 3 : 1, range: (u, low, high) => rangeOf(low, high) } },
      axes: [acrossAxis(spec.x_name, whole ? { incrs: WHOLE } : {}), upAxis(undefined, chart.log)],
      cursor: {
        y: false,
        points: { size: (u, i) => (columnsOfSeries.some((columns) => columns.line === i) ? 8 : 0) },
        drag: { x: true, y: false },
        ...(spec.sync ? { sync: { key: spec.sync, setSeries: false, scales: ["x", null] } } : {}),
      },
    }),
    columnsOf: (k) => [columnsOfSeries[k].raw, columnsOfSeries[k].line, ...(columnsOfSeries[k].band || [])],
    draw: (u) => spec.limits.forEach((limit) => drawLimit(u, limit)),
    pick: (u) => u.cursor.idx,
    first: (u) => inView(u)[0],
    last: (u) => inView(u)[1],
    position: (u, i) => [u.valToPos(u.data[0][i], "x"), u.over.clientHeight / 2],
    read: (u, i) => ({
      at: `${spec.x_name} ${format(u.data[0][i])}`,
      values: columnsOfSeries.map((columns) => shown(...[columns.line, columns.raw].map((c) => valueOf(u.data[c], i)))),
    }),
    rest: (u) => ({
      at: `last ${spec.x_name}`,
      values: columnsOfSeries.map((columns) => shown(...[columns.line, columns.raw].map((c) => u.data[c].findLast((v) => v != null)))),
    }),
  };

  function rangeOf(low, high) {
    const bounds = [low, high, ...spec.limits.map((limit) => limit.y)].filter((v) => v !== null && v !== undefined);
    if (!bounds.length) return [0, 1];
    const [least, most] = [Math.min(...bounds), Math.max(...bounds)];
    if (least === most && chart.log) return [least / 2, least * 2];
    if (least === most) return [Math.min(0, 2 * least), Math.max(0, 2 * least) || (least ? 0 : 1)];
    return chart.log && least > 0 ? uPlot.rangeLog(least, most, 10, false) : uPlot.rangeNum(least, most, 0.08, true);
  }
}

function drawLimit(u, limit) {
  const y = Math.round(u.valToPos(limit.y, "y", true));
  const { left, top, width, height } = u.bbox;
  if (y < top || y > top + height) return;
  const context = u.ctx;
  context.save();
  context.strokeStyle = context.fillStyle = color("bad");
  context.lineWidth = uPlot.pxRatio;
  context.setLineDash([5 * uPlot.pxRatio, 4 * uPlot.pxRatio]);
  context.beginPath();
  context.moveTo(left, y);
  context.lineTo(left + width, y);
  context.stroke();
  context.font = `${12 * uPlot.pxRatio}px system-ui, sans-serif`;
  context.textAlign = "right";
  const below = y - top < 18 * uPlot.pxRatio;
  context.textBaseline = below ? "top" : "bottom";
  context.fillText(limit.name, left + width - 4 * uPlot.pxRatio, y + (below ? 3 : -3) * uPlot.pxRatio);
  context.restore();
}

const padded = (values, share) => {
  const [least, most] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const more = (most - least || Math.abs(most) || 1) * share;
  return [least - more, most + more];
};
// uPlot draws axes, zoom and cursor for two invisible corner points; the marks are drawn on top.
const frame = ([left, right], [bottom, top], more) => ({
  series: [{}, { paths: () => null, points: { show: false } }],
  scales: { x: { time: false, range: (u, a, b) => [a ?? left, b ?? right] }, y: { range: () => [bottom, top] } },
  cursor: { points: { show: false }, ...more },
});
const clipped = (u, paint) => {
  u.ctx.save();
  u.ctx.beginPath();
  u.ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
  u.ctx.clip();
  paint(u.ctx, uPlot.pxRatio);
  u.ctx.restore();
};

// Points, larger if they stand for more cases; spec.connected joins them by a line, spec.diagonal draws the ideal of a calibration.
function pointsKind(spec, chart) {
  const points = spec.series.flatMap((s, k) => s.x.map((x, i) => ({ x, y: s.y[i], k, n: s.n && s.n[i], i })));
  points.sort((a, b) => a.x - b.x || a.y - b.y);
  const empty = !points.length;
  const across = spec.diagonal || empty ? [-0.03, 1.03] : padded(points.map((p) => p.x), 0.03);
  const up = spec.diagonal || empty ? [-0.03, 1.03] : padded(points.map((p) => p.y), 0.05);
  const most = Math.max(1, ...points.map((p) => p.n || 0));
  const shown = (p) => !chart.hidden.has(p.k);
  const spot = (u, p) => [u.valToPos(p.x, "x"), u.valToPos(p.y, "y")];
  const next = (i, by) => {
    let j = i + by;
    while (points[j] && !shown(points[j])) j += by;
    return points[j] ? j : i;
  };
  const end = (i, by) => (points[i] && shown(points[i]) ? i : next(i, by));
  return {
    data: () => [across, up],
    options: () => ({
      ...frame(across, up, { drag: { x: true, y: true, uni: 30 } }),
      axes: [acrossAxis(spec.x_name), upAxis(spec.y_name)],
    }),
    columnsOf: () => [],
    draw: (u) =>
      clipped(u, (context, ratio) => {
        if (spec.diagonal) {
          context.strokeStyle = color("edge");
          context.lineWidth = ratio;
          context.setLineDash([5 * ratio, 4 * ratio]);
          context.beginPath();
          context.moveTo(u.valToPos(0, "x", true), u.valToPos(0, "y", true));
          context.lineTo(u.valToPos(1, "x", true), u.valToPos(1, "y", true));
          context.stroke();
          context.setLineDash([]);
        }
        spec.series.forEach((s, k) => {
          if (chart.hidden.has(k)) return;
          const visible = points.filter((p) => p.k === k);
          context.fillStyle = shade(`series-${s.color}`, spec.connected ? 1 : 0.5);
          context.strokeStyle = color(`series-${s.color}`);
          context.lineWidth = 2 * ratio;
          if (spec.connected) {
            context.beginPath();
            s.x.forEach((x, i) => context.lineTo(u.valToPos(x, "x", true), u.valToPos(s.y[i], "y", true)));
            context.stroke();
          }
          for (const p of visible) {
            context.beginPath();
            const radius = p.n ? 3 + 5 * Math.sqrt(p.n / most) : 2.6;
            context.arc(u.valToPos(p.x, "x", true), u.valToPos(p.y, "y", true), radius * ratio, 0, 2 * Math.PI);
            context.fill();
          }
        });
      }),
    pick: (u) => {
      let nearest = null;
      let least = GRAB ** 2;
      points.forEach((p, i) => {
        const [left, top] = spot(u, p);
        const distance = (left - u.cursor.left) ** 2 + (top - u.cursor.top) ** 2;
        if (shown(p) && distance < least) [nearest, least] = [i, distance];
      });
      return nearest;
    },
    first: () => end(0, 1),
    last: () => end(points.length - 1, -1),
    next,
    position: (u, i) => spot(u, points[i]),
    read: (u, i) => {
      const { k, x, y, n, i: index } = points[i];
      const { labels } = spec.series[k];
      const at = [`${spec.x_name} ${format(x)}`, ...(labels ? [labels[index]] : []), ...(n ? [`${n} cases`] : [])];
      return { at: at.join(", "), values: spec.series.map((s, j) => (j === k ? format(y) : "")) };
    },
    rest: () => ({ at: "", values: spec.series.map(() => "") }),
  };
}

// Bars between spec.edges, with names or the edges on the axis.
function barKind(spec, chart) {
  const { edges, names } = spec;
  const heights = spec.series.flatMap((s) => s.y.filter((v) => v !== null));
  const up = [Math.min(0, ...heights) * 1.08, Math.max(0, ...heights) * 1.08 || 1];
  const across = [edges[0], edges[edges.length - 1]];
  const bins = edges.length - 1;
  const middle = (i) => (edges[i] + edges[i + 1]) / 2;
  const title = (i) => (names ? names[i] : `${spec.x_name} ${format(edges[i])} to ${format(edges[i + 1])}`);
  const under = names && {
    splits: () => names.map((_, i) => middle(i)),
    values: (u) => {
      const room = u.bbox.width / uPlot.pxRatio / bins / 6.7;
      return names.map((name) => (name.length <= room ? name : `${name.slice(0, Math.max(1, room - 1))}…`));
    },
    grid: { show: false },
    ticks: { show: false },
  };
  return {
    data: () => [across, [up[0], up[1]]],
    options: () => ({
      ...frame(across, up, { y: false, drag: { x: false, y: false } }),
      axes: [acrossAxis(names ? " " : spec.x_name, under), upAxis(spec.y_name)],
    }),
    columnsOf: () => [],
    draw: (u) =>
      clipped(u, (context, ratio) => {
        const shown = spec.series.filter((_, k) => !chart.hidden.has(k));
        const ground = u.valToPos(0, "y", true);
        const perBin = names ? shown.length : 1; // the bars of histograms overlap
        shown.forEach((s, index) => {
          context.fillStyle = shade(`series-${s.color}`, perBin === shown.length ? 1 : 0.6);
          s.y.forEach((value, i) => {
            if (value === null) return;
            const [left, right] = [u.valToPos(edges[i], "x", true), u.valToPos(edges[i + 1], "x", true)];
            const gap = names ? (right - left) * 0.12 : 0;
            const width = (right - left - 2 * gap) / perBin;
            const top = u.valToPos(value, "y", true);
            const begin = left + gap + (index % perBin) * width;
            context.fillRect(begin, Math.min(top, ground), width - ratio, Math.abs(ground - top));
          });
        });
      }),
    pick: (u) => {
      const x = u.posToVal(u.cursor.left, "x");
      const i = edges.findIndex((edge, j) => j < bins && x >= edge && x <= edges[j + 1]);
      return i < 0 ? null : i;
    },
    first: () => 0,
    last: () => bins - 1,
    position: (u, i) => [u.valToPos(middle(i), "x"), u.over.clientHeight / 2],
    read: (u, i) => ({ at: title(i), values: spec.series.map((s) => format(s.y[i])) }),
    rest: () => ({ at: "", values: spec.series.map(() => "") }),
  };
}
