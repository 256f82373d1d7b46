"""Plain arrays and dicts -> SVG curves: rows dropped, rows kept, pairs found by threshold; accuracy
by samples seen.

As in figures.py, every figure is one small panel. Each benchmark, or split, has one line, in the
colours of svg.SERIES; a broad line shows all benchmarks together.
"""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any

import numpy as np

from clip_jax.core.types import Array
from clip_jax.reporting import svg
from clip_jax.reporting.svg import INK

Rows = Sequence[Mapping[str, Any]]  # dicts with the keys that the comment beside the argument names

POINTS = 300  # per curve: enough for a small panel
_MARKED = 30  # points: a line with more of them has no marks
_SHORT = 15  # characters: legends of names up to this length have two columns


def rows_by_slack(
  slack: Array,  # [m], ascending
  lines: Rows,  # name, rows [m], at_zero (rows at slack 0), together (bool: all benchmarks)
  *,
  title: str,
  limits: tuple[float, float],  # of the slack
) -> str:
  """Returns the number of rows that an aligned split drops, by slack, on a logarithmic axis."""
  inside = _positions_within(slack, limits)
  most = max(1.0, *(float(line['rows'][inside].max()) for line in lines))

  def draw(ax) -> None:
    ax.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
    for line, style in zip(lines, _styles(lines)):
      rows = np.where(line['rows'] > 0, line['rows'], np.nan)[inside]
      ax.plot(slack[inside], rows, label=line['name'], **style)
      if line['at_zero'] > 0:
        ax.plot([0], [line['at_zero']], 'o', color=style['color'], markersize=6, zorder=5)
    ax.set(yscale='log', ylim=(0.8, 1.6 * most), xlim=limits, xlabel='slack', ylabel='rows removed')
    ax.yaxis.set_major_formatter(lambda value, _: svg.count_label(value))
    ax.minorticks_off()
    svg.few_ticks(ax.xaxis, 6)
    _names_below(ax, lines)

  return svg.panel(draw, 250 + _names_height(lines), title)


def rows_by_cut(
  cut: Array,  # [m] similarities, ascending
  lines: Rows,  # name, kept [m] (shares of the candidates), together (bool: all benchmarks)
  *,
  title: str,
  limits: tuple[float, float],  # of the cut
) -> str:
  """Returns the share of the candidates that near- or far-pruning keeps, by threshold."""
  inside = _positions_within(cut, limits)

  def draw(ax) -> None:
    for line, style in zip(lines, _styles(lines)):
      ax.plot(cut[inside], 100 * line['kept'][inside], label=line['name'], **style)
    ax.set(
      ylim=(0, 100),
      xlim=limits,
      xlabel='threshold on similarity to the nearest query',
      ylabel='% of candidates kept',
    )
    ax.set_yticks((0, 25, 50, 75, 100))
    svg.few_ticks(ax.xaxis, 5)
    _names_below(ax, lines)

  return svg.panel(draw, 230 + _names_height(lines), title)


def recall_by_clusters(
  points: Rows,  # clusters, recall, low, high
  *,
  title: str,
) -> str:
  """Returns the share of duplicate pairs that lie inside one cluster, by the number of clusters."""

  def draw(ax) -> None:
    xs = [p['clusters'] for p in points]
    ax.plot(xs, [100 * p['recall'] for p in points], color=svg.POOL_COLOR, marker='o', markersize=6)
    for p in points:
      svg.whisker(ax, p['clusters'], p['low'], p['high'], svg.POOL_COLOR)
    lowest = min(p['low'] for p in points)
    ax.set(
      xscale='log',
      xlabel='clusters (logarithmic axis)',
      ylabel='% of pairs found',
      ylim=(max(0.0, 100 * lowest - 5), 101),
    )
    ax.set_xticks(_spread_ticks(xs), [svg.count_label(x) for x in _spread_ticks(xs)])
    ax.minorticks_off()

  return svg.panel(draw, 230, title)


def accuracy_by_samples(
  lines: Rows,  # name, seeds (a dict for each seed: samples seen -> accuracy)
  *,
  title: str,
) -> str:
  """Returns accuracy against samples seen: a thin line for each seed, a broad one for their mean.

  The mean is drawn at the sample counts that all seeds of the line have.
  """

  def draw(ax) -> None:
    for line, (color, dash) in zip(lines, itertools.cycle(svg.SERIES)):
      for seed in line['seeds'] if len(line['seeds']) > 1 else ():
        ax.plot(*_sorted_percent(seed), color=color, linewidth=0.8, alpha=0.4)
      shared = set.intersection(*map(set, line['seeds']))
      mean = {n: float(np.mean([seed[n] for seed in line['seeds']])) for n in shared}
      xs, ys = _sorted_percent(mean)
      ax.plot(
        xs,
        ys,
        color=color,
        linestyle=dash,
        linewidth=1.8,
        marker='o' if len(xs) <= _MARKED else '',
        markersize=3.5,
        label=line['name'],
      )
    ax.set(xlabel='samples seen', ylabel='accuracy, %')
    svg.few_ticks(ax.xaxis, 5, counts=True)
    svg.legend_below(ax.figure, _columns(lines))

  rows = -(-len(lines) // _columns(lines))
  return svg.panel(draw, 240 + 17.0 * rows, title)


def _sorted_percent(points: Mapping[int, float]) -> tuple[list[int], list[float]]:
  """Returns the keys in order, and their values in percent."""
  xs = sorted(points)
  return xs, [100 * points[x] for x in xs]


def _positions_within(values: Array, limits: tuple[float, float]) -> Array:
  """Returns the positions of about POINTS of the values within limits, evenly spaced."""
  positions = np.flatnonzero((values >= limits[0]) & (values <= limits[1]))
  return positions[np.arange(len(positions)) % max(1, len(positions) // POINTS) == 0]


def _spread_ticks(xs: Sequence[float]) -> list[float]:
  """Returns values at least a factor of 1.6 apart, so that their tick labels do not overlap."""
  out: list[float] = []
  for x in sorted(xs):
    if not out or x >= 1.6 * out[-1]:
      out.append(x)
  return out


def _styles(lines: Rows) -> list[dict]:
  """Returns the plot style of each line: colours in order; all together is broad and in ink."""
  series = itertools.cycle(svg.SERIES)
  together = {'color': INK, 'linewidth': 4, 'alpha': 0.35, 'zorder': 1.5}  # below the others
  return [
    together if line['together'] else dict(zip(('color', 'linestyle'), next(series)), linewidth=1.8)
    for line in lines
  ]


def _columns(lines: Rows) -> int:
  return 2 if all(len(line['name']) <= _SHORT for line in lines) else 1


def _names_below(ax, lines: Rows) -> None:
  if len(lines) > 1:
    svg.legend_below(ax.figure, _columns(lines))


def _names_height(lines: Rows) -> float:
  return 17.0 * -(-len(lines) // _columns(lines)) if len(lines) > 1 else 0.0
