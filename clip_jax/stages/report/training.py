"""The report's section on accuracy during training, from what `evaluate --follow` has written."""

from clip_jax.core import progress
from clip_jax.experiment import blocks, step_accuracies, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.reporting import curves, tables
from clip_jax.reporting.page import Figure, Figures, Text
from clip_jax.stages.report.facts import Facts

NOTE = (
  'Broad lines: the mean over those training seeds of a split that have such checkpoints, at the '
  'steps that all of them have. Thin lines: single seeds. These curves have no intervals and '
  'support no claim; \u201cZero-shot accuracy by split\u201d has the final accuracies with theirs.'
)


def section(facts: Facts) -> list:
  """Returns a panel for each benchmark with accuracies of checkpoints; [] without any."""
  runs, left_out = _runs(facts.x)
  drawn = tuple(
    figure for name in facts.config.benchmarks for figure in _figures(facts.x, runs, name)
  )
  if not drawn:
    return []
  words = NOTE
  if left_out:
    words += (
      f' {progress.count_with_noun(left_out, "line")} of {step_accuracies.FILE} '
      f'{"is" if left_out == 1 else "are"} left out: another run, another benchmark or another '
      'definition of a benchmark.'
    )
  return [Figures(drawn), Text(words, 'note')]


Runs = dict[tuple[str, int], step_accuracies.Lines]  # (split, seed) -> its lines


def _runs(x: Experiment) -> tuple[Runs, int]:
  """Returns the accuracies of every run that has some, and the number of lines left out."""
  finished = workdir.finished_fingerprints(x)
  indexes = {name: finished.get(f'ingest/{name}/index', '') for name in x.config.benchmarks}
  runs, left_out = {}, 0
  for split, seed in blocks.runs_to_train(x.config):
    folder = x.path(workdir.run_folder(split, seed))
    of_run = step_accuracies.run_fingerprint(folder)
    prints = {
      name: step_accuracies.fingerprint(x.config, name, index, of_run)
      for name, index in indexes.items()
    }
    lines, others = step_accuracies.read(step_accuracies.path_in(folder), prints)
    left_out += others
    if lines:
      runs[split, seed] = lines
  return runs, left_out


def _figures(x: Experiment, runs: Runs, benchmark: str) -> list[Figure]:
  """Returns the panel of a benchmark; [] if no checkpoint was evaluated on it."""
  batch_size = x.config.train.batch_size
  by_split: dict[str, list[dict[int, float]]] = {}  # split -> of each seed: samples -> accuracy
  images, counts = 0, []
  for (split, _), lines in runs.items():
    points = {step: line for (step, name), line in sorted(lines.items()) if name == benchmark}
    if points:
      by_split.setdefault(split, []).append(
        {step * batch_size: line['top1'] for step, line in points.items()}
      )
      counts.append(len(points))
      images = next(iter(points.values()))['n']
  if not counts:
    return []
  each = f'{min(counts)} to {max(counts)}' if min(counts) < max(counts) else f'{counts[0]}'
  caption = (
    f'{benchmark}: {tables.number(images)} images; {tables.number(sum(counts))} checkpoints of '
    f'{progress.count_with_noun(len(counts), "run")}, {each} of each.'
  )
  order = [split for split in x.config.splits if split in by_split]
  drawn = curves.accuracy_by_samples(
    [{'name': split, 'seeds': by_split[split]} for split in order], title=benchmark
  )
  return [Figure(f'training_{benchmark}', drawn, caption)]
