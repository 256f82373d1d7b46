"""Stage report: one page with the results of all finished stages.

In: the work directory, finished or not. Out: WORKDIR/report/index.html (self-contained),
figures/*.svg, tables/*.csv, accuracy tables as *.tex, leaks.json, and summary.txt for the terminal.
For a missing result, the page names the command that produces it.
"""

from collections import Counter
from collections.abc import Sequence
import json
import os
from types import ModuleType

import numpy as np

from clip_jax.core import files, progress
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Config
from clip_jax.evaluation import answer, retrieval
from clip_jax.evaluation.statistics import Estimate
from clip_jax.experiment import blocks
from clip_jax.experiment.experiment import Experiment
from clip_jax.reporting import benchmark_overlap, page, sections, svg, tables, terms
from clip_jax.reporting import held_back as held_back_lib
from clip_jax.reporting.page import Section, Text
from clip_jax.stages.report import (
  collateral,
  contrasts,
  held_back,
  leaks,
  pool_sections,
  removed_rows,
  run_sections,
  training,
)
from clip_jax.stages.report.facts import Facts, read
from clip_jax.stages.report.panels import Accuracies

# Sections on the pool and on base, which show the similarities of the main embedder alone.
MAIN_ONLY = ('bins', 'neighbours', 'similarity', 'before', 'duplicates')


def make(x: Experiment, todo: list[Product], studies: Sequence[ModuleType] = ()) -> Made:
  """Writes the page, its figures and its tables; `studies` as in `compose`."""
  facts = read(x)
  html, summary, shown = compose(facts, studies)
  card = json.dumps(leaks.card(facts), indent=1, allow_nan=False) + '\n'
  texts = {'index.html': html, 'summary.txt': summary, 'leaks.json': card}
  texts |= {
    f'figures/{item.name}.svg': svg.standalone(item.svg)
    for block in page.blocks(shown, 'figures')
    for item in block.items
  }
  texts |= {
    f'tables/{block.name}.csv': tables.csv_text(block.records)
    for block in page.blocks(shown, 'table')
    if block.records
  }
  texts |= {
    f'tables/{block.name}.tex': block.latex for block in page.blocks(shown, 'table') if block.latex
  }
  folder = os.path.dirname(todo[0].name)
  for name, text in texts.items():
    files.write_bytes(x.path(folder, name), text.encode())
  pair_lists = {f'tables/duplicates-{b}.csv': b for b in leaks.lists(facts)}
  for name, benchmark in pair_lists.items():
    leaks.write_csv(x, benchmark, x.path(folder, name))
  names = [*texts, *pair_lists]
  yield (
    todo[0],
    [f'{folder}/{name}' for name in names],
    {ending: sum(name.endswith(ending) for name in names) for ending in ('.svg', '.csv', '.tex')},
  )


def compose(facts: Facts, studies: Sequence[ModuleType] = ()) -> tuple[str, str, list[Section]]:
  """Returns the page, the summary for the terminal, and the sections.

  studies: modules with section(facts) -> (name, title, short title, blocks) or None, and
  optionally banner(facts) -> a warning shown above the answer, '' for none.
  """
  items = contrasts.comparisons(facts)
  accuracies, without_leaked = map(
    contrasts.accuracies, (facts.results, facts.results.without_leaked(facts.leaked))
  )
  held = held_back.comparisons(facts)
  rows = _sections(
    facts, items, held, accuracies, without_leaked, [study.section(facts) for study in studies]
  )
  main_only = _main_only(facts.config)
  shown = [
    Section(name, title, short, (*(main_only if name in MAIN_ONLY else ()), *parts))
    for name, title, short, parts in rows
    if parts
  ]
  banner = ' '.join(
    filter(None, (study.banner(facts) for study in studies if hasattr(study, 'banner')))
  )
  sentence = _answer(facts, items)
  html = page.render(
    title=_title(facts.config),
    name=f'clip_jax report \u00b7 {os.path.basename(facts.x.workdir.rstrip("/"))}',
    question=sections.QUESTION
    if blocks.runs_to_train(facts.config)
    else benchmark_overlap.QUESTION,
    answer=sentence,
    warning=banner,
    state=facts.state,
    sections=shown,
    footer=(
      f'The experiment follows {sections.PAPER}. {_left_out(facts)}Values in tables/*.csv are '
      'proportions (0 to 1), those in tables/*.tex percent.'
    ),
  )
  lines = held_back_lib.summary_lines(held)
  return html, _summary(facts, banner, sentence, accuracies, lines), shown


def _sections(
  facts: Facts,
  items: Sequence[dict],
  held: Sequence[dict],
  accuracies: Accuracies,
  without_leaked: Accuracies,
  of_studies: Sequence[tuple | None],
) -> list[tuple[str, str, str, list]]:
  """Returns (name, title, short title, blocks) of every section, in the order of the page."""
  has_anchor = blocks.has_anchor(facts.config)
  is_asked = contrasts.aligned(facts.config) and blocks.runs_to_train(facts.config)
  rows = [
    (
      'answer',
      'The answer',
      'Answer',
      run_sections.answer(facts, items) if is_asked else [],
    ),
    (
      'accuracy',
      'Zero-shot accuracy by split',
      'Accuracy',
      run_sections.accuracy(facts, accuracies, without_leaked),
    ),
    ('training', 'Accuracy during training', 'Training', training.section(facts)),
    (
      'terms',
      'Terms of this page',
      'Terms',
      terms.blocks_of(has_anchor, bool(blocks.runs_to_train(facts.config))),
    ),
    (
      'comparisons',
      'Each aligned split against its control',
      'Comparisons',
      run_sections.comparisons(facts, items) if is_asked else [],
    ),
    (
      'collateral',
      'Every split on every benchmark',
      'Every benchmark',
      collateral.section(facts),
    ),
    (
      'held_back',
      'Aligned against held-back queries',
      'Held back',
      held_back.section(facts, held),
    ),
    (
      'bins',
      'Accuracy by similarity to the nearest pool image: descriptive only, not causal',
      'By similarity',
      run_sections.bins(facts),
    ),
    ('size', 'Accuracy against split size', 'Size', run_sections.sizes(facts, accuracies)),
    ('removed', 'Removed rows', 'Removed', removed_rows.section(facts)),
    *filter(None, of_studies),
    ('neighbours', 'Nearest neighbours', 'Neighbours', pool_sections.neighbours(facts)),
    (
      'similarity',
      f'Similarity of the pool{" and the anchor" if has_anchor else ""} to the benchmarks',
      'Similarity',
      pool_sections.similarity(facts),
    ),
    (
      'before',
      'Number of pool rows that each rule would remove',
      'Rule sizes',
      pool_sections.rule_sizes(facts),
    ),
    ('duplicates', 'Duplicates', 'Duplicates', pool_sections.duplicates(facts)),
    ('skipped', 'Skipped samples', 'Skipped', run_sections.skipped(facts)),
    ('overlap', 'Overlap between splits', 'Overlap', run_sections.overlap(facts)),
    ('provenance', 'Provenance', 'Provenance', run_sections.provenance(facts)),
  ]
  if not blocks.runs_to_train(
    facts.config
  ):  # without training, the duplicates are the answer: show them first
    rows.sort(key=lambda row: row[0] != 'duplicates')
  return rows


def _main_only(config: Config) -> list[Text]:
  """Returns a sentence for MAIN_ONLY if splits have further embedders."""
  others = dict.fromkeys(block.embedder for block in config.splits.values() if block.embedder)
  if not others:
    return []
  sentence = (
    f'Similarities in this section are those of {contrasts.embedder_words(config, "")}. Some '
    f'splits are made with those of another embedder ({progress.join_names(list(others))}).'
  )
  return [Text(sentence, 'muted')]


def _title(config: Config) -> str:
  names = [
    b
    for b in config.benchmarks
    if blocks.runs_to_train(config)
    and any(b in config.splits[name].benchmarks for name in contrasts.aligned(config))
  ]
  on = progress.join_names(names) if len(names) < 4 else f'{len(names)} benchmarks'
  return (
    f'Does accuracy on {on} come from similar training images?'
    if names
    else 'How similar is the training pool to the benchmarks?'
  )


def _answer(facts: Facts, items: Sequence[dict]) -> str:
  """Returns one sentence per aligned split and benchmark, or the reason why there is no answer."""
  config = facts.config
  if not blocks.runs_to_train(config):
    return pool_sections.sentence(facts)
  if not contrasts.aligned(config):
    if not facts.results.correct:
      return pool_sections.sentence(facts)
    return 'This config has no aligned split, so there is no answer: see the accuracies below.'
  if not items:
    return 'Not answered yet: no aligned split is evaluated' + (
      '. The pool is searched; its similarities are shown below.'
      if facts.query_results
      else ', and the pool is not searched.'
    )
  sentences = []
  shown = contrasts.headline(config, items)
  count = Counter((item['benchmark'], item['embedder']) for item in shown)
  several = contrasts.under_several(shown)
  for item in shown:
    split, benchmark = item['split'], item['benchmark']
    parts = (item['base'], split, item['control'], contrasts.first_split(config, 'anchor'))
    seeds = blocks.seeds(config, split)  # a comparison leaves out seeds that only its control has
    late = [run for part in parts if part for run in _unfinished(facts, part, benchmark, seeds)]
    loss, control = item['against_control'], item['balance']
    if loss is None and item['against_base'] is not None:  # the control is not evaluated
      loss, control = item['against_base'], contrasts.BASE
    is_plain = item['rule'] == 'gap_aligned' and not contrasts.is_dose(config, split)
    sentences.append(
      answer.answer_sentence(
        item['queries'] or benchmark,
        control,
        loss,
        item['share_matched'],
        unfinished=late,
        split='' if is_plain and count[benchmark, item['embedder']] == 1 else split,
        embedder=contrasts.embedder_words(config, item['embedder'])
        if item['embedder'] or benchmark in several
        else '',
      )
    )
  apart = ' ' if len(sentences) == 1 else '\n'  # one line per benchmark
  embedders = dict.fromkeys(item['embedder'] for item in shown)
  return apart.join([*sentences, _conditions(config, list(embedders))])


def _conditions(config: Config, embedders: Sequence[str]) -> str:
  """Returns for what the answer holds: inference is over images and seeds, not over pools."""
  names = progress.join_names([contrasts.embedder_name(config, name) for name in embedders])
  which = 'one embedder' if len(embedders) == 1 else f'{len(embedders)} embedders'
  return f'This holds for this pool and {which} ({names}); other pools were not sampled.'


def _left_out(facts: Facts) -> str:
  """Returns a sentence about pictures that would make the page too large, or ''."""
  count = facts.pictures.left_out
  if not count:
    return ''
  pictures = progress.count_with_noun(count, 'picture')
  return f'{pictures} are left out to keep this page below 10 MB. '


def _unfinished(facts: Facts, split: str, benchmark: str, seeds: Sequence[int]) -> list[str]:
  """Returns the runs of a split, among these seeds, that are not evaluated or did not converge."""
  evaluated = facts.results.seeds.get((split, benchmark), ())
  late = {seed for (name, seed), run in facts.runs.items() if name == split and run.not_converged}
  return [
    f'{split}/seed{seed}'
    for seed in blocks.seeds(facts.config, split)
    if seed in seeds and (seed not in evaluated or seed in late)
  ]


def _summary(
  facts: Facts, banner: str, sentence: str, accuracies: Accuracies, held: Sequence[str]
) -> str:
  """Returns the answer as terminal text, with accuracies or, without any, the duplicates.

  held: lines on splits that hold queries back.
  """
  text = [banner, '', sentence] if banner else [sentence]
  if accuracies:
    text += [
      '',
      *_accuracy_lines(facts, accuracies),
      'Brackets: 95 % interval over seeds and images; with "range": lower and higher of two seeds; '
      'with "1 seed": interval over images for this checkpoint.',
    ]
    text += ['', *held] if held else []
  else:
    for lines in (pool_sections.summary_lines(facts), _removed(facts)):
      text += ['', *_columns(lines)] if lines else []
  return '\n'.join(text) + '\n'


def _accuracy_lines(facts: Facts, accuracies: Accuracies) -> list[str]:
  config = facts.config
  benchmarks = [b for b in config.benchmarks if any(b == key[1] for key in accuracies)]
  names = [name for name in config.splits if any(name == key[0] for key in accuracies)]
  return _columns(
    [
      [
        'Accuracy, %',
        *(
          f'{b} ({retrieval.HEADLINE})' if blocks.is_retrieval(config.benchmarks[b]) else b
          for b in benchmarks
        ),
      ],
      *(
        [contrasts.shown_name(facts, name), *(_cell(accuracies.get((name, b))) for b in benchmarks)]
        for name in names
      ),
    ]
  )


def _removed(facts: Facts) -> list[list[str]]:
  """Returns lines of cells: the number of rows that each finished split removes."""
  lines = [
    [
      f'{name}{facts.x.for_split(name).suffix}',
      f'{about["dropped"]:,} rows',
      tables.share(about['dropped'] / max(about['candidates'], 1)),
    ]
    for name, about in facts.splits.items()
    if blocks.rule_of(facts.config, name).selects
  ]
  return [['Removed', '', 'of candidates'], *lines] if lines else []


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
  """Returns lines of cells as text: the first column to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  return [
    ''.join(
      [
        line[0].ljust(widths[0]),
        *(f'  {cell:>{width}}' for cell, width in zip(line[1:], widths[1:])),
      ]
    )
    for line in lines
  ]


def _cell(estimate: Estimate | None) -> str:
  """Returns '63.6 [58.1, 69.0]' in percent; other intervals say '; range' or '; 1 seed'."""
  if estimate is None:
    return '-'
  kind = {'crossed': '', 'range': '; range'}.get(estimate.method, '; 1 seed')
  bounds = f'{tables.percent(estimate.low)}, {tables.percent(estimate.high)}{kind}'
  return f'{tables.percent(estimate.value)} [{"none" if np.isnan(estimate.low) else bounds}]'


MAKERS = {'page': make}
