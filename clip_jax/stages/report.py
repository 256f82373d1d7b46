"""Stage report: one page that says what the runs show, from whatever the work directory holds.

In: the work directory, finished or not. Out: WORKDIR/report/index.html (self-contained),
figures/*.svg, tables/*.csv, and summary.txt for the terminal. What is missing is a sentence and the
command that makes it.
"""

import os
from collections.abc import Sequence

from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core.products import Product
from clip_jax.evaluation import answer
from clip_jax.reporting import page
from clip_jax.reporting import sections
from clip_jax.reporting import svg
from clip_jax.reporting import tables
from clip_jax.reporting.page import Section
from clip_jax.stages import layout
from clip_jax.stages import report_sections
from clip_jax.stages import report_statistics
from clip_jax.stages.report_sections import Facts

# Config keys that the page shows. What the runs were made with is in their own fingerprints.
KEYS = ('splits', 'report', 'prune', 'dedup', 'search.backend', 'search.top_k', 'embedder.source',
        'embedder.seed', 'model', 'train.budget', 'train.samples', 'train.epochs', 'train.seeds')


def product(config: ConfigDict, workdir: str) -> Product:
  """The page. It reads whatever is finished: made again when a product is new or has changed."""
  inputs = {name: sidecar['fingerprint'] for name, sidecar in products.sidecars(workdir).items()
            if not name.startswith('report/')}
  keys = {**layout.pick(config, [*KEYS, *layout.recipe(config)]), 'datasets': list(layout.datasets(config))}
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
  facts = report_sections.read(config, workdir)
  items = report_statistics.comparisons(
      config, workdir, facts.results, facts.abouts, facts.searched)
  every, without = report_statistics.accuracies(facts.results, facts.leaked)
  shown = [section for section in _sections(facts, items, every, without) if section.blocks]
  sentence = _sentence(facts, items)
  html = page.render(
      title=_title(config), name=f'clip_jax report \u00b7 {os.path.basename(workdir.rstrip("/"))}',
      question=sections.QUESTION, answer=sentence, state=report_sections.state(facts),
      sections=shown,
      footer=f'The experiment is that of {sections.PAPER}. Values in tables/*.csv lie in 0..1.')
  return html, _summary(facts, sentence, every), shown


def _sections(facts: Facts, items: list[dict], every: dict, without: dict) -> list[Section]:
  of = report_sections
  rows = [
      ('answer', 'The answer', 'Answer', of.answer(facts, items, every)),
      ('accuracy', 'Accuracy of every split', 'Accuracy', of.accuracy(facts, every, without)),
      ('comparisons', 'Aligned splits against their controls', 'Comparisons',
       of.comparisons(facts, items)),
      ('neighbours', 'Nearest neighbours', 'Neighbours', of.neighbours(facts)),
      ('similarity', 'How near the pool comes, and how near the anchor', 'Similarity',
       of.similarity(facts)),
      ('bins', 'Accuracy by similarity', 'By similarity', of.bins(facts)),
      ('size', 'Accuracy against split size', 'Size', of.sizes(facts, every)),
      ('removed', 'What was removed', 'Removed', of.removed(facts)),
      ('duplicates', 'Duplicates', 'Duplicates', of.duplicates(facts)),
      ('skipped', 'What takes no part', 'Skipped', of.skipped(facts)),
      ('overlap', 'How far the splits overlap', 'Overlap', of.overlap(facts)),
      ('provenance', 'How this came about', 'Provenance', of.provenance(facts))]
  return [Section(name, title, short, tuple(blocks)) for name, title, short, blocks in rows]


def _title(config: ConfigDict) -> str:
  names = [b for b in config.benchmarks
           if any(b in config.splits[s].benchmarks for s in report_statistics.aligned(config))]
  if not names:
    return 'How similar is the training pool to the benchmarks?'
  return f'Does accuracy on {tables.listed(names)} come from similar training images?'


def _sentence(facts: Facts, items: list[dict]) -> str:
  """Returns the answer: a sentence for each aligned split and benchmark, or why there is none."""
  config = facts.config
  if not config.splits:
    return _audit_sentence(facts)
  if not report_statistics.aligned(config):
    return 'This config has no aligned split: it asks what the size of a split does, below.'
  if not items:
    if facts.searched:
      return ('Not answered yet: no aligned split was evaluated. The pool is searched; what that '
              'shows is below.')
    return 'Not answered yet: no aligned split was evaluated, and the pool is not searched.'
  said = []
  for item in items:
    parts = (item['base'], item['split'], item['control'],
             report_statistics.first_split(config, 'anchor'))
    late = [run_ for split in parts if split
            for run_ in _unfinished(facts, split, item['benchmark'])]
    said.append(answer.answer_sentence(
        item['benchmark'], item['share'], item['share_matched'], late))
  return ' '.join(said)


def _unfinished(facts: Facts, split: str, benchmark: str) -> list[str]:
  there = facts.results.seeds.get((split, benchmark), ())
  return [f'{split}/seed{seed}' for seed in layout.seeds(facts.config, split)
          if seed not in there or facts.marks.get((split, seed))]


def _audit_sentence(facts: Facts) -> str:
  """Returns the answer of a config without splits: how much of each benchmark the pool holds."""
  shares = {b: float(facts.near[b, layout.POOL].mean()) for b in facts.searched
            if (b, layout.POOL) in facts.near}
  if not shares:
    return 'No split is trained here: an audit of the pool. It has not been searched yet.'
  said = tables.listed([f'{tables.share(value)} of {b}' for b, value in shares.items()])
  return ('No split is trained here: an audit of the pool. It holds an image at least '
          f'{facts.duplicate:.4g} similar to {said}.')


def _summary(facts: Facts, sentence: str, every: dict) -> str:
  """Returns the answer and the accuracies as plain text, for a terminal."""
  benchmarks = [b for b in facts.config.benchmarks if any(key[1] == b for key in every)]
  names = [name for name in facts.config.splits if any(key[0] == name for key in every)]
  lines = [['Accuracy, %', *benchmarks]] if benchmarks else []
  lines += [[name, *(_cell(every[name, b]) if (name, b) in every else '-' for b in benchmarks)]
            for name in names]
  widths = [max(map(len, column)) for column in zip(*lines)]
  text = [''.join([line[0].ljust(widths[0]), *(f'  {cell:>{width}}' for cell, width in
                                               zip(line[1:], widths[1:]))]) for line in lines]
  if text:
    text.append('In brackets: 95 % interval over seeds and images; with two seeds (r) their range; with '
                'one (1) over images, of this checkpoint.')
  return '\n'.join([sentence, *([''] if text else []), *text]) + '\n'


def _cell(estimate) -> str:
  """Returns '63.6 [58.1, 69.0]' in percent; what the bracket is where it is not the crossed interval."""
  if np.isnan(estimate.low):
    return f'{tables.percent(estimate.value)} [none]'
  kind = {'crossed': '', 'range': ' r'}.get(estimate.method, ' 1')
  return f'{tables.percent(estimate.value)} [{tables.percent(estimate.low)}, {tables.percent(estimate.high)}{kind}]'
