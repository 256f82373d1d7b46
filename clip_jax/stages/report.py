"""Stage report: one page that says what the runs show, from whatever the work directory holds.

In: the work directory, finished or not. Out: WORKDIR/report/index.html (self-contained),
figures/*.svg, tables/*.csv, and summary.txt for the terminal. What is missing is a sentence and the
command that makes it.
"""

import os
from collections import Counter
from collections.abc import Sequence

from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core.products import Product
from clip_jax.evaluation import answer
from clip_jax.pruning import rules
from clip_jax.reporting import pool_audit
from clip_jax.reporting import page
from clip_jax.reporting import planted_copies
from clip_jax.reporting import second_looks
from clip_jax.reporting import sections
from clip_jax.reporting import svg
from clip_jax.reporting import tables
from clip_jax.reporting.page import Section
from clip_jax.stages import layout
from clip_jax.stages import report_audit
from clip_jax.stages import report_facts
from clip_jax.stages import report_removed
from clip_jax.stages import report_second_looks
from clip_jax.stages import report_sections
from clip_jax.stages import report_statistics
from clip_jax.stages.report_facts import Facts

# Config keys that the page shows. What the runs were made with is in their own fingerprints.
KEYS = ('splits', 'report', 'prune', 'dedup', 'search.backend', 'search.top_k', 'embedder.source',
        'embedder.seed', 'model', 'train.budget', 'train.samples', 'train.epochs', 'train.seeds')


def product(config: ConfigDict, workdir: str) -> Product:
  """The page. It reads whatever is finished: made again when a product is new or has changed."""
  inputs = {name: sidecar['fingerprint'] for name, sidecar in products.sidecars(workdir).items()
            if not name.startswith('report/')}
  keys = {**layout.pick(config, [*KEYS, *layout.recipe(config)]), 'datasets': list(layout.datasets(config))}
  pictures = [part.images for block in layout.datasets(config).values() for _, part in layout.flatten(block)]
  if any(pictures):  # of vectors: they change no other product
    keys['images'] = pictures
  return Product('report/index', keys, inputs)


def run(config: ConfigDict, workdir: str) -> None:
  wanted = product(config, workdir)
  if products.missing(workdir, [wanted], remake=True, redo='report'):
    with products.lock(workdir, wanted.name):
      made = _write(workdir, *gather(config, workdir))
      counts = {kind: sum(name.endswith(kind) for name in made) for kind in ('.svg', '.csv')}
      products.finish(workdir, wanted, made, counts)
  products.write_manifest(workdir, 'report', [wanted])


def _write(workdir: str, html: str, summary: str, shown: Sequence[Section]) -> list[str]:
  """Writes the page, its figures and its tables; returns the files, relative to the workdir."""
  texts = {'index.html': html, 'summary.txt': summary}
  for block in page.blocks(shown, 'figures'):
    texts |= {f'figures/{item.name}.svg': svg.standalone(item.svg) for item in block.items}
  texts |= {f'tables/{block.name}.csv': tables.csv_text(block.records)
            for block in page.blocks(shown, 'table') if block.records}
  for name, text in texts.items():
    files.write_bytes(os.path.join(workdir, 'report', name), text.encode())
  return [f'report/{name}' for name in texts]


def gather(config: ConfigDict, workdir: str) -> tuple[str, str, list[Section]]:
  """Returns the page, the summary for the terminal, and the sections; reads files only."""
  facts = report_facts.read(config, workdir)
  items = report_statistics.comparisons(
      config, workdir, facts.results, facts.abouts, facts.searched)
  every, without = report_statistics.accuracies(facts.results, facts.leaked)
  shown = [section for section in _sections(facts, items, every, without) if section.blocks]
  sentence = _sentence(facts, items)
  html = page.render(
      title=_title(config), name=f'clip_jax report \u00b7 {os.path.basename(workdir.rstrip("/"))}',
      question=sections.QUESTION if layout.runs(config) else pool_audit.QUESTION, answer=sentence,
      warning=planted_copies.banner(facts.planted) if facts.planted else '',
      state=report_facts.state(facts), sections=shown,
      footer=f'The experiment is that of {sections.PAPER}. Values in tables/*.csv lie in 0..1.')
  return html, _summary(facts, sentence, every), shown


def _sections(facts: Facts, items: list[dict], every: dict, without: dict) -> list[Section]:
  of, pool, looks = report_sections, report_audit, report_second_looks
  rows = [
      ('answer', 'The answer', 'Answer', of.answer(facts, items, every)),
      ('accuracy', 'Accuracy of every split', 'Accuracy', of.accuracy(facts, every, without)),
      ('comparisons', 'Aligned splits against their controls', 'Comparisons',
       of.comparisons(facts, items)),
      ('bins', 'Accuracy by similarity', 'By similarity', of.bins(facts)),
      ('size', 'Accuracy against split size', 'Size', of.sizes(facts, every)),
      ('removed', 'What was removed', 'Removed', report_removed.blocks(facts)),
      ('preview', second_looks.PREVIEW_TITLE, 'Preview', looks.preview(facts)),
      ('sensitivity', 'The same splits under other embedders', 'Sensitivity', looks.sensitivity(facts)),
      ('planted', 'Planted copies of test images', 'Planted', looks.planted(facts)),
      ('neighbours', 'Nearest neighbours', 'Neighbours', pool.neighbours(facts)),
      ('similarity', 'How near the pool comes' + (', and how near the anchor' if layout.has_anchor(
          facts.config) else ''), 'Similarity', pool.similarity(facts)),
      ('before', 'How many rows each rule would remove', 'Rule sizes', pool.before(facts)),
      ('duplicates', 'Duplicates', 'Duplicates', pool.duplicates(facts)),
      ('skipped', 'What takes no part', 'Skipped', of.skipped(facts)),
      ('overlap', 'How far the splits overlap', 'Overlap', of.overlap(facts)),
      ('provenance', 'How this came about', 'Provenance', of.provenance(facts))]
  if not layout.runs(facts.config):  # an audit: its answer comes first
    rows.sort(key=lambda row: row[0] != 'duplicates')
  return [Section(name, title, short, tuple(blocks)) for name, title, short, blocks in rows]


def _title(config: ConfigDict) -> str:
  names = [b for b in config.benchmarks if layout.runs(config)
           and any(b in config.splits[s].benchmarks for s in report_statistics.aligned(config))]
  if not names:
    return 'How similar is the training pool to the benchmarks?'
  return f'Does accuracy on {tables.listed(names)} come from similar training images?'


def _sentence(facts: Facts, items: list[dict]) -> str:
  """Returns the answer: a sentence for each aligned split and benchmark, or why there is none."""
  config = facts.config
  if not layout.runs(config):
    return report_audit.sentence(facts)
  if not report_statistics.aligned(config):
    return 'This config has no aligned split: it asks what the size of a split does, below.'
  if not items:
    if facts.searched:
      return ('Not answered yet: no aligned split was evaluated. The pool is searched; what that '
              'shows is below.')
    return 'Not answered yet: no aligned split was evaluated, and the pool is not searched.'
  said = []
  shown = report_statistics.headline(config, items)
  several = {b for b, n in Counter(item['benchmark'] for item in shown).items() if n > 1}
  for item in shown:
    parts = (item['base'], item['split'], item['control'],
             report_statistics.first_split(config, 'anchor'))
    late = [run_ for split in parts if split
            for run_ in _unfinished(facts, split, item['benchmark'])]
    plain = item['rule'] == 'gap_aligned' and not report_statistics.is_dose(config, item['split'])
    said.append(answer.answer_sentence(
        item['benchmark'], item['share'], item['share_matched'], late,
        '' if plain and item['benchmark'] not in several else item['split']))
  return ' '.join(said)


def _unfinished(facts: Facts, split: str, benchmark: str) -> list[str]:
  there = facts.results.seeds.get((split, benchmark), ())
  return [f'{split}/seed{seed}' for seed in layout.seeds(facts.config, split)
          if seed not in there or facts.marks.get((split, seed))]


def _summary(facts: Facts, sentence: str, every: dict) -> str:
  """Returns the answer and the accuracies as text for a terminal; before there are any, what the pool shows."""
  benchmarks = [b for b in facts.config.benchmarks if any(key[1] == b for key in every)]
  names = [name for name in facts.config.splits if any(key[0] == name for key in every)]
  text = [sentence] if facts.planted is None else [planted_copies.banner(facts.planted), '', sentence]
  if benchmarks:
    lines = [['Accuracy, %', *benchmarks]]
    lines += [[name, *(_cell(every[name, b]) if (name, b) in every else '-' for b in benchmarks)]
              for name in names]
    text += ['', *_aligned(lines), 'In brackets: 95 % interval over seeds and images; with two seeds (r) their '
             'range; with one (1) over images, of this checkpoint.']
  else:
    for lines in (report_audit.summary(facts), _removed(facts)):
      text += ['', *_aligned(lines)] if lines else []
  return '\n'.join(text) + '\n'


def _removed(facts: Facts) -> list[list[str]]:
  """Returns lines of cells: how many rows each split that was made removes."""
  lines = [[name, f'{about["dropped"]:,} rows', tables.share(about['dropped'] / max(about['candidates'], 1))]
           for name, about in facts.abouts.items() if rules.RULES[about['rule']].selects]
  return [['Removed', '', 'of candidates'], *lines] if lines else []


def _aligned(lines: list[list[str]]) -> list[str]:
  """Returns lines of cells as text: the first column to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  return [''.join([line[0].ljust(widths[0]), *(f'  {cell:>{width}}' for cell, width in zip(line[1:], widths[1:]))])
          for line in lines]


def _cell(estimate) -> str:
  """Returns '63.6 [58.1, 69.0]' in percent; what the bracket is where it is not the crossed interval."""
  if np.isnan(estimate.low):
    return f'{tables.percent(estimate.value)} [none]'
  kind = {'crossed': '', 'range': ' r'}.get(estimate.method, ' 1')
  return f'{tables.percent(estimate.value)} [{tables.percent(estimate.low)}, {tables.percent(estimate.high)}{kind}]'
