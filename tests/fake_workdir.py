"""Builds a tiny work directory as the stages would leave it, without running any of them.

`build(folder, upto='search')` stops after that stage. Images are drawn digits; embeddings are class
centres plus noise; a model is right the more often the nearer its training rows come to the image,
so that the report has an effect to show. Everything is a pure function of the arguments.
"""

import io
import json
import os
import tarfile

import numpy as np
from PIL import Image, ImageDraw

from clip_jax import defaults
from clip_jax.core import config as config_lib
from clip_jax.core import files
from clip_jax.core import products
from clip_jax.data import table
from clip_jax.pruning import columns
from clip_jax.pruning import rules
from clip_jax.pruning import splits as splits_lib
from clip_jax.stages import STAGES
from clip_jax.stages import layout

DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
STYLES = ('filled', 'outline', 'handwriting')
DIM, POOL_ROWS, ANCHOR_ROWS, QUERIES, STEPS = 16, 600, 320, 300, 400
THRESHOLD = 0.02    # of de-duplication
UNREADABLE = 200    # the pool row whose image is no image
SHARED = 10         # the pool row that is also handwriting query 3
# Pool row -> kind of the copy that it is, of the row 40 before it.
PLANTED = {50: 'exact', 51: 'exact', 52: 'exact', 350: 'near'}
LATE = 'near_75'    # the split whose runs do not converge


def config(seeds=(0, 1, 2)):
  """Returns the config of the fake experiment."""
  c = defaults.get_config()
  common = {'format': 'webdataset', 'path': 'unused', 'label_key': 'label', 'classes': DIGITS,
            'columns': ('domain', 'duplicate_of', 'duplicate_kind'), 'domain_column': 'domain'}
  c.pool, c.anchor = defaults.dataset(**common), defaults.dataset(**common)
  for name in ('val', 'outline', 'handwriting'):
    group_key = 'group' if name == 'handwriting' else ''
    c.benchmarks[name] = defaults.benchmark(**common, group_key=group_key)
  c.dedup.threshold = THRESHOLD
  c.search.top_k = 5
  about = {'benchmarks': ('handwriting',)}
  c.splits.base = defaults.split(rule='all')
  c.splits.anchor_only = defaults.split(rule='anchor')
  c.splits.handwriting_pruned = defaults.split(rule='gap_aligned', **about)
  c.splits.handwriting_matched = defaults.split(rule='matched', to='handwriting_pruned')
  c.splits.near_75 = defaults.split(rule='near', size=0.75, seeds=(0,), **about)
  c.splits.far_75 = defaults.split(rule='far', size=0.75, seeds=(0,), **about)
  c.splits.random_75 = defaults.split(rule='random', size=0.75, seeds=(0,))
  c.model.image_size, c.model.patch_size, c.model.vision_width = 32, 8, 64
  c.model.vision_layers, c.model.text_layers = 3, 1
  c.train.batch_size, c.train.samples, c.train.seeds = 64, 64 * STEPS, tuple(seeds)
  c.report.bootstrap_draws = 200
  return c


def audit_config(anchor: bool = False):
  """Returns a config that only asks what the pool holds: no splits, and no anchor unless asked."""
  c = config()
  if not anchor:
    c.anchor = defaults.dataset()
  c.splits = type(c.splits)()
  return c


def pruning_config():
  """Returns a config with a split of every rule that removes rows, a dose curve, and second looks."""
  c = config()
  for name in list(c.splits):
    if name not in ('base', 'anchor_only', 'handwriting_pruned', 'near_75', 'far_75'):
      del c.splits[name]
  defaults.add_doses(c, 'dose', benchmarks=('handwriting',), doses=(0.5, 1.0, 1.25))
  c.splits.two_nearest = defaults.split(rule='k_aligned', k=2, benchmarks=('handwriting',))
  c.splits.no_outline = defaults.split(rule='domain_removal', column='domain', values=('outline',))
  c.splits.both = defaults.split(rule='intersection', of=('handwriting_pruned', 'no_outline'))
  c.splits.either = defaults.split(rule='union', of=('handwriting_pruned', 'no_outline'))
  c.splits.rest = defaults.split(rule='minus', of=('base', 'no_outline'))
  c.embedders.other = defaults.embedder(source='hog')
  c.prune.sensitivity, c.prune.preview = ('other',), 'other'
  c.dedup.audit_rows = 500
  return c


def build(folder, c=None, upto: str = 'evaluate') -> str:
  """Writes the work directory of a config as it is after the stage `upto`; returns its path."""
  c, folder = config() if c is None else c, str(folder)
  files.write_json(os.path.join(folder, 'config.json'), config_lib.plain(c.to_dict()))
  world = _World(c, folder)
  for stage in list(STAGES)[:list(STAGES).index(upto) + 1]:
    getattr(world, stage)()
  files.write_bytes(os.path.join(folder, 'log.txt'), (
      '2025-01-01 10:00:00,000 I clip_jax: python -m clip_jax.main --config=configs/fake.py '
      f'--workdir={folder}\n2025-01-01 10:00:09,000 I search took 4 s.\n'
      '2025-01-01 10:21:09,000 I train took 21 min 5 s.\n').encode())
  files.write_json(os.path.join(folder, 'versions.json'), {
      'python': '3.11.2', 'packages': {'jax': '0.10.2', 'scann': None}, 'devices': ['cpu: cpu'],
      'cpus': 2})
  return folder


class _World:
  """One method a stage; the arrays that later stages need are attributes."""

  def __init__(self, c, folder: str):
    self.c, self.folder = c, folder
    rng = np.random.default_rng(0)
    self.classes, self.styles = rng.normal(size=(10, DIM)), 0.9 * rng.normal(size=(3, DIM))
    self.sets: dict[str, list[dict]] = {}
    for i, name in enumerate(('pool', 'anchor', *c.benchmarks)):
      samples = _samples(name, self.classes, self.styles, np.random.default_rng((1, i)))
      if name in layout.datasets(c):
        self.sets[name] = samples
    if 'handwriting' in self.sets:
      shared = self.sets['pool'][SHARED]
      self.sets['handwriting'][3] |= {'vector': shared['vector'], 'image': shared['image']}

  def path(self, *parts: str) -> str:
    return os.path.join(self.folder, *parts)

  def finish(self, name: str, made=(), **counts) -> None:
    products.finish(self.folder, products.Product(name, {}), made, counts)

  def ingest(self) -> None:
    for name, samples in self.sets.items():
      half = len(samples) // 2
      parts = [samples[:half], samples[half:]] if name == 'pool' else [samples]
      shards = []
      for number, part in enumerate(parts):
        tar = self.path('data', f'{name}-{number:05d}.tar')
        offsets = _write_tar(tar, part)
        lost = [{'key': 'lost', 'reason': 'no caption'}] if name == 'pool' and not number else []
        scan = table.Scan([_record(s, at) for s, at in zip(part, offsets)], lost)
        table.write_shard(self.path('ingest', name), number, scan)
        shards.append({'format': 'webdataset', 'root': self.path('data'), 'path': tar})
      table.assemble(self.path('ingest', name), shards, classes=[DIGITS] * len(shards))
      self.finish(f'ingest/{name}/index', rows=len(samples))

  def embedder(self) -> None:
    files.write_json(self.path('embedder', 'embedder.json'), {'source': 'pca', 'sha256': 'ab' * 32})
    self.finish('embedder/embedder')

  def embed(self) -> None:
    self.vectors, self.usable = {}, {}
    for name, samples in self.sets.items():
      x = np.array([s['vector'] for s in samples], np.float32)
      x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
      usable = np.array([s['image'].startswith(b'\x89PNG') for s in samples])
      x[~usable] = 0
      self.vectors[name], self.usable[name] = x, usable
      half = len(x) // 2
      parts = (slice(half), slice(half, None)) if name == 'pool' else (slice(None),)
      for i, part in enumerate(parts):
        files.write_npy(self.path('embeddings', name, f'{i:05d}.npy'), x[part])
        files.write_npy(self.path('embeddings', name, f'usable-{i:05d}.npy'), usable[part])
        self.finish(f'embeddings/{name}/{i:05d}')

  def dedup(self) -> None:
    x = self.vectors['pool'].astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    usable = self.usable['pool']
    similar = np.tril(x @ x.T > 1 - THRESHOLD, -1) & usable[:, None] & usable
    self.keep = ~similar.any(1)
    files.write_npy(self.path('dedup', 'keep.npy'), self.keep)
    files.write_npy(self.path('dedup', 'duplicate_of.npy'),
                    np.where(self.keep, -1, similar.argmax(1)))
    self.finish('dedup/keep', ['dedup/keep.npy'], usable=int(usable.sum()),
                duplicates=int((~self.keep).sum()), clusters=1)
    if self.c.dedup.audit_rows:
      points = [{'clusters': k, 'found': 40 - 4 * i, 'recall': 1 - 0.1 * i, 'low': 0.85 - 0.1 * i,
                 'high': 1 - 0.08 * i, 'dropped': 30 - 3 * i, 'precision': 1.0}
                for i, k in enumerate((1, 2, 5, 20))]
      files.write_json(self.path('dedup', 'audit.json'), {
          'rows': 500, 'threshold': THRESHOLD, 'pairs': 40, 'dropped_exhaustive': 30,
          'by_clusters': points, 'chains': {'components': 25, 'largest': 4, 'through_dropped': 2,
                                            'sizes': {'2': 20, '3': 4, '4': 1}}})
      self.finish('dedup/audit')

  def search(self) -> None:
    self.similarity, self.excess, self.queries, self.over = {}, {}, {}, {}
    pool, half = self.vectors['pool'].astype(np.float32), POOL_ROWS // 2
    for name in self.c.benchmarks:
      q = self.vectors[name].astype(np.float32)
      t, nearest = np.full(len(q), np.nan, np.float32), np.full(len(q), -1)
      if 'anchor' in self.sets:
        to_anchor = q @ self.vectors['anchor'].astype(np.float32).T
        t, nearest = to_anchor.max(1), to_anchor.argmax(1)
      s = q @ pool.T  # [Q, N]
      s[:, ~self.usable['pool']] = -np.inf
      top = np.argsort(-s, axis=1, kind='stable')[:, :self.c.search.top_k]
      self.over[name] = s - t[:, None]
      self.similarity[name], self.excess[name] = s.max(0), self.over[name].max(0)
      columns = {'similarity': s.max(0), 'nearest': s.argmax(0).astype(np.int32),
                 'excess': self.excess[name]}
      for i, part in enumerate((slice(half), slice(half, None))):
        files.write_npz(self.path('search', name, f'pool-{i:05d}.npz'),
                        **{key: column[part] for key, column in columns.items()})
        self.finish(f'search/{name}/pool-{i:05d}')
      self.queries[name] = {
          'anchor_similarity': t, 'anchor_nearest': nearest,
          'pool_similarity': np.take_along_axis(s, top, 1), 'pool_nearest': top,
          'anchor_similarity_f64': t.astype(np.float64)}
      files.write_npz(self.path('search', name, 'queries.npz'), **self.queries[name])
      self.finish(f'search/{name}/queries')
      if 'anchor' in self.sets:
        files.write_json(self.path('search', name, 'paper.json'), {
            'top_k': 20_000, 'chunk_rows': 1_000_000,
            'over': int((self.excess[name][self.candidates] > 0).sum()),
            'missed': 7 if name == 'handwriting' else 0})
        self.finish(f'search/{name}/paper')
    self._sizes()

  @property
  def candidates(self):
    """Returns the rows that may be in a split, [m] int64."""
    return np.flatnonzero(self.usable['pool'] & self.keep)

  def _sizes(self) -> None:
    edges, rows = np.arange(-1000, 1001) / 1000, self.candidates
    over = {}
    for what, column in (('similarity', self.similarity), ('excess', self.excess)):
      each = [column[name][rows] for name in self.c.benchmarks]
      each.append(np.max(each, axis=0))
      over[what] = np.array([[(values > edge).sum() for edge in edges] for values in each], np.int64)
    has_excess = 'anchor' in self.sets
    files.write_npz(
        self.path('search', 'sizes.npz'), edges=edges, benchmarks=np.array(list(self.c.benchmarks)),
        similarity_over=over['similarity'], excess_over=over['excess'],
        excess_zero=over['excess'][:, 1000], has_excess=np.bool_(has_excess),
        candidates=np.int64(len(rows)), rows=np.int64(POOL_ROWS))
    self.finish('search/sizes')

  def prune(self) -> None:
    self.rows, self.abouts = {}, {}
    for name in self.c.splits:
      for seed in layout.seeds(self.c, name):
        self._draw(name, seed)
      if self.c.splits[name].rule in layout.ALIGNED:
        self.abouts[name] |= self._aligned(name)
      files.write_json(self.path('splits', name, 'split.json'), self.abouts[name])
      self.finish(f'splits/{name}/split')
    self._second_looks()

  def _second_looks(self) -> None:
    """Writes the comparison with another embedder, and the ridge preview."""
    if self.c.prune.sensitivity:
      gone = np.setdiff1d(self.candidates, self.rows['handwriting_pruned', 0])
      one = {'embedder': 'other', 'removed_here': len(gone), 'removed_there': len(gone) + 9,
             'jaccard': 0.5, 'jaccard_interval': [0.42, 0.58], 'same_count_jaccard': 0.625,
             'same_count_interval': [0.54, 0.71], 'spearman': 0.813, 'only_here': 30, 'only_there': 39,
             'rows_only_here': gone[:12].tolist(),
             'rows_only_there': self.rows['handwriting_pruned', 0][:12].tolist()}
      files.write_json(self.path('splits', 'sensitivity.json'), {
          'embedders': ['', 'other'], 'splits': {'handwriting_pruned': [one]}})
      self.finish('splits/sensitivity')
    for i, name in enumerate(self.c.splits if self.c.prune.preview else ()):
      top1 = 0.8 - 0.03 * i
      files.write_json(self.path('splits', name, 'preview.json'), {
          'embedder': 'other', 'features': 324, 'rows': 600, 'labelled': 480, 'classes_by': {}, 'l2': 0.1,
          'benchmarks': {
              b: {'n': QUERIES, 'top1': top1, 'low': top1 - 0.04, 'high': top1 + 0.04}
              for b in self.c.benchmarks}})
      self.finish(f'splits/{name}/preview')

  def _pairs(self, name: str, k: int) -> list[columns.Pairs]:
    to_anchor = self.vectors[name].astype(float) @ self.vectors['anchor'].astype(float).T
    anchor = -np.sort(-to_anchor, axis=1)[:, :k]
    s = self.vectors[name].astype(float) @ self.vectors['pool'].astype(float).T
    query, row = np.nonzero(s > anchor[:, -1:])
    return [columns.Pairs(anchor, query, row, s[query, row])]

  def _columns(self) -> rules.Columns:
    anchor = self.vectors['anchor'].astype(np.float32)
    label = np.array([s['label'] for s in self.sets['anchor']])
    means = np.stack([anchor[label == k].mean(0) for k in range(10)])
    near = self.vectors['pool'].astype(np.float32) @ means.T
    highest = lambda column: lambda names, rows: np.max(
        [column[name][rows] for name in names], axis=0).astype(float)
    return rules.Columns(
        self.usable['pool'] & self.keep, self.similarity, self.excess, highest(self.similarity),
        highest(self.excess), pairs=self._pairs, anchor_class=near.argmax(1).astype(np.int32),
        anchor_class_similarity=near.max(1), caption_length=np.full(POOL_ROWS, 20, np.int32),
        image_pixels=np.full(POOL_ROWS, 784))

  def _draw(self, name: str, seed: int) -> None:
    block, known = self.c.splits[name], self._columns()
    rule, candidates = rules.RULES[block.rule], int(known.candidates.sum())
    given = {key: block[key] for key in ('slack', 'quantile', 'dose', 'k') if key in rule.keys}
    if 'benchmarks' in rule.keys:
      given['benchmarks'] = tuple(block.benchmarks)
    if 'levels' in rule.needs:
      given |= {'codes': np.array([STYLES.index(s['domain']) for s in self.sets['pool']]),
                'names': STYLES, 'values': block['values']}
    if 'others' in rule.needs:
      given['others'] = [self.rows[other, 0] for other in block.of]
    if 'count' in rule.needs:
      given['count'] = rules.count_of(block.size, candidates)
    if 'draw' in rule.needs:
      given |= {'seed': block.seed, 'draw': seed}
    if block.to:
      given['removed'] = np.setdiff1d(self.candidates, self.rows[block.to, 0])
    kept = rule.keep(known, **given)
    rows = splits_lib.base_rows(kept.rows, POOL_ROWS, np.arange(ANCHOR_ROWS), True)
    self.rows[name, seed] = kept.rows
    path = layout.rows_name(self.c, name, seed)
    files.write_npy(self.path(path + '.npy'), rows)
    self.finish(path, [path + '.npy'], pool_rows=len(kept.rows))
    size = {'pool_rows': len(kept.rows), 'anchor_rows': ANCHOR_ROWS,
            'hash': splits_lib.rows_hash(rows)}
    about = self.abouts.setdefault(name, {
        'rule': block.rule, 'candidates': candidates, 'pool_size': POOL_ROWS, **size,
        'parameters': {key: config_lib.plain(layout.plain(block)[key]) for key in rule.keys},
        'dropped': candidates - len(kept.rows), 'append_anchor': True, 'seed': block.seed,
        'checks': {}, 'draws': {}})
    about['draws'][path.rsplit('/', 1)[1]] = {**size, **kept.report}

  def _aligned(self, name: str) -> dict:
    known, kept = self._columns(), self.rows[name, layout.seeds(self.c, name)[0]]
    gone = np.setdiff1d(self.candidates, kept)
    over, cosine = {}, {}
    for b in self.c.splits[name].benchmarks:
      over[b] = (self.over[b][:, gone] > 0).sum(1)
      cosine[b] = self.queries[b]['anchor_similarity_f64']
      files.write_npz(self.path('splits', name, f'queries-{b}.npz'), removed_over=over[b],
                      removed_near=(self.over[b][:, gone] > -0.02).sum(1), anchor_cosine=cosine[b])
    pool = self.sets['pool']
    found = splits_lib.describe_aligned(
        known, kept, benchmarks=tuple(over), dropped_at=splits_lib.dropped_at_slack(known, tuple(over)),
        removed_over=over, anchor_cosine=cosine, duplicate_similarity=1 - THRESHOLD,
        label=np.array([DIGITS[s['label']] for s in pool]), domain=np.array([s['domain'] for s in pool]))
    checks = {'checked': 100, 'failures': 0, 'kind': 'equality', 'first_failures': []}
    return {**found, 'duplicate_similarity': 1 - THRESHOLD, 'checks': {b: checks for b in over}}

  def train(self) -> None:
    for split, seed in layout.runs(self.c):
      folder, rng = layout.run_folder(split, seed), np.random.default_rng((7, seed))
      takes_off, lines = 250 if split == LATE else 60, []
      for step in range(10, STEPS + 1, 10):
        loss = 0.6 + (np.log(64) - 0.6) / (1 + np.exp((step - takes_off) / 20))
        lines.append(json.dumps({
            'step': step, 'train/loss': loss + 0.03 * rng.normal(), 'train/seconds': step / 4,
            'train/images_per_sec': 2500.0}))
      files.write_bytes(self.path(folder, 'metrics.jsonl'), ('\n'.join(lines) + '\n').encode())
      size = self.abouts[split]['pool_rows'] + ANCHOR_ROWS
      self.finish(folder + '/run', [folder + '/metrics.jsonl'], rows=size, samples=64 * STEPS,
                  passes=64 * STEPS / size, steps=STEPS, replaced=[4] if split == 'base' else [])

  def evaluate(self) -> None:
    for split, seed in layout.runs(self.c):
      pool = self.vectors['pool'][self.rows[split, seed]]
      trained_on = np.concatenate([pool, self.vectors['anchor']]).astype(np.float32)
      for benchmark, samples in self.sets.items():
        if benchmark in self.c.benchmarks:
          label = np.array([s['label'] for s in samples], np.int32)
          nearest = (self.vectors[benchmark].astype(np.float32) @ trained_on.T).max(1)
          self._result(split, seed, benchmark, label, nearest)

  def _result(self, split: str, seed: int, benchmark: str, label, nearest) -> None:
    images = np.random.default_rng(list(benchmark.encode())).normal(size=len(label))
    noise = np.random.default_rng((3, seed, *split.encode())).normal(size=len(label))
    taught = -0.8 if split == 'anchor_only' else 0.6
    right = 16 * (nearest - 0.88) + images + 0.7 * noise + taught > 0
    others = (label[:, None] + np.arange(1, 6)) % 10
    top5 = np.where(right[:, None], np.column_stack([label, others[:, :4]]), others)
    base = f'evaluate/{split}/seed{seed}/{benchmark}'
    files.write_npz(self.path(base + '.npz'), label=label, prediction=top5[:, 0].astype(np.int32),
                    top5=top5.astype(np.int32), correct=right)
    files.write_json(self.path(base + '.json'), {
        'n': len(label), 'classes': 10, 'top1': float(right.mean()), 'top1_low': 0.0,
        'top1_high': 1.0, 'top5': 1.0, 'mean_per_class': float(right.mean()), 'per_class': {},
        'unreadable': 0, 'templates': ['{}'], 'checkpoint': f'step {STEPS}'})
    self.finish(base, [base + '.json', base + '.npz'])


def _samples(name: str, classes, styles, rng) -> list[dict]:
  """Returns the samples of one dataset: pool rows of all styles, an anchor half of handwriting."""
  size = {'pool': POOL_ROWS, 'anchor': ANCHOR_ROWS}.get(name, QUERIES)
  spread = 0.5 if name == 'pool' else 0.45
  out: list[dict] = []
  for i in range(size):
    label, style = (i // 2) % 10, name
    if name == 'pool':
      label, style = int(rng.integers(10)), STYLES[int(rng.integers(3))]
    elif name in ('anchor', 'val'):
      style = 'handwriting' if name == 'anchor' and i % 2 else 'filled'
    vector = classes[label] + styles[STYLES.index(style)] + spread * rng.normal(size=DIM)
    sample = {'key': f'{name}-{i:05d}', 'label': label, 'domain': style, 'group': f'form-{i // 4}',
              'vector': vector, 'image': draw(label, style, rng), 'kind': None, 'of': None,
              'caption': _caption(label, style, rng)}
    if name == 'pool' and i in PLANTED:
      twin, kind = out[i - 40], PLANTED[i]
      moved = twin['vector'] + (0.6 if kind == 'near' else 0.01) * rng.normal(size=DIM)
      sample |= {'vector': moved, 'image': twin['image'], 'label': twin['label'],
                 'of': twin['key'], 'kind': kind}
    out.append(sample)
  if name == 'pool':
    out[UNREADABLE]['image'] = b'not an image'
  return out


def draw(label: int, style: str, rng) -> bytes:
  """Returns the PNG of a small digit in one of the styles."""
  ink, paper = {'filled': (20, 235), 'outline': (120, 250), 'handwriting': (225, 30)}[style]
  image = Image.new('RGB', (28, 28), (paper,) * 3)
  at = 8 + int(rng.integers(-3, 4)), 4 + int(rng.integers(-3, 4))
  ImageDraw.Draw(image).text(at, str(label), fill=(ink, int(rng.integers(256)), ink), font_size=20)
  out = io.BytesIO()
  image.save(out, 'PNG')
  return out.getvalue()


def _caption(label: int, style: str, rng) -> str:
  word = {'filled': 'printed', 'outline': 'outlined', 'handwriting': 'handwritten'}[style]
  return f'{word} digit {DIGITS[label]}' if rng.random() < 0.7 else f'<b>{DIGITS[label]}</b> & more'


def _record(sample: dict, offset: int) -> table.Record:
  columns = {'domain': sample['domain'], 'duplicate_of': sample['of'],
             'duplicate_kind': sample['kind']}
  return table.Record(
      key=sample['key'], caption=sample['caption'], label=sample['label'], group=sample['group'],
      offset=offset, length=len(sample['image']), width=28, height=28, columns=columns)


def _write_tar(path: str, samples: list[dict]) -> list[int]:
  """Writes the samples' images as a tar; returns where each image's bytes begin."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as tar:
    for sample in samples:
      member = tarfile.TarInfo(sample['key'] + '.png')
      member.size = len(sample['image'])
      tar.addfile(member, io.BytesIO(sample['image']))
  with tarfile.open(path) as tar:
    return [member.offset_data for member in tar]
