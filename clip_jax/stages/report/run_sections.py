"""The report's sections on the runs, on skipped samples and on provenance, as page blocks.

The sections on the pool are in pool_sections.py, those on removed rows in removed_rows.py. Each
function returns the blocks of one section; for a missing result, a sentence and a command.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.core import progress
from clip_jax.core.products import STAGES
from clip_jax.evaluation import retrieval
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import splits as splits_lib
from clip_jax.reporting import comparisons as comparisons_lib
from clip_jax.reporting import figures, further_scores, inventory, sections, tables
from clip_jax.reporting.page import Details, Fact, Figure, Figures, Heading, Text
from clip_jax.stages.report import contrasts, embedder_answers, panels
from clip_jax.stages.report.facts import Facts
from clip_jax.stages.report.panels import Accuracies, looks

VECTOR = 'unusable vector'  # holds a NaN or an infinity, is all zeros, or is missing
KEYS_LISTED = 1_000_000  # in larger datasets, unreadable images are listed by row, not by key
BUDGETS = {'samples': 'equal samples', 'epochs': 'equal passes'}  # budget -> its words
MOST_NAMED = 12  # runs that a sentence names


def answer(facts: Facts, items: Sequence[dict]) -> list:
  """Returns the headline figure or what it needs, and the answer under each embedder."""
  missing = (
    None
    if items
    else facts.missing(
      'The answer needs the base split, the anchor-only split, the aligned split and its control, '
      'all trained and evaluated.',
      'evaluate',
    )
  )
  lines = panels.answers(facts.config, contrasts.headline(facts.config, items))
  return [
    *sections.answer_blocks(lines, missing, looks()),
    *embedder_answers.section(facts, items),
  ]


def accuracy(facts: Facts, accuracies: Accuracies, without_leaked: Accuracies) -> list:
  """Returns the accuracy tables of all splits and benchmarks."""
  config, label, leaked = facts.config, facts.results.label, facts.leaked
  if not accuracies:  # with an aligned split, the section "answer" says what is missing
    is_late = blocks.runs_to_train(config) and not contrasts.aligned(config)
    return [facts.missing('No split is evaluated yet.', 'evaluate')] if is_late else []
  benchmarks = [
    {
      'name': b,
      'queries': len(label[b]),
      'leaked': int(leaked[b].sum()) if b in leaked else None,
      'measure': retrieval.HEADLINE if blocks.is_retrieval(config.benchmarks[b]) else '',
    }
    for b in config.benchmarks
    if b in label
  ]
  rows = [_split_row(facts, name) for name in config.splits]
  shown = sections.accuracy_blocks(rows, benchmarks, accuracies, without_leaked)
  shown += further_scores.recall_blocks(panels.recalls(facts))
  shown += further_scores.few_shot_blocks(panels.few_shot(facts))
  return [*shown, *_unfinished_runs(facts), Fact(sections.PAPER_ANSWER)]


def _split_row(facts: Facts, name: str) -> dict:
  """Returns a split's row of the accuracy table, without its accuracies."""
  block, about = facts.config.splits[name], facts.splits.get(name, {})
  seeds = max((facts.results.seeds.get((name, b), ()) for b in facts.config.benchmarks), key=len)
  runs = {seed: run for (split, seed), run in facts.runs.items() if split == name}
  run = next((run for run in runs.values() if run.samples), None)
  words = contrasts.words_of(facts.config, name)
  if blocks.budget(facts.config, name) != facts.config.train.budget:
    words += f', {BUDGETS[blocks.budget(facts.config, name)]}'
  repeats = max((draw.get('repeats', 0) for draw in about.get('draws', {}).values()), default=0)
  if repeats:
    words += f', {repeats:,} of them repeated'
  if contrasts.has_random_rows(about):
    words = f'random rows, as many as {block.to} keeps: no matched control exists'
  return {
    'name': name,
    'rule': contrasts.shown_rule(facts, name),
    'seeds': seeds,
    'words': words,
    'pool_rows': about.get('pool_rows'),
    'anchor_rows': about.get('anchor_rows'),
    'anchor_share': _anchor_share(about) if blocks.has_anchor(facts.config) else None,
    'samples': run and run.samples,
    'passes': run and run.passes,
    'mark': 'not converged'
    if any(seed in runs and runs[seed].not_converged for seed in seeds)
    else '',
  }


def _anchor_share(about: Mapping[str, Any]) -> float | None:
  """Returns the anchor's share of a split's rows, and so of the samples that a run sees."""
  rows = [about.get(f'{part}_rows') or 0 for part in ('anchor', 'pool', 'planted')]
  return rows[0] / sum(rows) if any(rows) else None


def _unfinished_runs(facts: Facts) -> list:
  """Returns the runs that are not evaluated yet, and the reasons for marks 'not converged'."""
  runs, seeds, shown = blocks.runs_to_train(facts.config), facts.results.seeds, []
  late = [
    f'{split}/seed{seed}'
    for split, seed in runs
    if not any(seed in seeds.get((split, b), ()) for b in facts.config.benchmarks)
  ]
  if late:
    names = ', '.join(late[:MOST_NAMED]) + (' and more' if len(late) > MOST_NAMED else '')
    shown.append(
      facts.missing(f'{len(late)} of {len(runs)} runs are not evaluated yet: {names}.', 'evaluate')
    )
  reasons = [
    f'{split}/seed{seed}: {run.not_converged}'
    for (split, seed), run in facts.runs.items()
    if run.not_converged
  ]
  if reasons:
    shown.append(
      Details('Reasons for the mark \u201cnot converged\u201d', (Text('; '.join(reasons) + '.'),))
    )
  return shown


def comparisons(facts: Facts, items: Sequence[dict]) -> list:
  """Returns the comparisons with controls, the dose curves and the effective-robustness plane."""
  if not items:
    late = facts.missing('No aligned split is evaluated yet.', 'evaluate')
    # Without any result, the section "answer" says so.
    return [late] if facts.results.correct else []
  plane = sections.plane_blocks(panels.against_validation(facts), looks())
  head = Heading(
    'Accuracy on each benchmark against the reference benchmark',
    'one mark per run',
  )
  dose = sections.dose_blocks(panels.by_dose(facts, items), looks()['gap_aligned'])
  return [*comparisons_lib.blocks_of(items, looks()), *dose, *([head, *plane] if plane else [])]


def bins(facts: Facts) -> list:
  """Returns base's accuracy by nearest-neighbour similarity."""
  if not facts.results.correct:
    return []
  return sections.bin_blocks(panels.by_similarity(facts), looks()) or [
    facts.missing(
      'Accuracy by similarity needs the search and an evaluated base split.', 'evaluate'
    )
  ]


def sizes(facts: Facts, accuracies: Accuracies) -> list:
  """Returns accuracy by split size: near- and far-pruned against random."""
  if not facts.results.correct or not any(
    panels.is_sized(facts.config, name) for name in facts.config.splits
  ):
    return []
  shown = sections.size_blocks(
    panels.by_size(facts, accuracies), panels.against_random(facts), looks()
  )
  return shown or [facts.missing('No near- or far-pruned split is evaluated yet.', 'evaluate')]


def skipped(facts: Facts) -> list:
  """Returns the skipped samples and unreadable images of every dataset."""
  datasets = [name for name in blocks.datasets(facts.config) if workdir.is_ingested(facts.x, name)]
  if not datasets:
    return [facts.missing('No dataset is indexed yet.', 'ingest')]
  skipped_by_dataset = [
    {
      'name': name,
      'rows': len(workdir.source(facts.x, name)),
      'skipped': workdir.skipped_samples(facts.x, name),
      'unreadable': _unreadable(facts, name),
      **({} if blocks.has_own_images(facts.config, name) else {'unreadable_reason': VECTOR}),
    }
    for name in datasets
  ]
  return inventory.skipped_blocks(
    skipped_by_dataset,
    {f'{split}/seed{seed}': run.replaced for (split, seed), run in facts.runs.items()},
  )


def _unreadable(facts: Facts, dataset: str) -> list[str] | None:
  """Returns the keys of the unreadable images; None before the dataset is embedded."""
  if not workdir.is_embedded(facts.x, dataset):
    return None
  bad, source = (
    np.flatnonzero(~workdir.embeddings(facts.x, dataset).usable),
    workdir.source(facts.x, dataset),
  )
  if not len(bad) or len(source) > KEYS_LISTED:
    return [f'row {row}' for row in bad]
  return [str(key) for key in source.column('key')[bad]]


def overlap(facts: Facts) -> list:
  """Returns the overlap between the splits' pool rows."""
  splits = facts.config.splits
  rows = {name: facts.pool_rows(name) for name in splits if splits[name].rule != 'anchor'}
  rows = {name: kept for name, kept in rows.items() if kept is not None}
  if not rows:
    return [facts.missing('No split is drawn yet.', 'prune')] if splits else []
  names, _, inside = splits_lib.overlap(rows)
  return inventory.overlap_blocks(names, inside)


def provenance(facts: Facts) -> list:
  """Returns settings, times, runs and versions."""
  runs = [
    {
      'run': f'{split}/seed{seed}',
      **{
        key: getattr(run, key)
        for key in ('samples', 'passes', 'steps', 'seconds', 'images_per_sec')
      },
      'mark': 'not finished'
      if not run.is_finished
      else 'not converged'
      if run.not_converged
      else '',
    }
    for (split, seed), run in facts.runs.items()
  ]
  seconds = workdir.stage_seconds(facts.x).get('seconds', {})
  shown = inventory.provenance_blocks(
    _settings(facts),
    [{'stage': stage, 'seconds': seconds[stage]} for stage in STAGES if seconds.get(stage)],
    _versions(facts),
    runs,
  )
  curves = [
    {'rule': contrasts.shown_rule(facts, split), 'steps': run.curve[0], 'loss': run.curve[1]}
    for (split, _), run in facts.runs.items()
    if len(run.curve[0])
  ]
  if curves:
    drawn = figures.loss_curves(curves, title='Training loss', looks=looks())
    longest, words = max(len(curve['steps']) for curve in curves), 'All runs.'
    if longest > figures.LOSS_POINTS:
      words += (
        f' Up to {tables.number(longest)} logged values of a run are drawn as '
        f'{figures.LOSS_POINTS} means of consecutive ones.'
      )
    shown.append(Details('Training loss', (Figures((Figure('loss', drawn, words),)),)))
  return shown


def _settings(facts: Facts) -> list[tuple[str, str]]:
  """Returns (name, value) of the settings that a reader needs to judge the results."""
  config, t, m = facts.config, facts.config.train, facts.config.model
  settings = [
    ('Command', workdir.stage_seconds(facts.x).get('command') or 'missing in the log'),
    ('Work directory', facts.x.workdir),
    *(
      (f'Embedder{view.suffix}', _embedder(view))
      for view in dict.fromkeys([facts.x, *map(facts.x.for_split, config.splits)])
    ),
    (
      'Search',
      f'{config.search.backend}, '
      f'{progress.count_with_noun(config.search.top_k, "neighbour")} per query',
    ),
    (
      'De-duplication',
      f'similarity over {1 - config.dedup.threshold:.4g}' if config.dedup.enabled else 'off',
    ),
  ]
  if not blocks.runs_to_train(config):
    return settings
  budget = (
    f'{tables.number(t.samples)} samples for every split'
    if t.budget == 'samples'
    else f'{tables.number(t.epochs)} passes over every split'
  )
  others = [name for name in config.splits if blocks.budget(config, name) != t.budget]
  if others and t.budget == 'samples':
    budget += f'; {tables.number(t.epochs)} passes over {progress.join_names(others)}'
  elif others:
    budget += f'; {tables.number(t.samples)} samples for {progress.join_names(others)}'
  return settings + [
    ('Budget', f'{budget}, batch size {tables.number(t.batch_size)}'),
    ('Training seeds', ', '.join(map(str, t.seeds))),
    (
      'Recipe',
      f'AdamW, peak learning rate {t.learning_rate:g}, {tables.number(t.warmup_steps)} warm-up '
      f'steps, cosine decay to 0, weight decay {t.weight_decay:g}, {t.dtype}',
    ),
    (
      'Model',
      m.name
      or f'ViT, {m.image_size} pixels, patch {m.patch_size}, width {m.vision_width}, '
      f'{progress.count_with_noun(m.vision_layers, "image layer")} and '
      f'{progress.count_with_noun(m.text_layers, "text layer")}',
    ),
  ]


def _embedder(x: Experiment) -> str:
  block, about = x.embedder_block, workdir.embedder_json(x)
  if block.source == 'files':
    return 'embeddings read from files'
  kind = [block.source, f'seed {block.seed}']
  if blocks.uses_weights_file(block):
    seen = f'{about["image_size"]} pixels, E = {about["embed_dim"]}' if 'embed_dim' in about else ''
    kind = [block.source, about.get('name'), about.get('file'), seen]
  sha256 = about.get('sha256', '')
  return ', '.join(
    [*filter(None, kind), f'sha256 {sha256[:16]}\u2026' if sha256 else 'not trained or loaded yet']
  )


def _versions(facts: Facts) -> dict[str, str]:
  """Returns versions.json as name -> value, without nesting."""
  lines: dict = {}
  for key, value in workdir.versions(facts.x).items():
    lines |= value if isinstance(value, dict) else {key: value}
  return {
    name: ', '.join(map(str, value)) if isinstance(value, list) else str(value)
    for name, value in lines.items()
    if value not in ('', None, [])
  }
