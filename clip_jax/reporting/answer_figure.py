"""The report's headline figure: one small panel per comparison, one row per split.

Every panel is an SVG of its own, 360 units wide, so that a phone shows them one below the other.
All panels share one accuracy axis. The row's label is left of the axis, its value is right of it,
so that no text lies on an interval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.reporting import svg, tables
from clip_jax.reporting.figures import Looks
from clip_jax.reporting.svg import INK

# A panel's keys: name (of its file), title, detail (a line below the title; '' for none), points.
# A point's keys: rule (its colour and marker), label, split, accuracy, low, high, method.
Panel = Mapping[str, Any]

ALIGNED = 'aligned split'  # the label of the row that the figure is about
ROW, TOP, BOTTOM = 27.0, 50.0, 40.0  # heights in units
LEFT, RIGHT = 104.0, 108.0  # widths of the columns of labels and of values
ONE_SEED = (
  'Dashed bars: 95 % intervals over images for one seed, which say nothing about other runs.'
)
# The estimate's method -> what its bar is.
BAR_WORDS = {
  'crossed': 'Bars: 95 % intervals over seeds and images.',
  'range': 'Dashed bars: from the lower to the higher of two seeds, which give no interval.',
  'this checkpoint': ONE_SEED,
  'wilson': ONE_SEED,
  'cluster-robust': ONE_SEED,
  'none': 'Without a bar: all images belong to one group, so there is no interval.',
}


def panels(of: Sequence[Panel], looks: Looks) -> dict[str, str]:
  """Returns the SVG of every panel by its name; all panels have the same accuracy axis."""
  limits = _limits([point for panel in of for point in panel['points']])
  return {panel['name']: _panel(panel, limits, looks) for panel in of}


def caption(of: Sequence[Panel]) -> str:
  """Returns how to read the panels, with the meaning of their bars."""
  methods = {point['method'] for panel in of for point in panel['points']}
  bars = dict.fromkeys(words for method, words in BAR_WORDS.items() if method in methods)
  return ' '.join(
    [
      'Zero-shot accuracy in percent.',
      *bars,
      'If similar images did not matter, the aligned split would be as accurate as its control. If '
      'they were the only reason for the lead over the anchor alone, it would have no lead left.',
    ]
  )


def _limits(points: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
  """Returns the axis limits in percent: the range of all bars, rounded outwards to tens."""
  values = [
    100 * value
    for point in points
    for value in (point['accuracy'], point['low'], point['high'])
    if value is not None
  ]
  return 10 * (min(values) // 10), -10 * (-max(values) // 10)


def _panel(panel: Panel, limits: tuple[float, float], looks: Looks) -> str:
  points = panel['points']
  top = TOP if panel['detail'] else TOP - 18
  height = top + ROW * len(points) + BOTTOM

  def draw(figure) -> None:
    figure.set_layout_engine('none')
    ax = figure.add_axes(
      (
        LEFT / svg.WIDTH,
        BOTTOM / height,
        1 - (LEFT + RIGHT) / svg.WIDTH,
        ROW * len(points) / height,
      )
    )
    for y, point in enumerate(points):
      _row(ax, y, point, looks)
    beside = {'xycoords': 'axes fraction', 'annotation_clip': False, 'va': 'center'}
    place = lambda units: 1 + units / (ROW * len(points))
    left = -LEFT / (svg.WIDTH - LEFT - RIGHT)
    ax.annotate(panel['title'], (left, place(top - 12)), fontweight='bold', fontsize=12, **beside)
    ax.annotate(panel['detail'], (left, place(top - 33)), alpha=0.8, **beside)
    ax.set(xlim=limits, ylim=(len(points) - 0.5, -0.5), xlabel='accuracy, %')
    ax.set_yticks(())
    svg.few_ticks(ax.xaxis, 5)
    ax.grid(axis='x')

  return svg.render(draw, height, f'Accuracy on {panel["title"]}')


def _row(ax, y: int, point: Mapping[str, Any], looks: Looks) -> None:
  """Draws a split's point and interval, with its label at the left and its value at the right."""
  color, marker, _ = looks[point['rule']]
  value, bounds = tables.percent(point['accuracy']), tables.bracket(point['low'], point['high'])
  hover = f'{point["split"]}: {value} % {bounds}'.strip()
  if bounds:
    (bar,) = ax.plot(
      [100 * point['low'], 100 * point['high']],
      [y, y],
      color=color,
      linewidth=2.4,
      linestyle='-' if point['method'] == 'crossed' else (0, (2, 1)),
      solid_capstyle='butt',
      dash_capstyle='butt',
      alpha=0.75,
    )
    svg.hover(bar, hover)
  (mark,) = ax.plot(
    [100 * point['accuracy']], [y], marker, color=color, markersize=8, zorder=3, clip_on=False
  )
  svg.hover(mark, hover)
  beside = {'textcoords': 'offset points', 'va': 'center', 'annotation_clip': False}
  at = ('axes fraction', 'data')
  strong = 'bold' if point['label'] == ALIGNED else 'normal'
  ax.annotate(point['label'], (0, y), (-8, 0), xycoords=at, ha='right', fontweight=strong, **beside)
  ax.annotate(value, (1, y), (38, 0), xycoords=at, ha='right', fontweight=strong, **beside)
  ax.annotate(
    bounds, (1, y), (42, 0), xycoords=at, ha='left', fontsize=9, color=INK, alpha=0.75, **beside
  )
