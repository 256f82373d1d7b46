"""The report's sections: what the work directory holds, joined with the statistics, as page blocks.

Each function returns the blocks of one section; what is missing is a sentence and a command.
"""

import dataclasses
import os
import re

from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import products
from clip_jax.core.types import Array
from clip_jax.evaluation import convergence
from clip_jax.pruning import splits as splits_lib
from clip_jax.reporting import comparisons as comparisons_lib
from clip_jax.reporting import figures
from clip_jax.reporting import inventory
from clip_jax.reporting import page
from clip_jax.reporting import sections
from clip_jax.reporting import tables
from clip_jax.reporting.page import Details, Figure, Figures, Heading, Missing, Text
from clip_jax.stages import STAGES
from clip_jax.stages import layout
from clip_jax.stages import report_data
from clip_jax.stages import report_images
from clip_jax.stages import report_panels
from clip_jax.stages import report_statistics


@dataclasses.dataclass(frozen=True)
class Facts:
  """All that the sections draw on, read once."""
  config: ConfigDict
  workdir: str
  log: report_data.Log
  results: report_data.Results
  runs: dict[tuple[str, int], dict]      # (split, seed) -> what report_data.runs says
  marks: dict[tuple[str, int], str]      # (split, seed) -> why it is 'not converged', '' if it is
  abouts: dict[str, dict]                # split -> split.json
  searched: dict[str, dict[str, Array]]  # benchmark -> queries.npz
  near: dict[tuple[str, str], Array]     # (benchmark, 'pool' | 'anchor') -> [Q] has a duplicate

  @property
  def duplicate(self) -> float:
    """The similarity from which a pair counts as a duplicate."""
    return _duplicate(self.config)

  @property
  def leaked(self) -> dict[str, Array]:
    """Per benchmark: queries [Q] that already have a duplicate in the anchor."""
    return {b: near for (b, dataset), near in self.near.items() if dataset == layout.ANCHOR}

  def missing(self, sentence: str, stage: str) -> Missing:
    """Returns a sentence, and the command that runs `stage` and what it still waits for."""
    flag = re.search(r'--config[= ](\S+)', self.log.command)
    earlier = list(STAGES)[:list(STAGES).index(stage)]
    wanted = [name for name, _, done in state(self) if not done and name in earlier]
    return Missing(
        sentence,
        f'python -m clip_jax.main --config={flag.group(1) if flag else "CONFIG.py"} '
        f'--workdir={self.workdir} --stages={",".join([*wanted, stage, "report"])}')


def _duplicate(config: ConfigDict) -> float:
  return config.prune.duplicate_similarity or 1 - config.dedup.threshold


def read(config: ConfigDict, workdir: str) -> Facts:
  """Reads the work directory."""
  runs = report_data.runs(config, workdir, products.sidecars(workdir))
  found = {b: report_data.queries(workdir, b) for b in config.benchmarks}
  searched = {b: queries for b, queries in found.items() if queries is not None}
  near = {}
  for b, q in searched.items():
    for dataset, value, row in (
        (layout.POOL, q['pool_similarity'][:, 0], q['pool_nearest'][:, 0]),
        (layout.ANCHOR, q['anchor_similarity'], q['anchor_nearest'])):
      if dataset in layout.datasets(config) and all(
          report_data.is_embedded(workdir, name) for name in (dataset, b)):
        cosine = report_images.cosine(workdir, b, dataset, value, row)
        near[b, dataset] = np.nan_to_num(cosine, nan=-1.0) >= _duplicate(config)
  marks = {key: convergence.not_converged(*run['curve'], config.train.batch_size)
           if len(run['curve'][0]) else '' for key, run in runs.items()}
  return Facts(config, workdir, report_data.log(workdir), report_data.results(config, workdir),
               runs, marks, report_data.split_abouts(config, workdir), searched, near)


def answer(facts: Facts, items: list[dict], every: dict) -> list:
  """Returns the headline figure, or what it needs."""
  if not report_statistics.aligned(facts.config):
    return []
  missing = None if items else facts.missing(
      'The answer needs base, anchor-only, the aligned split and its control, trained and '
      'evaluated.', 'evaluate')
  lines = report_panels.answers(facts.config, every, items)
  return sections.answer_blocks(lines, missing)


def accuracy(facts: Facts, every: dict, without: dict) -> list:
  """Returns the answer table of every split and benchmark."""
  config, label, leaked = facts.config, facts.results.label, facts.leaked
  if not config.splits:
    return []
  if not every:
    return [facts.missing('No split was evaluated yet.', 'evaluate')]
  benchmarks = [{'name': b, 'queries': len(label[b]),
                 'leaked': int(leaked[b].sum()) if b in leaked else None}
                for b in config.benchmarks if b in label]
  rows = [_split_row(facts, name) for name in config.splits]
  return sections.accuracy_blocks(rows, benchmarks, every, without) + _late(facts)


def _split_row(facts: Facts, name: str) -> dict:
  """Returns what the accuracy table says of a split beside its accuracies."""
  block, about = facts.config.splits[name], facts.abouts.get(name, {})
  seeds = max((facts.results.seeds.get((name, b), ()) for b in facts.config.benchmarks), key=len)
  run = next((run for (split, _), run in facts.runs.items()
              if split == name and run['samples']), {})
  words = sections.rule_words(block.rule, benchmarks=block.benchmarks, to=block.to, slack=block.slack)
  repeats = max((draw.get('repeats', 0) for draw in about.get('draws', {}).values()), default=0)
  if repeats:
    words += f', {repeats:,} of them again'
  if report_statistics.fell_back(about):
    words = f'random rows, as many as {block.to} keeps: no matched control exists'
  return {'name': name, 'rule': block.rule, 'seeds': seeds, 'words': words,
          'pool_rows': about.get('pool_rows'), 'anchor_rows': about.get('anchor_rows'),
          'samples': run.get('samples'), 'passes': run.get('passes'),
          'mark': 'not converged' if any(facts.marks.get((name, s)) for s in seeds) else ''}


def _late(facts: Facts) -> list:
  """Returns which runs are not evaluated yet, and why runs are marked 'not converged'."""
  runs, seeds, blocks = layout.runs(facts.config), facts.results.seeds, []
  late = [f'{split}/seed{seed}' for split, seed in runs
          if not any(seed in seeds.get((split, b), ()) for b in facts.config.benchmarks)]
  if late:
    names = ', '.join(late[:12]) + (' and more' if len(late) > 12 else '')
    blocks.append(facts.missing(
        f'{len(late)} of {len(runs)} runs are not evaluated yet: {names}.', 'evaluate'))
  said = [f'{split}/seed{seed}: {why}' for (split, seed), why in facts.marks.items() if why]
  if said:
    blocks.append(Details('Why runs are marked \u201cnot converged\u201d',
                          (Text('; '.join(said) + '.'),)))
  return blocks


def comparisons(facts: Facts, items: list[dict]) -> list:
  """Returns each aligned split against its control, dose curves, the robustness plane."""
  if not report_statistics.aligned(facts.config):
    return []
  if not items:
    return [facts.missing('No aligned split was evaluated yet.', 'evaluate')]
  dose = sections.dose_blocks(report_panels.by_dose(facts.config, facts.abouts, items))
  plane = sections.plane_blocks(report_panels.against_validation(facts.config, facts.results, facts.abouts))
  head = [Heading('Accuracy on each benchmark against the one that is like the anchor',
                  'every run a mark')]
  return comparisons_lib.blocks_of(items) + dose + (head + plane if plane else [])


def neighbours(facts: Facts) -> list:
  """Returns galleries of queries beside their nearest neighbours."""
  config, searched = facts.config, facts.searched
  if not searched:
    return [facts.missing('The pool was not searched yet.', 'search')]
  pictures = report_images.Pictures(config, facts.workdir)
  shown: list = [pictures.neighbours(b, q) for b, q in searched.items()
                 if pictures.has(layout.POOL, b)]
  if layout.has_anchor(config):
    shown.insert(0, Text('Framed pool images are nearer to the query than any anchor image is; '
                         'point at an image for its caption.', 'muted'))
  late = [b for b in config.benchmarks if b not in searched]
  if late:
    shown.append(facts.missing(f'Not searched yet: {tables.listed(late)}.', 'search'))
  return shown


def similarity(facts: Facts) -> list:
  """Returns histograms of nearest-neighbour similarity."""
  has_anchor = layout.has_anchor(facts.config)
  blocks = sections.histogram_blocks([
      {'name': b, 'pool': q['pool_similarity'][:, 0],
       'anchor': q['anchor_similarity'] if has_anchor else None}
      for b, q in facts.searched.items()])
  return blocks or [facts.missing('The pool was not searched yet.', 'search')]


def bins(facts: Facts) -> list:
  """Returns base's accuracy by nearest-neighbour similarity."""
  if not facts.config.splits:
    return []
  panels = report_panels.by_similarity(
      facts.results, facts.searched, report_statistics.first_split(facts.config, 'all'))
  return sections.bin_blocks(panels) or [facts.missing(
      'Accuracy by similarity needs the search, and the base split evaluated.', 'evaluate')]


def sizes(facts: Facts, every: dict) -> list:
  """Returns accuracy by split size, near and far against random."""
  config = facts.config
  if not any(config.splits[name].rule in ('near', 'far') for name in config.splits):
    return []
  blocks = sections.size_blocks(
      report_panels.by_size(config, facts.abouts, every),
      report_panels.against_random(config, facts.abouts, facts.results))
  return blocks or [facts.missing('No near- or far-pruned split was evaluated yet.', 'evaluate')]


def removed(facts: Facts) -> list:
  """Returns what every aligned split removed."""
  config, blocks = facts.config, []
  for name in report_statistics.aligned(config):
    if name not in facts.abouts:
      blocks.append(facts.missing(f'{name} was not made yet.', 'prune'))
      continue
    gallery, words = _removed_images(facts, name)
    controls = {other: about for other, about in facts.abouts.items()
                if config.splits[other].rule == 'matched' and config.splits[other].to == name}
    blocks += inventory.removed_blocks(
        facts.abouts[name], name=name, benchmarks=tuple(config.splits[name].benchmarks),
        gallery=gallery, words=words, controls=controls)
  return [*blocks, page.Fact(inventory.PAPER_REMOVED)] if blocks else []


def _removed_images(facts: Facts, split: str) -> tuple:
  """Returns the removed images and the words of their captions; nothing where files are gone."""
  config, workdir = facts.config, facts.workdir
  pictures = report_images.Pictures(config, workdir)
  searched = (report_data.is_searched(workdir, b) for b in config.splits[split].benchmarks)
  if (pictures.has(layout.POOL) and all(searched) and report_data.has_candidates(config, workdir)
      and report_data.pool_rows(config, workdir, split) is not None):
    return pictures.removed(split)
  return None, []


def duplicates(facts: Facts) -> list:
  """Returns what de-duplication found, and duplicates of the queries."""
  config, workdir = facts.config, facts.workdir
  pictures, rates = report_images.Pictures(config, workdir), []
  for b, q in facts.searched.items():
    row = {'benchmark': b, 'queries': len(q['pool_similarity'])}
    for dataset, nearest in ((layout.POOL, q['pool_nearest'][:, 0]),
                             (layout.ANCHOR, q['anchor_nearest'])):
      near = facts.near.get((b, dataset))
      row[dataset] = None if near is None else int(near.sum())
      row[f'exact_{dataset}'] = None if near is None else pictures.exact_duplicates(
          b, dataset, near, nearest)
    rates.append(row)
  blocks = inventory.duplicate_blocks(
      report_data.dedup_counts(config, workdir), report_data.planted(config, workdir), rates,
      facts.duplicate)
  return blocks or [facts.missing(
      'Duplicates are found by de-duplication and search.', 'search')]


def skipped(facts: Facts) -> list:
  """Returns every sample that takes no part."""
  found = report_data.skipped(facts.config, facts.workdir)
  if not found:
    return [facts.missing('Nothing was indexed yet.', 'ingest')]
  return inventory.skipped_blocks(found, {f'{split}/seed{seed}': run['replaced']
                                          for (split, seed), run in facts.runs.items()})


def overlap(facts: Facts) -> list:
  """Returns how far the splits share pool rows."""
  config = facts.config
  if not config.splits:
    return []
  rows = {name: report_data.pool_rows(config, facts.workdir, name) for name in config.splits
          if config.splits[name].rule != 'anchor'}
  rows = {name: found for name, found in rows.items() if found is not None}
  if not rows:
    return [facts.missing('No split was made yet.', 'prune')]
  names, _, inside = splits_lib.overlap(rows)
  return inventory.overlap_blocks(names, inside)


def provenance(facts: Facts) -> list:
  """Returns settings, times, runs and versions."""
  runs = [{'run': f'{split}/seed{seed}',
           **{key: run[key] for key in ('samples', 'passes', 'steps', 'seconds',
                                        'images_per_sec')},
           'mark': 'not finished' if not run['finished'] else
                   'not converged' if facts.marks[split, seed] else ''}
          for (split, seed), run in facts.runs.items()]
  blocks = inventory.provenance_blocks(
      _settings(facts), facts.log.stages, report_data.versions(facts.workdir), runs)
  curves = [{'name': f'{split}/seed{seed}', 'rule': facts.config.splits[split].rule,
             'steps': run['curve'][0], 'loss': run['curve'][1]}
            for (split, seed), run in facts.runs.items() if len(run['curve'][0])]
  if curves:
    drawn = figures.loss_curves(curves, title='Training loss')
    blocks.append(Details('Training loss', (Figures((Figure('loss', drawn, 'Every run.'),)),)))
  return blocks


def _settings(facts: Facts) -> list[tuple[str, str]]:
  """Returns (what, value) of the settings that a reader needs to judge the results."""
  config, t, m = facts.config, facts.config.train, facts.config.model
  sha = report_data.embedder_about(facts.workdir).get('sha256', '')
  settings = [
      ('Command', facts.log.command or 'not in the log'),
      ('Work directory', facts.workdir),
      ('Embedder', f'{_embedder(facts)}, '
       + (f'sha256 {sha[:16]}\u2026' if sha else 'not made yet')),
      ('Search', f'{config.search.backend}, {config.search.top_k} neighbours a query'),
      ('De-duplication', f'similarity over {1 - config.dedup.threshold:.4g}'
       if config.dedup.enabled else 'off')]
  if not config.splits:
    return settings
  budget = (f'{tables.number(t.samples)} samples for every split' if t.budget == 'samples'
            else f'{tables.number(t.epochs)} passes over every split')
  return settings + [
      ('Budget', f'{budget}, {tables.number(t.batch_size)} a batch'),
      ('Training seeds', ', '.join(map(str, t.seeds))),
      ('Recipe', f'AdamW, peak learning rate {t.learning_rate:g}, warm-up of '
       f'{tables.number(t.warmup_steps)} steps, cosine to 0, weight decay {t.weight_decay:g}, '
       f'{t.dtype}'),
      ('Model', m.name or f'ViT, {m.image_size} pixels, patch {m.patch_size}, width '
       f'{m.vision_width}, {m.vision_layers} image and {m.text_layers} text layers')]


def _embedder(facts: Facts) -> str:
  e, about = facts.config.embedder, report_data.embedder_about(facts.workdir)
  if e.source == 'weights':
    seen = f'{about["image_size"]} pixels, E = {about["embed_dim"]}' if 'embed_dim' in about else ''
    return ', '.join(part for part in ('weights', about.get('name'), about.get('file'), seen) if part)
  return f'{e.source}, seed {e.seed}'


def state(facts: Facts) -> list[tuple[str, str, bool]]:
  """Returns for each stage what is there of it, and whether that is all."""
  config, workdir = facts.config, facts.workdir
  sets, runs, made = list(layout.datasets(config)), layout.runs(config), facts.runs.values()
  evaluated = sum(len(seeds) for seeds in facts.results.seeds.values())
  counts = {
      'ingest': (sum(report_data.is_ingested(workdir, d) for d in sets), len(sets), 'datasets'),
      'embed': (sum(report_data.is_embedded(workdir, d) for d in sets), len(sets), 'datasets'),
      'search': (len(facts.searched), len(config.benchmarks), 'benchmarks'),
      'prune': (len(facts.abouts), len(config.splits), 'splits'),
      'train': (sum(run['finished'] for run in made), len(runs), 'runs'),
      'evaluate': (evaluated, len(runs) * len(config.benchmarks), 'results')}
  lines = {stage: (f'{done} of {total} {what}', done == total)
           for stage, (done, total, what) in counts.items() if total}
  for stage, path in (('embedder', 'embedder/embedder.json'), ('dedup', 'dedup/keep.npy')):
    done = os.path.exists(os.path.join(workdir, path))
    lines[stage] = ('done' if done else 'missing', done)
  if not config.dedup.enabled:
    lines['dedup'] = ('off', True)
  return [(stage, *lines[stage]) for stage in STAGES if stage in lines]
