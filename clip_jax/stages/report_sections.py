"""The report's sections on the runs, on what takes no part, and on how it came about, as page blocks.

Those on the pool are in report_audit, on removed rows in report_removed. Each function returns the blocks of one
section; what is missing is a sentence and a command.
"""

from clip_jax.pruning import splits as splits_lib
from clip_jax.reporting import comparisons as comparisons_lib
from clip_jax.reporting import figures
from clip_jax.reporting import inventory
from clip_jax.reporting import sections
from clip_jax.reporting import tables
from clip_jax.reporting.page import Details, Figure, Figures, Heading, Text
from clip_jax.stages import layout
from clip_jax.stages import report_data
from clip_jax.stages import report_panels
from clip_jax.stages import report_statistics
from clip_jax.stages.report_facts import Facts


def answer(facts: Facts, items: list[dict], every: dict) -> list:
  """Returns the headline figure, or what it needs."""
  if not report_statistics.aligned(facts.config) or not layout.runs(facts.config):
    return []
  missing = None if items else facts.missing(
      'The answer needs base, anchor-only, the aligned split and its control, trained and '
      'evaluated.', 'evaluate')
  lines = report_panels.answers(facts.config, every, report_statistics.headline(facts.config, items))
  return sections.answer_blocks(lines, missing)


def accuracy(facts: Facts, every: dict, without: dict) -> list:
  """Returns the answer table of every split and benchmark."""
  config, label, leaked = facts.config, facts.results.label, facts.leaked
  if not every:  # the answer says it, where there is to be one
    late = layout.runs(config) and not report_statistics.aligned(config)
    return [facts.missing('No split was evaluated yet.', 'evaluate')] if late else []
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
  words = report_statistics.rule_words(facts.config, name)
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
  if not report_statistics.aligned(facts.config) or not layout.runs(facts.config):
    return []
  if not items:
    late = facts.missing('No aligned split was evaluated yet.', 'evaluate')
    return [late] if facts.results.correct else []  # the answer says it where nothing is
  dose = sections.dose_blocks(report_panels.by_dose(facts.config, facts.abouts, items))
  plane = sections.plane_blocks(report_panels.against_validation(facts.config, facts.results, facts.abouts))
  head = [Heading('Accuracy on each benchmark against the one that is like the anchor',
                  'every run a mark')]
  return comparisons_lib.blocks_of(items) + dose + (head + plane if plane else [])


def bins(facts: Facts) -> list:
  """Returns base's accuracy by nearest-neighbour similarity."""
  if not facts.results.correct:
    return []
  panels = report_panels.by_similarity(
      facts.results, facts.searched, report_statistics.first_split(facts.config, 'all'))
  return sections.bin_blocks(panels) or [facts.missing(
      'Accuracy by similarity needs the search, and the base split evaluated.', 'evaluate')]


def sizes(facts: Facts, every: dict) -> list:
  """Returns accuracy by split size, near and far against random."""
  config = facts.config
  if not facts.results.correct or not any(config.splits[name].rule in ('near', 'far') for name in config.splits):
    return []
  blocks = sections.size_blocks(
      report_panels.by_size(config, facts.abouts, every),
      report_panels.against_random(config, facts.abouts, facts.results))
  return blocks or [facts.missing('No near- or far-pruned split was evaluated yet.', 'evaluate')]


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
      ('Embedder', 'that of the vectors, which files hold' if config.embedder.source == 'files' else
       f'{_embedder(facts)}, ' + (f'sha256 {sha[:16]}\u2026' if sha else 'not made yet')),
      ('Search', f'{config.search.backend}, {config.search.top_k} neighbours a query'),
      ('De-duplication', f'similarity over {1 - config.dedup.threshold:.4g}'
       if config.dedup.enabled else 'off')]
  if not layout.runs(config):
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
