"""Further embedders (config.embedders): which stages run for them, too, on which datasets and in which folders.

An embedder that something uses has WORKDIR/embedders/<name>/, laid out as WORKDIR is, in which the stages run with
the config that layout.under gives:
  dedup.embedder:     embedder, embed of pool and anchor
  prune.preview:      embedder, embed of all
  prune.sensitivity:  embedder, embed of all, search
"""

import os
import shutil

from absl import logging
from ml_collections import ConfigDict

from clip_jax.core.errors import InputError
from clip_jax.stages import layout

STAGES = ('embedder', 'embed', 'search')


def used(config: ConfigDict, stage: str = 'embed') -> list[str]:
  """Returns which of config.embedders a stage runs for, in their order."""
  names = set(config.prune.sensitivity)
  if stage != 'search':
    names |= {config.prune.preview, config.dedup.embedder if config.dedup.enabled else ''}
  return [name for name in config.embedders if name in names and stage in STAGES]


def homes(config: ConfigDict, workdir: str, stage: str) -> list[tuple[ConfigDict, str]]:
  """Returns the config and the work directory for each further embedder that a stage runs for. Writes nothing."""
  return [(_config_of(config, workdir, name), layout.under(config, workdir, name)[1])
          for name in used(config, stage)]


@layout.remembered
def _config_of(config: ConfigDict, workdir: str, name: str) -> ConfigDict:
  """Returns the config of an embedder, with the datasets only that are embedded."""
  found, _ = layout.under(config, workdir, name)
  if name in (*config.prune.sensitivity, config.prune.preview):
    return found
  return layout.with_keys(found, benchmarks=ConfigDict(), planted=layout.with_keys(config.planted, benchmark=''))


def run(config: ConfigDict, workdir: str, stage: str, run_stage) -> None:
  """Runs a stage (its `run`) for each further embedder that needs it."""
  for theirs, home in homes(config, workdir, stage):
    link_ingest(home)
    run_stage(theirs, home)


def link_ingest(home: str) -> None:
  """Makes an embedder's work directory, if it is not there, and in it the link to the ingested datasets.

  A copy of the ingested datasets in its place (some programs copy what a link leads to) is replaced: it would stay as
  it is when samples are added.
  """
  os.makedirs(home, exist_ok=True)
  link, main = os.path.join(home, 'ingest'), os.path.join('..', '..', 'ingest')
  if os.path.islink(link) and os.readlink(link) == main:
    return
  if os.path.islink(link) or os.path.isfile(link):  # some programs write a link as a text
    os.unlink(link)
  elif os.path.isdir(link):
    shutil.rmtree(link)
    logging.info('%s was a copy, and is a link again.', link)
  try:
    os.symlink(main, link)
  except OSError as error:
    raise InputError(f'{link} cannot be made a link to {main} ({error.strerror}), which further embedders need. '
                     'Choose a --workdir on a file system with symbolic links.') from error


def say_unused(config: ConfigDict) -> None:
  """Says which of config.embedders nothing uses."""
  if left := [name for name in config.embedders if name not in used(config)]:
    logging.info('config.embedders: nothing uses %s; name it in prune.sensitivity, prune.preview or dedup.embedder.',
                 ', '.join(left))
