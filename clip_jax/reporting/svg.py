"""Style of all figures, and a matplotlib drawing -> SVG text for light and dark backgrounds.

Backgrounds are transparent, ink is `currentColor`, colours are mid-tones. Equal input gives equal
bytes. Matplotlib is imported inside functions, because every start of the program imports this
module through the studies' tables of products.
"""

from collections.abc import Callable, Mapping
import io
import itertools
import re
from typing import Any
from xml.sax import saxutils

import numpy as np

from clip_jax.reporting import page

WIDTH = 360.0  # units; the page shows one unit as one CSS pixel
INK = '#010203'  # replaced by currentColor in the finished SVG

# (colour, marker) of the rules, in the caller's order; repeats if there are more rules. Colours
# follow Okabe and Ito: distinguishable for colour-blind readers, on white paper and dark screens.
PALETTE = (
  (INK, 'o'),
  ('#8c8c8c', 's'),
  ('#3fa7dd', 'P'),
  ('#d55e00', 'D'),
  ('#00966d', 'o'),
  ('#c98a00', 'o'),
  ('#c2609a', 'v'),
  ('#2f7fc4', '^'),
  ('#7a5195', 'X'),
  ('#b8472a', 'd'),
  ('#8f7a3d', 'H'),
  ('#5b7f95', 'p'),
  ('#6f8f3f', '*'),
  ('#a0659a', '<'),
  ('#cc3d3d', 'X'),
  ('#2a8c8c', '>'),
  ('#b05a7a', 'h'),
  ('#7f7f2a', '8'),
  ('#4a6fa5', 'D'),
  ('#8a6d5a', 's'),
)


def looks(labels: Mapping[str, str]) -> dict[str, tuple[str, str, str]]:
  """Returns rule -> (colour, marker, label), from rule -> label."""
  return {
    rule: (*mark, label) for (rule, label), mark in zip(labels.items(), itertools.cycle(PALETTE))
  }


# (colour, dash) of the benchmarks' curves, in order; repeats if there are more benchmarks.
SERIES = tuple(
  (color, dash)
  for dash in ('-', (0, (4, 2)), (0, (1.2, 1.4)))
  for color in (
    '#2f7fc4',
    '#d55e00',
    '#00966d',
    '#c2609a',
    '#c98a00',
    '#7a5195',
    '#3fa7dd',
    '#8c8c8c',
  )
)
POOL_COLOR, ANCHOR_COLOR = '#2f7fc4', '#8c8c8c'

_STYLE = {
  'svg.fonttype': 'none',
  'font.family': ['DejaVu Sans'],
  'font.size': 10.5,
  'text.color': INK,
  'axes.edgecolor': INK,
  'axes.labelcolor': INK,
  'axes.labelsize': 10.5,
  'axes.linewidth': 0.7,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.titlesize': 12,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.titlepad': 10,
  'xtick.color': INK,
  'ytick.color': INK,
  'xtick.major.width': 0.7,
  'ytick.major.width': 0.7,
  'xtick.major.size': 3,
  'ytick.major.size': 0,
  'grid.color': INK,
  'grid.alpha': 0.12,
  'grid.linewidth': 0.7,
  'legend.frameon': False,
  'legend.fontsize': 10.5,
  'lines.linewidth': 1.8,
  'path.simplify': False,
}
_HOVER = 'hover: '  # marks ids whose text `render` turns into a <title>
_FONT = 'system-ui, sans-serif'  # narrower than DejaVu, which sets the layout: it always fits


def render(draw: Callable[..., None], height: float, title: str) -> str:
  """Returns the drawing of `draw(figure)`, `height` units high, as an <svg> without a size."""
  import matplotlib
  from matplotlib.figure import Figure  # not pyplot: no global state, safe in any thread

  style: Any = {**matplotlib.rcParamsDefault, **_STYLE, 'backend': 'agg', 'svg.hashsalt': title}
  with matplotlib.rc_context(style):
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout='constrained')
    draw(figure)
    buffer = io.StringIO()
    figure.savefig(
      buffer,
      format='svg',
      transparent=True,
      metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')),
    )
  text = buffer.getvalue()
  text = text[text.index('<svg') :].strip()
  text = re.sub(
    r'<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>', '', text, flags=re.S
  )
  label = saxutils.escape(title, {'"': '&quot;'})
  head = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    f'viewBox="0 0 {WIDTH:g} {height:g}" role="img" stroke-linejoin="round" '
    f'aria-label="{label}">'
  )
  text = re.sub(r'<svg[^>]*>', lambda _: head, text, count=1)
  text = re.sub(f'<g id="{_HOVER}([^"]*)">', r'<g><title>\1</title>', text)
  text = re.sub(r'<g id="[^"]*">', '<g>', text)  # names would repeat on a page of many figures
  text = re.sub(r'font-family: [^;\"]*', f'font-family: {_FONT}', text)
  text = re.sub(r"(font: [^\"]*?)'DejaVu Sans'[^;\"]*", rf'\g<1>{_FONT}', text)
  return re.sub(r'\n\s*', '\n', text.replace(INK, 'currentColor'))


def hover(artist: Any, text: str) -> None:
  """Makes a browser show the text while the pointer is over a line or a mark of the figure."""
  artist.set_gid(_HOVER + text)


def panel(
  draw: Callable[..., None],
  height: float,
  title: str,
  *,
  grid: str = 'y',  # axes with grid lines: 'x' | 'y' | 'both' | '' (none)
  pad: float | None = None,  # points between axes and title; None: the style's default
) -> str:
  """Returns the SVG of one pair of axes with a title; `draw(ax)` fills the axes."""

  def whole(figure) -> None:
    ax = figure.add_subplot()
    draw(ax)
    if grid:
      ax.grid(axis=grid)
    ax.set_title(title, pad=pad)

  return render(whole, height, title)


def standalone(text: str) -> str:
  """Returns a figure as an SVG file: with a size and ink for light and dark colour schemes."""
  box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
  assert box is not None  # `render` writes it
  width, height = box.groups()
  style = (
    '<style>svg{color:#222;font-family:system-ui,sans-serif}'
    '@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>'
  )
  head, body = text.split('>', 1)
  return page.without_controls(
    '<?xml version="1.0" encoding="utf-8"?>\n'
    f'{head} width="{width}" height="{height}">{style}{body}\n'
  )


def count_label(value: float) -> str:
  """Returns a count as an axis label: 900, 1.5k, 75M, 200M."""
  for unit, name in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= 0.9995 * unit:  # less has three digits of the unit below: 999,700 is 1M
      return f'{value / unit:.3g}{name}'
  return f'{value:.0f}'


def whisker(
  ax, x: float, low: float | None, high: float | None, color: str, alpha: float = 0.6
) -> None:
  """Draws a vertical interval at x, if both bounds are given (as proportions)."""
  if low is not None and high is not None:
    ax.plot([x, x], [100 * low, 100 * high], color=color, linewidth=1.4, alpha=alpha)


def legend_above(ax, columns: int) -> None:
  """Draws the legend in one line between the title and the axes."""
  ax.legend(
    loc='lower left',
    bbox_to_anchor=(-0.02, 1.02),
    ncols=columns,
    handlelength=1.2,
    columnspacing=1.2,
    borderpad=0.2,
    borderaxespad=0,
  )


def legend_below(figure, columns: int = 1) -> None:
  """Draws the legend below the axes, by default one entry per line, for long labels."""
  figure.legend(
    loc='outside lower left',
    handlelength=1.6,
    labelspacing=0.35,
    borderpad=0.2,
    columnspacing=1.2,
    ncols=columns,
  )


def few_ticks(axis, most: int, counts: bool = False) -> None:
  """Limits an axis to `most` round ticks; with `counts`, formats them by `count`."""
  from matplotlib.ticker import MaxNLocator

  axis.set_major_locator(MaxNLocator(most, steps=(1, 2, 5, 10)))
  if counts:
    axis.set_major_formatter(lambda value, _: count_label(value))


def percent_ticks(visible: Callable[[float], bool]) -> list[float]:
  """Returns tick percentages of a logit axis: the coarsest choice with at least four visible."""
  choices = [(1, 5, 20, 50, 80, 95, 99), (1, 2, 5, 10, 20, 40, 60, 80, 90, 95, 98, 99)]
  choices += [tuple(np.arange(step, 100, step)) for step in (10, 5, 2, 1, 0.5)]
  shown = [[float(p) for p in choice if visible(p)] for choice in choices]
  return next((ticks for ticks in shown if len(ticks) >= 4), shown[-1])
