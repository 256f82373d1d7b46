"""Plain arrays and dicts -> SVG text for the report's page and for report/figures/*.svg.

Every figure is one small panel, 360 units wide: side by side on a wide screen, stacked on a phone,
with letters of the same size. Accuracies and similarities are given as proportions; axes show
percent. A point without an interval has low and high None.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.core.types import Array
from clip_jax.reporting import svg
from clip_jax.reporting.svg import ANCHOR_COLOR, INK, POOL_COLOR

LOSS_POINTS = 200  # most points of a run's loss curve, so that a page of many long runs stays small

Rows = Sequence[Mapping[str, Any]]  # dicts with the keys that the comment beside the argument names
Looks = Mapping[
  str, tuple[str, str, str]
]  # rule -> (colour, marker, label), in the order of legends


def similarity_histogram(
  anchor: Array | None,  # [Q] nearest-neighbour similarity to the anchor; None without an anchor
  pool: Array,  # [Q] nearest-neighbour similarity to the pool
  *,
  title: str,
  limits: tuple[float, float],
  bins: int = 40,
) -> str:
  """Returns histograms over queries of the similarity to the nearest anchor and pool image."""
  edges = np.linspace(*limits, bins + 1)

  def draw_histogram(ax, values: Array, name: str, **style) -> None:
    share = np.histogram(np.clip(values, *limits), edges)[0] / max(1, len(values))
    label = f'{name}, median {np.median(values):.2f}'
    ax.stairs(100 * share, edges, label=label, **style)
    ax.plot(
      [np.median(values)], [0], '^', color=style['color'], markersize=8, clip_on=False, zorder=5
    )

  def draw(ax) -> None:
    if anchor is not None and len(anchor):
      draw_histogram(ax, anchor, 'anchor', color=ANCHOR_COLOR, fill=True, alpha=0.45, linewidth=0)
    if len(pool):
      draw_histogram(ax, pool, 'pool', color=POOL_COLOR, linewidth=1.6)
    ax.set(
      xlim=limits, ylim=(0, None), xlabel='similarity to the nearest image', ylabel='% of queries'
    )
    svg.legend_above(ax, columns=2)

  return svg.panel(draw, 230, title, grid='', pad=27)


def accuracy_by_similarity(
  series: Rows,  # name, rule, adjusted (bool), bins: low, high, n, accuracy, accuracy_low, _high
  *,
  title: str,
  xlabel: str,
  enough: int = 20,
  looks: Looks,
) -> str:
  """Returns accuracy by bin of similarity, above a strip of bin sizes.

  Bins with n < `enough` are pale. `adjusted` curves (class effects removed) are dashed, with
  hollow marks.
  """

  def draw(figure) -> None:
    ax, strip = figure.subplots(
      2, 1, sharex=True, gridspec_kw={'height_ratios': (5, 1), 'hspace': 0.12}
    )
    for k, curve in enumerate(series):
      _binned(
        ax, curve, *looks[curve['rule']][:2], shift=0.1 * (k - (len(series) - 1) / 2), enough=enough
      )
    ax.set(ylim=(0, 100), ylabel='accuracy, %')
    ax.set_yticks((0, 25, 50, 75, 100))
    ax.grid(axis='y')
    ax.tick_params(bottom=False)
    ax.set_title(title, pad=27)
    svg.legend_above(ax, columns=len(series))
    for b in series[0]['bins']:
      middle = (b['low'] + b['high']) / 2
      strip.bar(
        middle,
        b['n'],
        0.8 * (b['high'] - b['low']),
        color=INK,
        alpha=0.45 if b['n'] >= enough else 0.15,
      )
      strip.annotate(
        svg.count_label(b['n']),
        (middle, b['n']),
        (0, 1.5),
        textcoords='offset points',
        ha='center',
        fontsize=7.5,
        alpha=0.8,
      )
    strip.set(xlabel=xlabel)
    strip.set_ylabel('n', rotation=0, ha='right', va='center')
    strip.set_yticks(())
    svg.few_ticks(strip.xaxis, 5)
    strip.spines['left'].set_visible(False)

  return svg.render(draw, 290, title)


def _binned(
  ax, curve: Mapping[str, Any], color: str, marker: str, shift: float, enough: int
) -> None:
  """Draws one curve, moved sideways by `shift` bin widths to keep curves apart."""
  mark = {
    'marker': marker,
    'markersize': 6,
    'color': color,
    'linestyle': 'none',
    'markerfacecolor': 'none' if curve['adjusted'] else color,
  }
  line = {'linestyle': (0, (4, 2)) if curve['adjusted'] else '-', 'linewidth': 1.2}
  points = [((b['low'] + b['high']) / 2 + shift * (b['high'] - b['low']), b) for b in curve['bins']]
  solid = [(x, 100 * b['accuracy']) for x, b in points if b['n'] >= enough]
  ax.plot([x for x, _ in solid], [y for _, y in solid], color=color, alpha=0.55, **line)
  for x, b in points:
    is_solid = b['n'] >= enough
    svg.whisker(ax, x, b['accuracy_low'], b['accuracy_high'], color, 0.8 if is_solid else 0.25)
    (drawn,) = ax.plot(
      [x], [100 * b['accuracy']], **mark, alpha=1.0 if is_solid else 0.3, clip_on=False, zorder=3
    )
    svg.hover(
      drawn,
      f'{curve["name"]}, {b["low"]:.2f} to {b["high"]:.2f}: {100 * b["accuracy"]:.1f} %, '
      f'{b["n"]:,} queries',
    )
  ax.plot([], [], **{**mark, **line}, label=curve['name'])


def accuracy_by_size(
  curves: Mapping[str, Rows],  # rule -> points: size, accuracy, low, high
  *,
  title: str,
  base: dict[str, Any] | None,  # a point of the same keys
  reference: dict[str, Any] | None,  # of the anchor-only split: accuracy, low, high
  limits: tuple[float, float],  # of accuracy
  looks: Looks,
) -> str:
  """Returns accuracy against size for near-, far- and random-pruned splits of one benchmark."""

  def draw(ax) -> None:
    if reference is not None:
      color, _, words = looks['anchor']
      ax.axhline(
        100 * reference['accuracy'],
        color=color,
        linestyle=(0, (4, 3)),
        linewidth=1.2,
        label=f'{words}, {100 * reference["accuracy"]:.1f} %',
      )
      if reference['low'] is not None:
        ax.axhspan(
          100 * reference['low'], 100 * reference['high'], color=color, alpha=0.12, linewidth=0
        )
    for rule, points in curves.items():
      color, marker, words = looks[rule]
      every: list[Mapping[str, Any]] = [*points, *([base] if base else [])]
      ordered = sorted(every, key=lambda p: p['size'])
      ax.plot(
        [p['size'] for p in ordered],
        [100 * p['accuracy'] for p in ordered],
        color=color,
        marker=marker,
        markersize=6,
        label=words,
      )
      for p in points:
        svg.whisker(ax, p['size'], p['low'], p['high'], color)
        (mark,) = ax.plot([p['size']], [100 * p['accuracy']], marker, color=color, markersize=6)
        svg.hover(mark, f'{words}, {p["size"]:,} pool rows: {100 * p["accuracy"]:.1f} %')
    if base:
      svg.whisker(ax, base['size'], base['low'], base['high'], INK)
      ax.plot(
        [base['size']],
        [100 * base['accuracy']],
        'o',
        color=INK,
        markersize=7,
        zorder=5,
        label=f'{looks["all"][2]}, {100 * base["accuracy"]:.1f} %',
      )
    ax.set(ylim=(100 * limits[0], 100 * limits[1]), ylabel='accuracy, %', xlabel='pool rows kept')
    svg.few_ticks(ax.xaxis, 5, counts=True)
    svg.legend_below(ax.figure)

  return svg.panel(draw, 350, title)


def differences(
  rows: Rows,  # title, detail, rule, estimate, low, high (differences of proportions)
  *,
  title: str,
  xlabel: str,
  margin: float | None = None,
  looks: Looks,
) -> str:
  """Returns differences in points with intervals; `margin` shades the range of 'no loss'."""

  def draw(ax) -> None:
    for y, row in enumerate(rows):
      color, marker, _ = looks[row['rule']]
      if margin is not None:  # beside the line only: no text lies on it
        band = [-100 * margin, 100 * margin]
        ax.fill_between(band, y - 0.22, y + 0.22, color=INK, alpha=0.1, linewidth=0)
      hover = f'{row["title"]}: {row["detail"]}'
      if row['low'] is not None:
        (bar,) = ax.plot(
          [100 * row['low'], 100 * row['high']],
          [y, y],
          color=color,
          linewidth=2.4,
          alpha=0.75,
          solid_capstyle='butt',
        )
        svg.hover(bar, hover)
      ax.plot([0, 0], [y - 0.22, y + 0.22], color=INK, linewidth=0.9)
      (mark,) = ax.plot([100 * row['estimate']], [y], marker, color=color, markersize=7)
      svg.hover(mark, hover)
      _row_text(ax, y, row['title'])
      ax.annotate(  # below the line: beside a long name it would not fit
        row['detail'],
        (1, y + 0.36),
        xycoords=('axes fraction', 'data'),
        va='center',
        ha='right',
        alpha=0.8,
      )
    ax.set(ylim=(len(rows) - 0.4, -0.75), xlabel=xlabel)
    _rows_only(ax)
    svg.few_ticks(ax.xaxis, 6)

  return svg.panel(draw, 58 * len(rows) + 84, title, grid='')


def balance(
  rows: Rows,  # name, before, after (standardised differences; None: not defined)
  *,
  title: str,
  after: str,  # what the rows of `after` are
  limit: float,
) -> str:
  """Returns absolute standardised differences before and after matching (a love plot).

  A control is balanced if every difference after matching is below the limit, a vertical line.
  """

  def draw(ax) -> None:
    for y, row in enumerate(rows):
      _row_text(ax, y, row['name'])
      ax.plot([limit, limit], [y - 0.22, y + 0.22], color=INK, linewidth=0.9)
      known = [abs(row[key]) for key in ('before', 'after') if row[key] is not None]
      ax.plot([0, *known], [y] * (len(known) + 1), color=INK, linewidth=0.7, alpha=0.35)
      for key, words, face in (
        ('before', 'all candidates', 'none'),
        ('after', after, POOL_COLOR),
      ):
        if row[key] is not None:
          (mark,) = ax.plot(
            [abs(row[key])], [y], 'o', color=POOL_COLOR, markerfacecolor=face, clip_on=False
          )
          svg.hover(mark, f'{row["name"]}, against {words}: {abs(row[key]):.3f}')
    for words, face in (('all candidates', 'none'), (after, POOL_COLOR)):
      ax.plot([], [], 'o', color=POOL_COLOR, markerfacecolor=face, label=words)
    ax.set(xlim=(0, None), ylim=(len(rows) - 0.5, -0.85), xlabel='absolute standardised difference')
    _rows_only(ax)
    svg.few_ticks(ax.xaxis, 6)
    svg.legend_above(ax, columns=2)

  return svg.panel(draw, 36 * len(rows) + 100, title, grid='', pad=27)


def _row_text(ax, y: float, text: str) -> None:
  """Writes a row's name above its line, where long names fit on a narrow screen."""
  ax.annotate(
    text,
    (0, y - 0.44),
    xycoords=('axes fraction', 'data'),
    va='center',
  )


def _rows_only(ax) -> None:
  ax.set_yticks(())
  ax.spines['left'].set_visible(False)


def dose(
  points: Rows,  # share (of the aligned count removed), estimate, low, high
  *,
  title: str,
  look: tuple[str, str, str],  # of the aligned splits
) -> str:
  """Returns the difference to the control against the share of the aligned count removed."""

  def draw(ax) -> None:
    ax.axhline(0, color=INK, linewidth=0.9)
    ordered = sorted(points, key=lambda p: p['share'])
    color, marker, _ = look
    ax.plot(
      [100 * p['share'] for p in ordered],
      [100 * p['estimate'] for p in ordered],
      color=color,
      marker=marker,
      markersize=6,
    )
    for p in ordered:
      svg.whisker(ax, 100 * p['share'], p['low'], p['high'], color)
      (mark,) = ax.plot(
        [100 * p['share']], [100 * p['estimate']], marker, color=color, markersize=6
      )
      svg.hover(mark, f'{100 * p["share"]:.1f} % removed: {100 * p["estimate"]:+.1f} points')
    ax.set(
      xlabel='rows removed, % of the aligned count',
      ylabel='difference to control, points',
      xlim=(0, None),
    )

  return svg.panel(draw, 240, title)


def robustness_plane(
  points: Rows,  # rule, x, y (estimates of accuracies)
  *,
  title: str,
  xname: str,
  yname: str,
  line: Mapping[str, Any] | None = None,  # the baseline: accuracies x, y, low, high [n]
  looks: Looks,
) -> str:
  """Returns accuracy on one benchmark against accuracy on another, on logit axes.

  Every point has an interval on both axes; the baseline has the band of its models.
  """
  xs, ys = (_logit([p[axis].value for p in points]) for axis in 'xy')
  xlim, ylim = ((values.min() - 0.35, values.max() + 0.35) for values in (xs, ys))

  def draw(ax) -> None:
    if line is not None:
      x, y, low, high = (_logit(line[key]) for key in ('x', 'y', 'low', 'high'))
      style = {'color': INK, 'linestyle': (0, (4, 3)), 'linewidth': 1.2}
      ax.plot(x, y, **style, alpha=0.5, label='models trained on ImageNet alone, 95 % band')
      ax.fill_between(x, low, high, color=INK, alpha=0.1, linewidth=0)
    else:
      ax.plot([-9, 9], [-9, 9], color=INK, alpha=0.3, linewidth=1, label='equal accuracy')
    for rule, (color, marker, words) in looks.items():
      positions = [k for k, p in enumerate(points) if p['rule'] == rule]
      for k in positions:
        x, y = points[k]['x'], points[k]['y']
        for across, along, bounds in ((ys[k], 0, x), (xs[k], 1, y)):
          ends = _logit([bounds.low, bounds.high])
          pair = [ends, [across, across]][:: 1 - 2 * along]
          ax.plot(*pair, color=color, linewidth=1.0, alpha=0.45)
      if positions:
        ax.plot([], [], marker, color=color, markersize=7, label=words)
      for k in positions:
        (mark,) = ax.plot([xs[k]], [ys[k]], marker, color=color, markersize=7)
        x, y = (100 * points[k][axis].value for axis in 'xy')
        svg.hover(mark, f'{words}: {y:.1f} % on {yname}, {x:.1f} % on {xname}')
    for axis, (low, high) in ((ax.xaxis, xlim), (ax.yaxis, ylim)):
      ticks = svg.percent_ticks(lambda p, low=low, high=high: low <= _logit(p / 100) <= high)
      axis.set_ticks(_logit(np.array(ticks) / 100), [f'{p:g}' for p in ticks])
    ax.set(
      xlim=xlim,
      ylim=ylim,
      xlabel=f'accuracy on {xname}, % (logit axis)',
      ylabel=f'accuracy on {yname}, %',
    )
    svg.legend_below(ax.figure)

  return svg.panel(draw, 300 + 17 * (1 + len({p['rule'] for p in points})), title, grid='both')


def _part_means(values: Array) -> Array:  # [n] -> [min(n, LOSS_POINTS)]
  """Returns the means of LOSS_POINTS equal parts; the values themselves if they are as few."""
  if len(values) <= LOSS_POINTS:
    return values
  return np.array([part.mean() for part in np.array_split(np.asarray(values), LOSS_POINTS)])


def _logit(p: Array | Sequence[float] | float) -> Array:
  p = np.clip(np.asarray(p, float), 0.002, 0.998)
  return np.log(p / (1 - p))


def loss_curves(
  curves: Rows,  # rule, steps [n], loss [n]
  *,
  title: str,
  looks: Looks,
) -> str:
  """Returns the training loss of every run; runs of one rule share a colour.

  A run with more than LOSS_POINTS values is drawn as the means of as many equal parts.
  """

  def draw(ax) -> None:
    named = set()
    for curve in curves:
      color, _, words = looks[curve['rule']]
      ax.plot(
        *(_part_means(curve[key]) for key in ('steps', 'loss')),
        color=color,
        linewidth=1.1,
        alpha=0.8,
        label=None if curve['rule'] in named else words,
      )
      named.add(curve['rule'])
    ax.set(xlabel='step', ylabel='training loss')
    svg.few_ticks(ax.xaxis, 5, counts=True)
    svg.legend_below(ax.figure)

  return svg.panel(draw, 250 + 17 * len({curve['rule'] for curve in curves}), title)
