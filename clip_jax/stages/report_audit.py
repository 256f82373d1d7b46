"""The report's sections on the pool alone: galleries, similarities, duplicates, what each rule would remove.

In: the search, its sizes, de-duplication. They need no split; a config without splits (an audit) has only these.
"""

import numpy as np

from clip_jax.reporting import pool_audit
from clip_jax.reporting import inventory
from clip_jax.reporting import page
from clip_jax.reporting import sections
from clip_jax.reporting import tables
from clip_jax.reporting.page import Text
from clip_jax.stages import layout
from clip_jax.stages import report_data
from clip_jax.stages import report_images
from clip_jax.stages.report_facts import Facts


def sentence(facts: Facts) -> str:
  """Returns the answer of a config without splits: how much of each benchmark the pool holds."""
  return pool_audit.sentence(_rates(facts), facts.duplicate, _drops(facts), (facts.sizes or {}).get('candidates', 0))


def summary(facts: Facts) -> list[list[str]]:
  """Returns lines of cells for the terminal: each benchmark's duplicates, and what aligning would drop."""
  rates = [rate for rate in _rates(facts) if rate['pool'] is not None]
  if not rates:
    return []
  drops = {drop['name']: drop['at_zero'] for drop in _drops(facts)}
  candidates = (facts.sizes or {}).get('candidates', 0)
  lines = [['Benchmark', 'queries with a duplicate', *(['aligning would drop'] if drops else [])]]
  for rate in rates:
    dropped = drops.get(rate['benchmark'])
    lines.append([rate['benchmark'], tables.share_text(rate['pool']), *(
        [] if not drops else ['-'] if dropped is None else
        [f'{dropped:,} rows, {tables.share(dropped / max(candidates, 1))}'])])
  return lines


def neighbours(facts: Facts) -> list:
  """Returns galleries of queries beside their nearest neighbours."""
  config, searched = facts.config, facts.searched
  if not searched:
    return [facts.missing('The pool was not searched yet.', 'search')]
  pictures = report_images.Pictures(config, facts.workdir)
  # Those that the splits are about are open; where no split is about one, all.
  about = {b for name in config.splits for b in config.splits[name].benchmarks} or set(searched)
  shown: list = []
  for b in sorted(searched, key=lambda b: b not in about):
    if pictures.has(layout.POOL, b):
      drawn = pictures.neighbours(b, searched[b])
      shown.append(drawn if b in about else page.Details(b, (drawn,)))
  if shown:
    marked = ('Framed pool images are nearer to the query than any anchor image is; '
              if layout.has_anchor(config) else '')
    shown.insert(0, Text(f'{marked}{"p" if marked else "P"}oint at an image for its caption.', 'muted'))
  anchor = [layout.ANCHOR] if layout.has_anchor(config) else []
  shown += [Text(f'{name}: {why}', 'warning') for name, why in pictures.lost.items()]
  if without := pictures.without(layout.POOL, *anchor, *searched):
    shown.append(Text(without))
  late = [b for b in config.benchmarks if b not in searched]
  if late:
    shown.append(facts.missing(f'Not searched yet: {tables.listed(late)}.', 'search'))
  return shown


def similarity(facts: Facts) -> list:
  """Returns histograms and quantiles of nearest-neighbour similarity."""
  has_anchor = layout.has_anchor(facts.config)
  blocks = sections.histogram_blocks([
      {'name': b, 'pool': q['pool_similarity'][:, 0],
       'anchor': q['anchor_similarity'] if has_anchor else None}
      for b, q in facts.searched.items()])
  return blocks or [facts.missing('The pool was not searched yet.', 'search')]


def before(facts: Facts) -> list:
  """Returns how many rows gap-aligned, near- and far-pruning would drop, at any threshold."""
  found = facts.sizes
  if found is None:
    return [facts.missing('The sizes of the rules are counted by the search.', 'search')]
  blocks = []
  if found['has_excess']:
    blocks += pool_audit.slack_blocks(found['edges'], _drops(facts), found['candidates'])
    blocks += pool_audit.paper_compat_blocks(report_data.paper_compat(facts.config, facts.workdir))
  else:
    blocks.append(Text('Without an anchor there is no similarity gap to align to, so that there is nothing to say of '
                       'gap-aligned pruning: give config.anchor.'))
  over = [{'name': name, 'over': counts, 'together': name == pool_audit.TOGETHER}
          for name, counts in zip(_names(found), found['similarity_over'])]
  return blocks + pool_audit.size_blocks(found['edges'], over, found['candidates'])


def duplicates(facts: Facts) -> list:
  """Returns duplicates of the queries, and what de-duplication found in the pool."""
  config, workdir = facts.config, facts.workdir
  blocks: list = pool_audit.rate_blocks(_exact(facts, _rates(facts)), facts.duplicate)
  blocks += inventory.dedup_blocks(report_data.dedup_counts(config, workdir), report_data.planted(config, workdir),
                                   report_data.dedup_audit(workdir))
  return blocks or [facts.missing('Duplicates are found by de-duplication and search.', 'search')]


def _rates(facts: Facts) -> list[dict]:
  """Returns each searched benchmark's usable queries, and which share has a duplicate in pool and anchor."""
  return [{'benchmark': b, 'queries': int(np.isfinite(q['pool_similarity'][:, 0]).sum()),
           **{dataset: facts.duplicates.get((b, dataset)) for dataset in (layout.POOL, layout.ANCHOR)}}
          for b, q in facts.searched.items()]


def _exact(facts: Facts, rates: list[dict]) -> list[dict]:
  """Adds how many queries have an exact duplicate: equal bytes, or equal decoded pixels."""
  pictures = report_images.Pictures(facts.config, facts.workdir)
  for rate in rates:
    b = rate['benchmark']
    q = facts.searched[b]
    for dataset, nearest in ((layout.POOL, q['pool_nearest'][:, 0]), (layout.ANCHOR, q['anchor_nearest'])):
      near = facts.near.get((b, dataset))
      rate[f'exact_{dataset}'] = None if near is None else pictures.exact_duplicates(b, dataset, near, nearest)
  return rates


def _names(sizes: dict) -> list[str]:
  """Returns the names of the lines: the benchmarks, and all together where there are several."""
  return [*sizes['benchmarks'], *([pool_audit.TOGETHER] if len(sizes['benchmarks']) > 1 else [])]


def _drops(facts: Facts) -> list[dict]:
  """Returns what aligning would drop at every slack; [] without an anchor."""
  found = facts.sizes
  if found is None or not found['has_excess']:
    return []
  return [{'name': name, 'rows': rows, 'at_zero': int(zero), 'together': name == pool_audit.TOGETHER}
          for name, rows, zero in zip(_names(found), found['excess_over'], found['excess_zero'])]
