"""Plain results -> the report's sections on the runs: accuracy, similarity, split size.

Estimates may be of any type with the fields value, low, high, method, seeds and images. The
comparisons are in comparisons.py, the sections on the data in inventory.py.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from clip_jax.core import progress
from clip_jax.core.types import Array
from clip_jax.reporting import answer_figure, benchmark_overlap, figures, latex, tables
from clip_jax.reporting.figures import Looks
from clip_jax.reporting.page import Details, Fact, Figure, Figures, Heading, Missing, Text
from clip_jax.reporting.tables import Cell, Table

Rows = Sequence[Mapping[str, Any]]  # dicts with the keys that the comment beside the argument names

QUESTION = (
  'CLIP does well on images unlike those of its labelled reference set. Is this because its '
  'training pool contains images that are very similar to the test images? The test: remove '
  'these images, train again with the same recipe, and compare.'
)
PAPER = 'Mayilvahanan, Wiedemer, Rusak, Bethge and Brendel (ICLR 2024)'
PAPER_ANSWER = (
  'ImageNet-Sketch: base 50.21 %, sketch-pruned 44.78 %, combined-pruned 44.12 %; a model '
  'trained on ImageNet alone with the same ImageNet-Val accuracy is expected at about 14 %. So '
  'E = (50.21 \u2212 44.78) / (50.21 \u2212 14) = 15 % (combined: 17 %). ImageNet-R: base '
  '72.9 %, combined-pruned 67.88 %.'
)
ESTIMATES = 'Estimates with 95 % intervals, not tests: they are in no family and support no claim.'
PAPER_BINS = 'accuracy binned by nearest-neighbour similarity (bins 0.05 wide) rises with it.'
FEW_QUERIES = 20  # bins with fewer are counts, as in evaluation/similarity_bins.py
PAPER_SIZES = 'near-pruning hurts fast, random pruning little, far-pruning hardly.'


def answer_blocks(
  panels: Sequence[answer_figure.Panel],
  missing: Missing | None,
  looks: Looks,
) -> list:
  """Returns the headline figure: accuracy of the aligned split between anchor only and base."""
  blocks: list = [missing] if missing else []
  if not panels:
    return blocks
  drawn = answer_figure.panels(panels, looks)
  words = answer_figure.caption(panels)
  if len(drawn) == 1:
    return [*blocks, Figures(tuple(Figure(name, text, words) for name, text in drawn.items()))]
  figures_of = tuple(Figure(name, text) for name, text in drawn.items())
  return [*blocks, Figures(figures_of), Text(words, 'note')]


def accuracy_blocks(
  # name, rule, words, pool_rows, anchor_rows, anchor_share, samples, passes, seeds, mark
  splits: Rows,
  # name, queries, leaked (a count; None if unknown), measure ('' for zero-shot accuracy)
  benchmarks: Rows,
  accuracy: Mapping[tuple[str, str], Any],  # (split, benchmark) -> estimate
  unleaked: Mapping[tuple[str, str], Any],  # the same without leaked queries
) -> list:
  """Returns one accuracy table for each number of seeds.

  The meaning of an interval depends on the number of seeds; the column heads say which it is.
  """
  counts = sorted({len(split['seeds']) for split in splits if split['seeds']}, reverse=True)
  blocks: list = [
    _accuracy_table(
      'accuracy' if count == counts[0] else f'accuracy_seeds_{count}',
      count,
      [split for split in splits if len(split['seeds']) == count],
      benchmarks,
      accuracy,
      unleaked,
    )
    for count in counts
  ]
  late = [split['name'] for split in splits if not split['seeds']]
  if late and counts:
    blocks.append(Text(f'Not trained or not evaluated yet: {progress.join_names(late)}.', 'muted'))
  return blocks


def _accuracy_table(
  name: str, count: int, splits: Rows, benchmarks: Rows, accuracy: Mapping, unleaked: Mapping
) -> Table:
  """Returns the table of the splits with `count` seeds."""
  how = {1: '1 seed: interval\nof this checkpoint', 2: 'mean, range of 2 seeds'}.get(
    count, f'mean of {count} seeds\n95 % interval'
  )
  kinds = [(b, which) for b in benchmarks for which in ((False, True) if b['leaked'] else (False,))]
  columns = (
    Cell('split'),
    *(
      tables.number_cell(
        f'{b["name"]}, not leaked', f'without {tables.number(b["leaked"])} queries'
      )
      if without
      else tables.number_cell(
        b['name'],
        '\n'.join(filter(None, [b['measure'], f'{tables.number(b["queries"])} queries', how])),
      )
      for b, without in kinds
    ),
    tables.number_cell('pool rows', '+ anchor rows'),
    tables.number_cell('samples seen', 'passes\nshare of the anchor'),
  )
  estimates = {False: accuracy, True: unleaked}
  rows = tuple(
    (
      Cell(split['name'], split['words']),
      *(
        tables.accuracy_cell(
          estimates[without].get((split['name'], b['name'])), bool(split['mark'])
        )
        for b, without in kinds
      ),
      tables.number_cell(
        tables.number(split['pool_rows']), f'+ {tables.number(split["anchor_rows"])}'
      ),
      tables.number_cell(
        tables.number(split['samples']),
        f'{tables.number(split["passes"])} passes{_anchor_share(split["anchor_share"])}',
      ),
    )
    for split in splits
  )
  records = tuple(
    _record(split, b['name'], estimates[without][split['name'], b['name']], without)
    for split in splits
    for b in benchmarks
    for without in (False, True)
    if (split['name'], b['name']) in estimates[without]
  )
  notes = (*_accuracy_notes(count, records), *_retrieval_note(benchmarks))
  return Table(name, '', columns, rows, notes, records, latex=latex.accuracy_table(records, notes))


def _anchor_share(value: float | None) -> str:
  """Returns the anchor's share of the samples as a line below the passes; '' if it is unknown."""
  return '' if value is None else f'\nanchor {tables.share(value)}'


def _basis(records: Rows) -> str:
  """Returns the images, groups and degrees of freedom of each benchmark's intervals."""
  lines = {}
  for r in records:
    name = r['benchmark'] + (', not leaked' if r['without_leaked'] else '')
    lines.setdefault((name, r['images'], r['groups']), []).append(r['df'])
  return '; '.join(
    ', '.join(
      filter(
        None,
        [
          f'{name}: {tables.number(images)} images{tables.grouping(images, groups)}',
          tables.degrees(*df),
        ],
      )
    )
    for (name, images, groups), df in lines.items()
  )


def _accuracy_notes(count: int, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
  notes = [
    'Zero-shot accuracy in percent. '
    + {
      1: 'One seed: the interval is over images for this checkpoint; it says nothing about other '
      'training runs.',
      2: 'Two seeds: brackets show the lower and the higher accuracy; two seeds give no interval.',
    }.get(count, 'Intervals are over seeds and images, both treated as random.'),
    f'Intervals rest on {progress.count_with_noun(count, "seed")}. {_basis(records)}.',
    *tables.few_groups({r['benchmark']: r['groups'] for r in records}),
  ]
  if any(r['method'] == 'none' for r in records):
    notes.append('No interval if all images belong to one group (one writer or photo).')
  if any(r['without_leaked'] for r in records):
    notes.append(
      'Not leaked: without the queries that already have a near-duplicate in the anchor. Pruning '
      'the pool cannot remove that leakage.'
    )
  if any(r['mark'] for r in records):
    notes.append(
      '\u2020 Not converged: in a run of this split, learning took off late or the loss was still '
      'falling at the end, so its accuracy reflects the number of steps more than the data.'
    )
  return tuple(notes)


def _retrieval_note(benchmarks: Rows) -> tuple[str, ...]:
  """Returns a note on the benchmarks whose accuracy is a recall, or ()."""
  measures = {b['name']: b['measure'] for b in benchmarks if b['measure']}
  if not measures:
    return ()
  return (
    f'{progress.join_names(list(measures))}: {next(iter(measures.values()))}, the share of images '
    'whose nearest caption is one of their own; a tie with another caption counts as wrong. '
    'Retrieval has no classes: analyses within classes take all of its images as one class, and '
    'the ridge preview and accuracy without class effects leave it out.',
  )


def _record(split: Mapping, benchmark: str, estimate: Any, without_leaked: bool) -> dict:
  kept = ('pool_rows', 'anchor_rows', 'anchor_share', 'samples', 'passes', 'mark')
  return {
    'split': split['name'],
    'rule': split['rule'],
    'benchmark': benchmark,
    'without_leaked': without_leaked,
    'accuracy': estimate.value,
    'low': estimate.low,
    'high': estimate.high,
    'method': estimate.method,
    'seeds': estimate.seeds,
    'images': estimate.images,
    'groups': estimate.groups,
    'df': estimate.df,
    **{key: split[key] for key in kept},
  }


def histogram_blocks(
  entries: Rows,  # name, anchor [Q] or None, pool [Q]: nearest-neighbour similarities
) -> list:
  """Returns histograms and quantiles of each benchmark's similarity to pool and anchor."""
  values = [v for e in entries for v in (_finite(e['anchor']), _finite(e['pool'])) if len(v)]
  if not values:
    return []
  low = min(float(np.quantile(v, 0.002)) for v in values)
  limits = float(np.floor(low * 20) / 20), max(1.0, *(float(v.max()) for v in values))
  drawn = tuple(
    Figure(
      f'similarity_{e["name"]}',
      figures.similarity_histogram(
        _finite(e['anchor']), _finite(e['pool']), title=e['name'], limits=limits
      ),
      ''
      if e['anchor'] is None
      else (
        f'{tables.number(int((e["pool"] > e["anchor"]).sum()))} of {tables.number(len(e["pool"]))} '
        f'queries ({tables.share(float((e["pool"] > e["anchor"]).mean()))}, a count) have a pool '
        'image nearer than any anchor image.'
      ),
    )
    for e in entries
  )
  return [Figures(drawn), benchmark_overlap.quantile_table(entries)]


def _finite(values: Array | None) -> Array:  # [Q] -> [q]; None -> [0]
  return np.zeros(0) if values is None else values[np.isfinite(values)]


BIN_AXES = {
  'similarity': 'similarity to the nearest pool image',
  'excess': 'pool similarity minus anchor similarity',
}


def bin_blocks(
  panels: Rows,  # name, what (of BIN_AXES), series (as figures.accuracy_by_similarity takes it)
  looks: Looks,
) -> list:
  """Returns accuracy by nearest-neighbour similarity."""
  if not panels:
    return []
  blocks: list = [
    Text(
      'Accuracy is associated with similarity, which does not show a cause: queries with similar '
      'pool images may be easy for other reasons, such as their class. The second curve removes '
      f'class effects. Pale marks: fewer than {FEW_QUERIES} queries, a count without an interval.',
      'muted',
    )
  ]
  records, rows = [], []
  for what, label in BIN_AXES.items():
    chosen = [p for p in panels if p['what'] == what]
    drawn = tuple(
      Figure(
        f'accuracy_by_{what}_{p["name"]}',
        figures.accuracy_by_similarity(p['series'], title=p['name'], xlabel=label, looks=looks),
      )
      for p in chosen
    )
    if drawn:
      blocks += [Heading(f'Accuracy against {label}'), Figures(drawn)]
    for panel, curve in ((p, one) for p in chosen for one in p['series']):
      about = {'benchmark': panel['name'], 'against': what, 'series': curve['name']}
      records += [{**about, **b} for b in curve['bins']]
      rows += [_bin_row({**about, **b}, curve['adjusted']) for b in curve['bins']]
  columns = tables.column_heads(
    'benchmark', 'against', 'bin', 'queries', 'accuracy, %', 'seeds', 'groups', 'df'
  )
  note = (
    '95 % intervals over seeds and images (two seeds: their range; one seed: this checkpoint, over '
    'images). Those of the curve without class effects take bins and classes of the queries as '
    'given; their queries, groups and df are those of all bins that classes link. Bins of fewer '
    f'than {FEW_QUERIES} queries are counts and have no interval. Bins of fewer than '
    f'{tables.FEW_GROUPS} groups support no claim.'
  )
  table = Table('accuracy_by_similarity', '', columns, tuple(rows), (note,), tuple(records))
  return [*blocks, Fact(PAPER_BINS), Details('Table of the bins', (table,))]


def _bin_row(r: Mapping[str, Any], adjusted: bool) -> tuple[Cell, ...]:
  is_count, answers = r['n'] < FEW_QUERIES, r['n'] * r['seeds']
  if is_count:
    detail = '' if adjusted else f'{round(r["accuracy"] * answers)} of {answers} right'
  else:
    ends = {key: r[f'accuracy_{key}'] for key in ('low', 'high')}
    detail = tables.bounds(SimpleNamespace(**ends, method=r['method']))
  return (
    Cell(r['benchmark'], r['series']),
    tables.number_cell(r['against']),
    tables.number_cell(f'{r["low"]:.2f} to {r["high"]:.2f}'.replace('-', tables.MINUS)),
    tables.number_cell(tables.number(r['n'])),
    tables.number_cell(tables.percent(r['accuracy']), detail, tone='muted' if is_count else ''),
    tables.number_cell(tables.number(r['seeds'])),
    tables.number_cell(tables.number(r['groups'])),
    tables.number_cell(tables.degrees(r['df']).removesuffix(' df')),
  )


def _under(panel: Mapping[str, Any]) -> str:
  """Returns ', under hog' for a further embedder; '' for the main one."""
  return f', under {panel["embedder"]}' if panel['embedder'] else ''


def _figure_name(what: str, panel: Mapping[str, Any]) -> str:
  return '_'.join(filter(None, (what, panel['name'], panel['embedder'])))


def size_blocks(
  panels: Rows,  # name, embedder, curves, base, reference (as figures.accuracy_by_size takes them)
  # split, rule, embedder, control, benchmark, estimate: near and far against random
  rows: Rows,
  looks: Looks,
) -> list:
  """Returns accuracy against split size: one panel per benchmark and embedder, on one scale."""
  values = [
    value
    for p in panels
    for curve in [*p['curves'].values(), [p['base'] or {}, p['reference'] or {}]]
    for point in curve
    for value in map(point.get, ('accuracy', 'low', 'high'))
  ]
  values = [v for v in values if tables.is_known(v)]
  if not values:
    return []
  limits = max(0.0, min(values) - 0.05), min(1.0, max(values) + 0.05)
  drawn = tuple(
    Figure(
      _figure_name('size', p),
      figures.accuracy_by_size(
        p['curves'],
        title=f'{p["name"]}{_under(p)}',
        base=p['base'],
        reference=p['reference'],
        limits=limits,
        looks=looks,
      ),
      'Bars and the band of anchor only: 95 % intervals (two seeds: their range); their seeds, '
      'images, groups and df are in the table of accuracies.',
    )
    for p in panels
  )
  blocks: list = [Figures(drawn), Fact(PAPER_SIZES)]
  if rows:
    cells = tuple(
      (
        Cell(f'{r["split"]} on {r["benchmark"]}', f'{looks[r["rule"]][2]}{_under(r)}'),
        Cell(f'against {r["control"]}'),
        Cell(
          f'{tables.estimate_text(r["estimate"])} points',
          f'{tables.method_words(r["estimate"].method)}\n{tables.basis(r["estimate"])}'.strip(),
        ),
      )
      for r in rows
    )
    records = tuple(
      {
        **{key: r[key] for key in ('split', 'rule', 'control', 'benchmark')},
        **tables.estimate_record(r['estimate']),
      }
      for r in rows
    )
    blocks.append(
      Table(
        'size_against_random',
        'Difference to a random split of the same size',
        (Cell('split'), Cell('control'), Cell('difference')),
        cells,
        (ESTIMATES, *tables.few_groups({r['benchmark']: r['estimate'].groups for r in rows})),
        records,
        stacked=True,
      )
    )
  return blocks


def dose_blocks(
  # name, embedder, points: split, control, control_rule, dropped, slack, share, estimate, low,
  # high, method, seeds, images, groups, df
  panels: Rows,
  look: tuple[str, str, str],
) -> list:
  """Returns the dose curve: aligned splits of several sizes, each against its own control."""
  if not panels:
    return []
  caption = (
    'Splits that remove more or fewer similar rows than slack 0, each against its own control. '
    'Bars: 95 % intervals (none with fewer than three seeds).'
  )
  drawn = tuple(
    Figure(
      _figure_name('dose', p),
      figures.dose(p['points'], title=f'{p["name"]}{_under(p)}', look=look),
      caption,
    )
    for p in panels
  )
  rows = tuple(
    (
      Cell(
        f'{q["split"]} on {p["name"]}{_under(p)}',
        f'against {q["control"]}' + ('' if q['control_rule'] == 'matched' else ', random rows'),
      ),
      tables.number_cell(tables.share(q['share'])),
      tables.number_cell(tables.number(q['dropped'])),
      tables.number_cell(tables.signed(q['slack'])),
      tables.number_cell(
        tables.points(q['estimate']), tables.bounds(SimpleNamespace(**q), tables.points)
      ),
      Cell(tables.basis(SimpleNamespace(**q))),
    )
    for p in panels
    for q in sorted(p['points'], key=lambda q: q['share'])
  )
  records = tuple({'benchmark': p['name'], **q} for p in panels for q in p['points'])
  heads = (
    Cell('split'),
    tables.number_cell('rows removed', 'share of the aligned count'),
    tables.number_cell('rows removed'),
    tables.number_cell('slack'),
    tables.number_cell('difference to control, points'),
    Cell('over'),
  )
  return [
    Heading('Dose curve: removing more or fewer rows than the aligned count'),
    Figures(drawn),
    Table(
      'dose',
      '',
      heads,
      rows,
      (ESTIMATES, *tables.few_groups({p['name']: p['points'][0]['groups'] for p in panels})),
      records,
    ),
  ]


def plane_blocks(
  # name, against, x_scoring, y_scoring, xname and yname (what the axes show, in words), line,
  # points (split, seed, and as figures.robustness_plane takes)
  panels: Rows,
  looks: Looks,
) -> list:
  """Returns accuracy on each benchmark against validation accuracy, one mark per run."""
  if not panels:
    return []
  drawn = tuple(
    Figure(
      f'plane_{p["name"]}',
      figures.robustness_plane(
        p['points'],
        title=f'{p["name"]} against {p["xname"]}',
        xname=p['xname'],
        yname=p['yname'],
        line=p['line'],
        looks=looks,
      ),
      _plane_caption(p),
    )
    for p in panels
  )
  lines = [(p, q) for p in panels for q in p['points']]
  rows = tuple(
    (
      Cell(f'{q["split"]}/seed{q["seed"]}'),
      *(
        Cell(name, f'{tables.images_in_groups(e)} {tables.degrees(e.df)}'.strip())
        if isinstance(name, str)
        else tables.number_cell(tables.percent(e.value), tables.bounds(e))
        for axis, named in (('x', p['xname']), ('y', p['yname']))
        for e in [q[axis]]
        for name in (named, None)
      ),
    )
    for p, q in lines
  )
  records = tuple(
    {'split': q['split'], 'seed': q['seed'], 'benchmark': p['name']}
    | {key: p[key] for key in ('against', 'x_scoring', 'y_scoring')}
    | {
      f'{axis}_{key}': value
      for axis in 'xy'
      for key, value in tables.estimate_record(q[axis]).items()
    }
    for p, q in lines
  )
  heads = ('run', 'x', 'accuracy, %', 'y', 'accuracy, %')
  table = Table(
    'plane',
    '',
    tuple(Cell(head) for head in heads),
    rows,
    ('Each run alone: 95 % intervals over images for this checkpoint.',),
    records,
  )
  return [Figures(drawn), Details('Table of the runs', (table,))]


def _plane_caption(panel: Mapping[str, Any]) -> str:
  """Returns how the points and the line are to be read, with the error of the line's fit."""
  first = panel['points'][0]
  text = (
    'One mark per run; bars: 95 % intervals over images for this checkpoint '
    f'({panel["yname"]}: {tables.images_in_groups(first["y"])}; {panel["xname"]}: '
    f'{tables.images_in_groups(first["x"])}).'
  )
  for part in panel['line']['parts'] if panel['line'] else ():
    text += (
      f' Line: {part["models"]} standard ImageNet models of imagenet-testbed between '
      f'{tables.percent(part["x_low"])} and {tables.percent(part["x_high"])} % on the x axis, an '
      f'extrapolation elsewhere; R\u00b2 = {part["r2"]:.3f}, residual standard deviation '
      f'{part["error"]:.3f} log odds. Band: 95 % of single models.'
    )
  return text
