"""The stage report on a tiny real experiment: right numbers, finished or not, no requests."""

import csv
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
from test_page import parsed
import tiny

from clip_jax import defaults
from clip_jax.core import files, products
from clip_jax.core.products import STAGES
from clip_jax.data import reader
from clip_jax.evaluation import robustness
from clip_jax.evaluation.answer import Control
from clip_jax.evaluation.statistics import Estimate
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.reporting import svg
from clip_jax.reporting.page import Text
from clip_jax.stages import pipeline, report
from clip_jax.stages.report import axes as axes_lib
from clip_jax.stages.report import contrasts, panels
from clip_jax.stages.report.facts import Facts, Results, read
from clip_jax.studies import STUDIES

THRESHOLD = 0.92  # similarity of duplicates: a few queries have one in the anchor
STEPS = 400
LATE = 'near_75'  # the split whose runs do not converge
ACCURACY = {
  'anchor_only': 0.35,
  'handwriting_pruned': 0.6,
  'handwriting_matched': 0.72,
  'base': 0.75,
}
ESTIMATE = Estimate(-0.1, -0.2, -0.05, 0.02, 3.0, 0.01, 3, 100, 100, 'crossed')


def config(seeds=(0, 1, 2)):
  c = tiny.config(
    **{
      'glyphs.pool': 900,
      'glyphs.handwritten': 150,
      'glyphs.anchor': 300,
      'glyphs.queries': 120,
      'prune.duplicate_similarity': THRESHOLD,
      'report.bootstrap_draws': 200,
      'report.removed_images': 4,
      'train.seeds': tuple(seeds),
      'train.samples': STEPS * 32,
      'dedup.audit_rows': 500,
    }
  )
  del c.benchmarks['inverted'], c.benchmarks['rotated']
  c.benchmarks.handwriting.group_key = ''  # its few writers would give no interval
  return c


def search_only_config(anchor: bool = False):
  """Returns a config that only asks what the pool holds: no splits, and no anchor unless asked."""
  c = config()
  if not anchor:
    c.anchor = defaults.dataset()
  c.splits = type(c.splits)()
  c.prune.sensitivity, c.prune.preview, c.dedup.audit_rows = (), '', 0
  return c


def pruning_config():
  """Returns a config with a split of every rule that removes rows, and a dose curve."""
  c = config()
  for name in ('handwriting_matched', 'random_75'):
    del c.splits[name]
  defaults.add_doses(c, 'dose', benchmarks=('handwriting',), doses=(0.5, 1.0, 1.25))
  c.splits.two_nearest = defaults.split(rule='k_aligned', k=2, benchmarks=('handwriting',))
  c.splits.no_outline = defaults.split(rule='domain_removal', column='domain', values=('outline',))
  c.splits.both = defaults.split(rule='intersection', of=('handwriting_pruned', 'no_outline'))
  c.splits.either = defaults.split(rule='union', of=('handwriting_pruned', 'no_outline'))
  c.splits.rest = defaults.split(rule='minus', of=('base', 'no_outline'))
  return c


def run(c, folder, *stages):
  pipeline.run(c, str(folder), stages=list(stages), redo='', dry_run=False)


def copy(folder, target, *without):
  """Copies a work directory without the folders of some stages, and without its page."""
  gone = {STAGES[stage] for stage in (*without, 'report')}
  skip = lambda where, names: [n for n in names if where == str(folder) and n in gone]
  return shutil.copytree(folder, target, ignore=skip, symlinks=True)


def evaluate(c, folder):
  """Adds what training and evaluation would leave: models that are right as often as ACCURACY says.

  The runs of LATE learn too late; the first image of every benchmark is the hardest.
  """
  x = Experiment(c, str(folder))
  for split, seed in blocks.runs_to_train(c):
    takes_off, rng = (250 if split == LATE else 60), np.random.default_rng((7, seed))
    loss = lambda step: (
      0.6 + (math.log(32) - 0.6) / (1 + math.exp((step - takes_off) / 20)) + 0.02 * rng.normal()
    )
    lines = [
      json.dumps(
        {
          'step': step,
          'train/loss': loss(step),
          'train/seconds': step / 4,
          'train/images_per_sec': 2500.0,
        }
      )
      for step in range(10, STEPS + 1, 10)
    ]
    made, path = x.graph.run(split, seed), workdir.metrics_path(x, split, seed)
    files.write_bytes(path, '\n'.join(lines).encode())
    products.finish(
      x.workdir,
      made,
      [os.path.relpath(path, x.workdir)],
      {
        'samples': STEPS * 32,
        'passes': 9.5,
        'steps': STEPS,
        'replaced': [4] if split == 'base' else [],
      },
    )
    for b in c.benchmarks:
      label = np.asarray(workdir.source(x, b).labels, np.int32)
      image = np.random.default_rng(len(b)).random(len(label))
      noise = np.random.default_rng((3, seed, *split.encode())).random(len(label))
      right = 0.6 * image + 0.4 * noise < ACCURACY.get(split, 0.65)
      right[0] = False
      files.write_npz(workdir.result_path(x, split, seed, b, '.npz'), label=label, correct=right)
      files.write_json(
        workdir.result_path(x, split, seed, b, '.json'),
        {'classes': 10, 'top1': float(right.mean())},
      )
      name = f'evaluate/{split}/seed{seed}/{b}'
      products.finish(
        x.workdir, x.graph.result(split, seed, b), [name + '.json', name + '.npz'], {}
      )


@pytest.fixture(scope='module')
def searched(tmp_path_factory):
  """A work directory whose pool is searched, with a caption that looks like HTML."""
  folder = tmp_path_factory.mktemp('report') / 'searched'
  run(config(), folder, 'ingest', 'embedder', 'embed', 'dedup', 'search')
  captions = folder / 'ingest/pool/captions.bin'
  captions.write_bytes(captions.read_bytes().replace(b'even', b'<b>&'))
  return folder


@pytest.fixture(scope='module')
def finished(searched):
  """A finished work directory with its page: (path, config, page)."""
  c, folder = config(), copy(searched, searched.parent / 'finished')
  run(c, folder, 'prune')
  about = files.read_json(folder / 'splits/handwriting_matched/split.json')
  for draw in about['draws'].values():
    draw['no_matched_control'] = False  # as in a larger pool
    draw['standardised_differences'] = dict.fromkeys(draw['standardised_differences'], 0.05)
  files.write_json(folder / 'splits/handwriting_matched/split.json', about)
  evaluate(c, folder)
  run(c, folder, 'report')
  return folder, c, page_of(folder)


@pytest.fixture(scope='module')
def pruned(searched):
  """A work directory with a split of every rule, made and not trained: (path, config, page)."""
  c, folder = pruning_config(), copy(searched, searched.parent / 'pruned')
  run(c, folder, 'search', 'prune', 'report')
  return folder, c, page_of(folder)


@pytest.fixture
def blank_figures(monkeypatch):
  """Figures take most of the time: these tests are about all else."""
  blank = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 100"></svg>'
  monkeypatch.setattr(svg, 'render', lambda draw, height, title: blank)


@pytest.fixture
def copied(finished, tmp_path, blank_figures):
  """A copy of the finished one that a test may change."""
  return copy(finished[0], tmp_path / 'copy'), finished[1]


def compose(c, folder, studies=STUDIES):
  return report.compose(read(Experiment(c, str(folder))), studies)


def page_of(folder) -> str:
  return (pathlib.Path(folder) / 'report/index.html').read_text('utf8')


def table(folder, name) -> list[dict]:
  with open(os.path.join(folder, 'report', 'tables', f'{name}.csv'), encoding='utf8') as f:
    return list(csv.DictReader(f))


def correct(folder, split, benchmark, seeds=(0, 1, 2)):
  return np.stack(
    [np.load(f'{folder}/evaluate/{split}/seed{s}/{benchmark}.npz')['correct'] for s in seeds]
  )


def facts_of(c, results=None, searched=None, splits=None) -> Facts:
  results = results or Results({}, {}, {}, {}, {})
  return Facts(Experiment(c, ''), results, {}, splits or {}, searched or {}, None, {}, {})


def test_page_is_self_contained_and_well_formed(finished):
  page = finished[2]
  parser = parsed(page)
  assert all(link.startswith(('data:', '#')) for link in parser.links)
  assert not re.search(r'https?://', re.sub(r'xmlns(:\w+)?="[^"]*"', '', page))
  assert page.count('<script') == 1
  sections = {
    link[1:]
    for link in parser.links
    if link.startswith('#') and not re.match(r'#[mp][0-9a-f]', link)
  }
  assert sections <= set(parser.ids) and len(sections) == 17


def test_sections_of_studies_follow_what_was_removed(finished):
  places = [
    finished[2].index(f'<section id="{name}">')
    for name in ('removed', 'preview', 'sensitivity', 'neighbours')
  ]
  assert places == sorted(places)


def test_captions_are_escaped(finished):
  assert '&lt;b&gt;&amp;' in finished[2] and '<b>&' not in finished[2]


def test_answer_names_both_shares(finished):
  folder, _, page = finished
  answer = re.search(r'class="answer">(.*?)</p>', page, re.S).group(1)
  assert 'On handwriting' in answer and 'This holds for this pool and one embedder (pca)' in answer
  assert 'the matched control beats anchor_only' in answer
  assert (folder / 'report/summary.txt').read_text('utf8').startswith('On handwriting')


def test_accuracies_are_the_means_of_the_results(finished):
  folder, c, page = finished
  rows = {
    (r['split'], r['benchmark']): r
    for r in table(folder, 'accuracy')
    if r['without_leaked'] == 'False'
  }
  for split in ACCURACY:
    for benchmark in c.benchmarks:
      expected = correct(folder, split, benchmark).mean()
      assert float(rows[split, benchmark]['accuracy']) == pytest.approx(expected)
      assert f'{100 * expected:.1f}' in page
      assert float(rows[split, benchmark]['low']) < expected < float(rows[split, benchmark]['high'])
  assert {r['method'] for r in rows.values()} == {'crossed'}
  assert rows['base', 'val']['samples'] == '12800' and rows['base', 'val']['anchor_rows'] == '300'


def test_splits_with_one_seed_say_so(finished):
  folder, _, page = finished
  rows = table(folder, 'accuracy_seeds_1')
  assert {r['split'] for r in rows} == {'near_75', 'far_75', 'random_75'}
  assert {r['seeds'] for r in rows} == {'1'} and 'this checkpoint' in page
  assert {r['mark'] for r in rows if r['split'] == LATE} == {'not converged'}
  assert {r['mark'] for r in rows if r['split'] != LATE} == {''}


def test_every_split_is_compared_with_base_and_random_rows_on_every_benchmark(finished):
  folder, c, page = finished
  rows = {(r['split'], r['against'], r['benchmark']): r for r in table(folder, 'collateral')}
  others = [name for name in c.splits if name != 'base']
  assert {key for key in rows if key[1] == 'base'} == {
    (name, 'base', b) for name in others for b in c.benchmarks
  }
  assert {key[0] for key in rows if key[1] == 'random_75'} == {'near_75', 'far_75'}
  row = rows['handwriting_pruned', 'base', 'val']
  gap = correct(folder, 'handwriting_pruned', 'val').mean() - correct(folder, 'base', 'val').mean()
  assert float(row['value']) == pytest.approx(gap) and row['own_benchmark'] == 'False'
  assert rows['handwriting_pruned', 'base', 'handwriting']['own_benchmark'] == 'True'
  assert float(row['low']) < gap < float(row['high']) and row['seeds'] == '3'
  assert 'Every split on every benchmark' in page
  share = float(table(folder, 'accuracy')[0]['anchor_share'])
  about = files.read_json(folder / 'splits/base/split.json')
  assert share == about['anchor_rows'] / (about['anchor_rows'] + about['pool_rows'])


def test_a_base_of_the_same_budget_is_the_one_to_compare_with(finished):
  c = finished[1].copy_and_resolve_references()
  c.splits.base_passes = defaults.split(budget='epochs')
  c.splits.pruned_passes = defaults.split(
    rule='gap_aligned', benchmarks=('handwriting',), budget='epochs'
  )
  assert contrasts.base_of(c, 'pruned_passes') == 'base_passes'
  assert contrasts.base_of(c, 'handwriting_pruned') == 'base'
  del c.splits['base_passes']
  assert contrasts.base_of(c, 'pruned_passes') == 'base'
  del c.splits['base']
  assert contrasts.base_of(c, 'pruned_passes') is None


def test_leaked_queries_are_left_out_of_the_second_column(finished):
  folder, _, _ = finished
  vectors = {
    n: np.load(f'{folder}/embeddings/{n}/00000.npy').astype(float)
    for n in ('anchor', 'handwriting')
  }
  unit = {n: x / np.linalg.norm(x, axis=1, keepdims=True) for n, x in vectors.items()}
  leaked = (unit['handwriting'] @ unit['anchor'].T).max(1) >= THRESHOLD
  assert 0 < leaked.sum() < 60
  row = next(
    r
    for r in table(folder, 'accuracy')
    if r['split'] == 'base' and r['benchmark'] == 'handwriting' and r['without_leaked'] == 'True'
  )
  assert int(row['images']) == (~leaked).sum()
  assert float(row['accuracy']) == pytest.approx(
    correct(folder, 'base', 'handwriting')[:, ~leaked].mean()
  )


def test_comparisons_are_differences_on_the_same_seeds_and_images(finished):
  folder, c, page = finished
  rows = {r['what']: r for r in table(folder, 'comparison_handwriting_pruned_handwriting')}
  gap, matched, base, anchor = (
    correct(folder, split, 'handwriting').mean()
    for split in ('handwriting_pruned', 'handwriting_matched', 'base', 'anchor_only')
  )
  assert float(rows['against_control']['value']) == pytest.approx(gap - matched)
  assert float(rows['against_base']['value']) == pytest.approx(gap - base)
  assert float(rows['E']['value']) == pytest.approx((base - gap) / (base - anchor))
  assert float(rows['E_control']['value']) == pytest.approx((matched - gap) / (matched - anchor))
  val = (
    correct(folder, 'handwriting_pruned', 'val').mean()
    - correct(folder, 'handwriting_matched', 'val').mean()
  )
  assert float(rows['placebo']['value']) == pytest.approx(gap - matched - val)
  assert rows['against_control']['p_holm'] and 'queries that lost a neighbour against' in page
  x = Experiment(c, str(folder))
  hits = contrasts.compare(read(x), 'handwriting_pruned', 'handwriting')['did']
  counts = workdir.split_queries(x, 'handwriting_pruned', 'handwriting')
  assert (hits.hit, hits.unhit) == (
    (counts['removed_over'] > 0).sum(),
    (counts['removed_near'] == 0).sum(),
  )


def test_removed_rows_and_hits_are_those_of_the_split(finished):
  folder, c, page = finished
  about = files.read_json(f'{folder}/splits/handwriting_pruned/split.json')
  assert f'{about["dropped"]:,} of {about["candidates"]:,} candidates are removed' in page
  q = about['queries']['handwriting']
  assert f'{q["hit"]} of {q["queries"]} queries' in page
  rows = table(folder, 'slack_handwriting_pruned')
  assert {r['slack']: int(r['dropped']) for r in rows}['0.0'] == about['dropped']
  x = Experiment(c, str(folder))
  gone = np.setdiff1d(
    np.flatnonzero(workdir.candidates(x)), workdir.pool_rows(x, 'handwriting_pruned', 0)
  )
  word = table(folder, 'words_handwriting_pruned')[0]  # all captions are read, they are few
  holds = [
    re.search(rf'\b{word["word"]}\b', workdir.source(x, 'pool').caption(int(row)).lower())
    for row in gone
  ]
  assert float(word['removed_share']) == pytest.approx(sum(map(bool, holds)) / len(gone))


def test_duplicates_are_found_again(finished):
  folder, c, page = finished
  x = Experiment(c, str(folder))
  pool, facts = workdir.source(x, 'pool'), read(x)
  kinds, originals, keys = (pool.column(name) for name in ('duplicate_kind', 'duplicate_of', 'key'))
  planted = {
    r['kind']: (int(r['planted']), int(r['found'])) for r in table(folder, 'planted_duplicates')
  }
  assert planted['exact'][0] == planted['exact'][1] == (kinds == 'exact').sum() > 0
  assert planted['near'][0] == (kinds == 'near').sum() >= planted['near'][1]
  row = {key: i for i, key in enumerate(keys)}
  nearest = np.array([row.get(original, 0) for original in originals])
  exact = lambda kind: facts.pictures.exact_duplicates('pool', 'pool', kinds == kind, nearest)
  assert exact('exact') == planted['exact'][0] and exact('near') == 0
  assert facts.pictures.exact_duplicates('pool', 'pool', None, nearest) is None
  rates = {r['benchmark']: r for r in table(folder, 'duplicate_rates')}
  assert rates['val']['exact_pool'] == rates['handwriting']['exact_anchor'] == '0'
  near = facts.near['handwriting', 'pool']
  assert int(rates['handwriting']['pool']) == near.sum() > 0
  assert 'De-duplication marked' in page and len(table(folder, 'dedup_audit')) > 0


def test_skipped_unreadable_and_replaced_are_listed(finished):
  folder, c, page = finished
  rows, lost = table(folder, 'skipped'), files.read_json(folder / 'ingest/pool/skipped-00000.json')
  x = Experiment(c, str(folder))
  bad = workdir.source(x, 'pool').column('key')[~workdir.embeddings(x, 'pool').usable]
  assert (
    len(lost)
    and len(bad)
    and rows[: len(lost)] == [{'dataset': 'pool', **sample} for sample in lost]
  )
  assert rows[len(lost) :] == [
    {'dataset': 'pool', 'key': key, 'reason': 'unreadable image'} for key in bad
  ]
  assert 'base/seed0: 1, base/seed1: 1' in page


def test_overlap_counts_pool_rows(finished):
  folder, c, _ = finished
  rows = {(r['split'], r['also_in']): float(r['share']) for r in table(folder, 'overlap')}
  assert rows['near_75', 'base'] == rows['base', 'base'] == 1.0
  near, far = (
    workdir.pool_rows(Experiment(c, str(folder)), split, 0) for split in ('near_75', 'far_75')
  )
  assert rows['near_75', 'far_75'] == pytest.approx(len(np.intersect1d(near, far)) / len(near))
  assert not any('anchor_only' in pair for pair in rows)


def test_near_and_far_are_said_in_words_wherever_they_are_printed(finished):
  assert 'near-pruned (most similar removed)' in finished[2]
  assert 'far-pruned (most similar kept)' in finished[2]


def test_provenance(copied):
  folder, c = copied
  files.write_json(
    folder / 'times.json',
    {
      'seconds': {'train': 1265.2, 'search': 4.4, 'dedup': 0.0},
      'command': 'python -m clip_jax.main --config=configs/tiny.py',
    },
  )
  files.write_json(
    folder / 'versions.json',
    {'packages': {'jax': '0.99.9', 'scann': None}, 'devices': ['cpu: cpu']},
  )
  html = compose(c, folder)[0]
  assert (
    '--config=configs/tiny.py' in html
    and workdir.embedder_json(Experiment(c, str(folder)))['sha256'][:16] in html
  )
  assert '0.99.9' in html and 'scann' not in html[html.index('Packages and devices') :]
  assert html.index('>4 s<') < html.index('>21 min 5 s<') and 'dedup</span>' not in html
  assert '12,800 samples for every split, batch size 32' in html


def test_figures_and_tables_are_files_too(finished):
  folder = finished[0]
  names = set(os.listdir(f'{folder}/report/figures'))
  assert {
    'answer_handwriting_pruned_handwriting.svg',
    'comparisons.svg',
    'size_handwriting.svg',
    'similarity_val.svg',
    'plane_outline.svg',
    'accuracy_by_similarity_val.svg',
    'accuracy_by_excess_val.svg',
    'loss.svg',
  } <= names
  recorded = products.read_sidecar(str(folder), 'report/index')
  assert {f'report/figures/{name}' for name in names} <= set(recorded['files'])
  kinds = [os.path.splitext(name)[1] for name in os.listdir(f'{folder}/report/tables')]
  assert recorded['counts'] == {
    '.svg': len(names),
    '.csv': kinds.count('.csv'),
    '.tex': kinds.count('.tex'),
  }


def test_the_accuracy_table_is_latex_too(finished):
  folder, c, _ = finished
  for name, splits in (('accuracy', 4), ('accuracy_seeds_1', 3)):
    text = (folder / f'report/tables/{name}.tex').read_text('utf8')
    rows = text[text.index('midrule') : text.index('bottomrule')].count(' \\\\\n')
    assert rows == splits and all(f'& {b}' in text for b in c.benchmarks)


def test_a_second_run_does_nothing_and_a_new_product_remakes_the_page(copied):
  folder, c = copied
  run(c, folder, 'report')
  path = folder / 'report/index.html'
  before = path.stat().st_mtime_ns
  run(c, folder, 'report')
  assert path.stat().st_mtime_ns == before
  products.finish(str(folder), products.Product('train/other/seed0/run'), [], {})
  run(c, folder, 'report')
  assert path.stat().st_mtime_ns > before


def test_equal_results_give_equal_bytes(finished, tmp_path):
  """Drawn again in another process, from the same files."""
  folder, _, page = finished
  code = (
    'import sys, test_report\n'
    'open(sys.argv[2], "w", encoding="utf8").write(test_report.compose(test_report.config(), '
    'sys.argv[1])[0])'
  )
  out = tmp_path / 'again.html'
  path = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
  subprocess.run(
    [sys.executable, '-c', code, str(folder), str(out)],
    check=True,
    env={**os.environ, 'PYTHONPATH': path, 'PYTHONHASHSEED': '7'},
  )
  times = lambda text: re.sub(
    r'<details><summary>Wall-clock.*?</details>', '', text, flags=re.S
  )  # of the page itself
  assert times(out.read_text('utf8')) == times(page)


def test_a_control_without_donors_counts_as_random(copied):
  folder, c = copied
  about = files.read_json(folder / 'splits/handwriting_matched/split.json')
  about['draws']['rows-seed1']['no_matched_control'] = True
  files.write_json(folder / 'splits/handwriting_matched/split.json', about)
  html, summary, _ = compose(c, folder)
  assert '(no matched control exists)' in html
  assert 'the random control' in summary and 'Holm, ' not in html


def test_some_runs_missing(copied):
  folder, c = copied
  for split in ('anchor_only', 'handwriting_pruned'):
    shutil.rmtree(folder / f'evaluate/{split}/seed2')
  html, summary, _ = compose(c, folder)
  assert '2 of 15 runs are not evaluated yet: anchor_only/seed2, handwriting_pruned/seed2' in html
  assert 'handwriting_pruned/seed2' in summary and 'range of 2 seeds' in html


def test_a_source_file_that_is_gone_costs_its_images_only(copied):
  folder, c = copied
  text = (folder / 'ingest/pool/files.json').read_text()
  (folder / 'ingest/pool/files.json').write_text(text.replace('.tar', '.gone'))
  html, _, _ = compose(c, folder)
  assert (
    'unreadable</i>' in html
    and 'cannot be read any more' in html
    and html.count('data:image/png') > 10
  )


@pytest.mark.parametrize(
  'upto, has, lacks',
  [
    ('ingest', 'The pool is not searched yet.', 'data:image/png'),
    ('embed', 'Nothing', 'data:image/png'),
    ('search', 'The answer needs the base split', 'No split is evaluated yet.'),
    ('train', 'candidates are removed', 'Accuracy by similarity</h3>'),
  ],
)
def test_unfinished_work_directories(finished, tmp_path, blank_figures, upto, has, lacks):
  later = list(STAGES)[list(STAGES).index(upto) + 1 :]
  page = compose(finished[1], copy(finished[0], tmp_path / upto, *later))[0]
  parsed(page)
  assert 'Not answered yet' in page and lacks not in page
  if has != 'Nothing':
    assert has in page


def test_an_answer_names_only_unfinished_runs_that_it_uses():
  facts: Any = types.SimpleNamespace(
    config=config(),
    results=types.SimpleNamespace(seeds={('base', 'handwriting'): (0, 1)}),
    runs={('base', 1): types.SimpleNamespace(not_converged='too short')},
  )
  named = lambda *seeds: report._unfinished(facts, 'base', 'handwriting', seeds)
  assert named(0, 1, 2) == ['base/seed1', 'base/seed2']
  assert named(0, 1) == ['base/seed1'] and named(0) == []


def test_missing_parts_name_the_command_that_makes_them(searched, blank_figures):
  facts = read(Experiment(config(), str(searched)))
  line = f'--workdir={searched} --stages=prune,train,evaluate,report'
  assert f'python -m clip_jax.main --config=CONFIG.py {line}' in report.compose(facts)[0]
  assert [stage for stage, _, is_done in facts.state if not is_done] == [
    'prune',
    'train',
    'evaluate',
  ]


def test_a_summary_cell_says_which_interval_it_has():
  def cell(method, low=0.302):
    return report._cell(Estimate(0.35, low, 0.393, 0.1, 1, 1, 1, 9, 9, method))

  assert cell('crossed') == '35.0 [30.2, 39.3]'
  assert cell('range') == '35.0 [30.2, 39.3; range]'
  assert cell('this checkpoint') == '35.0 [30.2, 39.3; 1 seed]'
  assert cell('none', math.nan) == '35.0 [none]' and report._cell(None) == '-'


@pytest.mark.parametrize(
  'command, flag',
  [
    ('python -m clip_jax.main --config configs/my.py --workdir=w', '--config=configs/my.py'),
    ("python -m clip_jax.main --config.x=2 '--config=a b/my.py:v 1'", "'--config=a b/my.py:v 1'"),
    ("python -m clip_jax.main --config=it's.py", "'--config=it'\"'\"'s.py'"),  # not quoted
    ('', '--config=CONFIG.py'),
  ],
)
def test_a_missing_result_names_a_command_that_can_be_pasted(tmp_path, command, flag):
  files.write_json(tmp_path / 'times.json', {'command': command})
  missing = read(Experiment(config(), str(tmp_path))).missing('', 'ingest')
  assert missing.command == (
    f'python -m clip_jax.main {flag} --workdir={tmp_path} --stages=ingest,report'
  )


def test_an_empty_work_directory_has_a_page(tmp_path):
  files.write_json(
    tmp_path / 'empty/times.json', {'command': 'python -m clip_jax.main --config configs/my.py'}
  )
  html, summary, _ = compose(config(), tmp_path / 'empty')
  assert 'No dataset is indexed yet.' in html and '--config=configs/my.py' in html
  assert summary.startswith('Not answered yet') and 'the pool is not searched' in summary


def test_a_search_only_report_without_anchor(searched, tmp_path):
  folder = copy(searched, tmp_path / 'audit', 'embedder', 'embed', 'dedup', 'search')
  run(search_only_config(), folder, 'embedder', 'embed', 'dedup', 'search', 'report')
  page, rate = page_of(folder), table(folder, 'duplicate_rates')[0]
  assert (
    'this is the search of the pool. The pool has a near-duplicate '
    f'(similarity at least {THRESHOLD})' in page
  )
  assert f'{100 * float(rate["pool_share"]):.1f} % of val (95 % interval' in page
  assert 'nearest in the anchor' not in page and 'Zero-shot accuracy' not in page
  assert (
    'Without an anchor there is no similarity gap to align to' in page
    and 'Rows that alignment would remove' not in page
  )
  assert page.index('id="duplicates"') < page.index('id="neighbours"')
  assert {r['rule'] for r in table(folder, 'cut_by_size')} == {'near', 'far'}


def test_a_search_only_report_with_an_anchor_says_what_each_rule_would_remove(
  searched, tmp_path, blank_figures
):
  c, folder = search_only_config(anchor=True), copy(searched, tmp_path / 'audit')
  about = files.read_json(folder / 'search/handwriting/paper.json')
  files.write_json(folder / 'search/handwriting/paper.json', {**about, 'missed': 7})
  run(c, folder, 'report')
  page, x = page_of(folder), Experiment(c, str(folder))
  excess = workdir.search_column(x, 'handwriting', 'excess')[workdir.candidates(x)]
  rows = {(r['benchmark'], r['slack']): int(r['dropped']) for r in table(folder, 'rows_by_slack')}
  assert rows['handwriting', '0.0'] == (excess > 0).sum() > 0
  assert rows['handwriting', '-0.05'] == (excess > -0.05).sum()
  assert rows['all together', '0.0'] >= max(rows[b, '0.0'] for b in c.benchmarks)
  summary = (folder / 'report/summary.txt').read_text()
  assert (
    f'{rows["handwriting", "0.0"]} rows for handwriting' in summary
    and 'alignment would drop' in summary
  )
  assert 'keep rows over a threshold: 7 of' in page
  rates = {r['benchmark']: r for r in table(folder, 'duplicate_rates')}
  low, value, high = (float(rates['val'][key]) for key in ('pool_low', 'pool_share', 'pool_high'))
  assert low < value < high and value == pytest.approx(int(rates['val']['pool']) / 120)
  assert f'{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]' in summary


def test_vectors_only_leave_out_the_pictures_and_say_so(
  pruned, tmp_path, monkeypatch, blank_figures
):
  monkeypatch.setattr(
    reader.Source,
    'has_images',
    property(lambda source: os.path.basename(source._directory) != 'pool'),
  )
  folder = copy(pruned[0], tmp_path / 'prune')
  run(pruned[1], folder, 'report')
  page = page_of(folder)
  assert 'data:image/png' not in page and page.count('pass --config.pool.images=DIR.') == 2
  assert 'candidates are removed' in page
  assert 'words_handwriting_pruned.csv' in os.listdir(folder / 'report/tables')
  rate = next(r for r in table(folder, 'duplicate_rates') if r['benchmark'] == 'val')
  assert int(rate['pool']) > 0 and rate['exact_pool'] == '0' and rate['exact_anchor'] == '0'


def test_removed_rows_need_no_training(pruned):
  folder, c, page = pruned
  parsed(page)
  removed = page[page.index('<section id="removed">') : page.index('<section id="preview">')]
  for name in c.splits:
    is_shown = f'<h3>{name} <small>' in removed.replace('<wbr>', '')
    assert is_shown == (c.splits[name].rule not in ('all', 'anchor', 'matched')), name
  strips = re.findall(r'<div class="group"><p>([^<]*)</p>(.*?)</div></div>', removed, re.S)
  counts = {}
  for title, pictures in strips:
    counts.setdefault(title, []).append(pictures.count('<img'))
  assert counts['removed, largest excess'] == [4] * 5  # three doses, the aligned one, k neighbours
  assert counts['removed, median'] == [4] * 7
  assert (
    counts['removed, just over the cut'] == counts['kept, just under the cut'] == [4] * 5
  )  # not k, but near
  assert counts['removed, least similar'] == [4]  # far
  assert counts['removed, sampled evenly over the pool'] == [4] * 4  # domains and the three joins
  lines = re.findall(
    r'<small>(outline|filled|handwriting|coloured|inverted|noisy|rotated)</small>', removed
  )
  assert (
    lines == ['outline'] * 4 + [line for line in lines[4:] if line != 'outline'] and len(lines) == 8
  )
  about = workdir.split_json(Experiment(c, str(folder)), 'no_outline')
  assert f'outline: {about["dropped"]} rows.' in removed
  assert 'not alignment: without rows whose domain is outline' in removed
  assert (
    'rows that handwriting_pruned and no_outline all keep' in removed
    and 'The slack is +0.0' in removed
  )
  aligned = workdir.split_json(Experiment(c, str(folder)), 'handwriting_pruned')
  assert 'Accuracy against split size' not in page
  assert (
    f'handwriting_pruned  {aligned["dropped"]} rows' in (folder / 'report/summary.txt').read_text()
  )


def test_studies_are_shown_and_marked(pruned, tmp_path, blank_figures):
  folder, c, page = pruned
  assert '<h2>Preview: ridge regression on frozen features, not CLIP training</h2>' in page
  assert len(table(folder, 'preview')) == len(c.splits) * len(c.benchmarks)
  assert 'removed under hog only' in page
  os.remove(copy(folder, tmp_path / 'copy') / 'splits/sensitivity.json')
  assert 'not been compared with those of other embedders' in compose(c, tmp_path / 'copy')[0]


def test_the_dose_curve_has_each_split_against_its_own_control(pruned, tmp_path, blank_figures):
  c = pruning_config()
  for name in list(c.splits):
    if name not in (
      'base',
      'anchor_only',
      'handwriting_pruned',
      'two_nearest',
    ) and not name.startswith('dose'):
      del c.splits[name]
  c.train.seeds = (0,)
  folder = copy(pruned[0], tmp_path / 'evaluate')
  evaluate(c, folder)
  run(c, folder, 'report')
  rows, doses = table(folder, 'dose'), [f'dose_{dose}' for dose in (50, 100, 125)]
  assert [(r['split'], r['control']) for r in rows] == [(dose, f'{dose}_matched') for dose in doses]
  dropped = [workdir.split_json(Experiment(c, str(folder)), dose)['dropped'] for dose in doses]
  assert [float(r['share']) for r in rows] == [n / dropped[1] for n in dropped]
  expected = (
    correct(folder, 'dose_50', 'handwriting', (0,)).mean()
    - correct(folder, 'dose_50_matched', 'handwriting', (0,)).mean()
  )
  assert float(rows[0]['estimate']) == pytest.approx(expected)


def test_the_warning_of_a_study_stands_on_top(copied):
  folder, c = copied
  study = types.SimpleNamespace(
    section=lambda facts: ('planted', 'Planted copies', 'Planted', [Text('Copies.')]),
    banner=lambda facts: 'This experiment holds planted copies.',
  )
  silent = types.SimpleNamespace(section=lambda facts: None, banner=lambda facts: '')
  html, summary, shown = compose(
    c, folder, (silent, study, types.SimpleNamespace(section=lambda facts: None))
  )
  assert html.index('class="alarm"') < html.index('class="answer"') and 'planted' in [
    s.id for s in shown
  ]
  assert summary.startswith('This experiment holds planted copies.\n\nOn handwriting')


@pytest.mark.parametrize('seeds, words', [((0,), 'this checkpoint'), ((0, 1), 'range of 2 seeds')])
def test_few_seeds_claim_nothing(copied, seeds, words):
  page = compose(config(seeds), copied[0])[0]
  assert words in page and 'no verdict: it needs three seeds' in page
  assert 'mattered because' not in page and 'Holm, ' not in page


def test_results_share_seeds():
  ones = np.ones((3, 4), bool)
  results = Results(
    {('a', 'b'): ones, ('c', 'b'): ones[:2] & False},
    {('a', 'b'): (0, 1, 2), ('c', 'b'): (2, 5)},
    {},
    {},
    {},
  )
  (first, second), seeds = results.on_shared_seeds(('a', 'b'), ('c', 'b'))
  assert (
    seeds == (2,) and first.shape == second.shape == (1, 4) and first.all() and not second.any()
  )
  assert results.on_shared_seeds(('a', 'b'), ('x', 'b')) is None
  results.seeds['c', 'b'] = (7, 8)
  assert results.on_shared_seeds(('a', 'b'), ('c', 'b')) is None


def test_results_without_leaked_images():
  results = Results(
    {('a', 'b'): np.array([[True, False, True]]), ('a', 'c'): np.ones((1, 2), bool)},
    {},
    {},
    {},
    {'b': np.array(['x', 'y', 'z']), 'c': None},
  )
  rest = results.without_leaked({'b': np.array([True, False, False]), 'c': np.ones(2, bool)})
  assert list(rest.correct) == [('a', 'b')] and rest.correct['a', 'b'].tolist() == [[False, True]]
  assert rest.groups['b'].tolist() == ['y', 'z']


@pytest.mark.parametrize(
  'benchmark, classes, shift',
  [
    ('sketch', 1000, 'sketch'),
    ('imagenet-r', 200, 'r'),
    ('imagenet_v2', 1000, 'v2'),
    ('sketch', 7, None),
    ('handwriting', 1000, None),
    ('objectnet', 113, None),  # its line is that of answers over 125 ids
    ('objectnet', 125, None),
    ('objectnet', 1000, None),
  ],
)
def test_robustness_lines_hold_for_the_imagenet_family_only(benchmark, classes, shift):
  c, results = config(), Results({}, {}, {'val': 1000, benchmark: classes}, {}, {})
  c.benchmarks[benchmark] = c.benchmarks.val
  known = (shift, 'val') if shift else None
  assert axes_lib.of_benchmark(c, results, benchmark) == axes_lib.Axes('val', '', '', known)
  results.classes['val'] = 10
  assert axes_lib.of_benchmark(c, results, benchmark).line is None


def test_val_among_the_classes_of_a_shift_is_its_x_axis():
  c = config()
  for name in ('a', 'r', 'mine', 'objectnet'):
    c.benchmarks[name] = c.benchmarks.val.copy_and_resolve_references()
  c.benchmarks.a.class_set, c.benchmarks.objectnet.class_set = 'imagenet-a', 'objectnet'
  classes = {'val': 1000, 'r': 200, 'a': 200, 'mine': 5, 'objectnet': 113}
  results = Results({}, {}, classes, {}, {})
  axes = lambda name: axes_lib.of_benchmark(c, results, name)
  assert axes('r').line == ('r', 'val') and axes('a').line is None  # A has no line against all
  names = ('imagenet-a', 'classes_of_r', 'classes_of_mine', 'objectnet')
  results.counts.update({('val', name): np.ones(1, bool) for name in names})
  assert axes('r') == axes_lib.Axes('val', 'classes_of_r', '', ('r', 'classes'))
  assert axes('a') == axes_lib.Axes('val', 'imagenet-a', '', ('a', 'classes'))
  assert axes('mine') == axes_lib.Axes('val', 'classes_of_mine', '', None)
  both = axes_lib.Axes('val', 'objectnet', 'imagenet_masked', ('objectnet', 'classes'))
  assert axes('objectnet') == both
  c.benchmarks.val = c.benchmarks.val.copy_and_resolve_references()
  c.benchmarks.val.classes = ('tench', 'goldfish')
  assert axes('r').line is None  # val does not hold its classes


def test_the_line_stands_at_val_among_the_classes_of_the_shift():
  c = config()
  c.benchmarks.r = c.benchmarks.val.copy_and_resolve_references()
  c.benchmarks.objectnet = c.benchmarks.val.copy_and_resolve_references()
  c.benchmarks.objectnet.class_set = 'objectnet'
  few, every = np.array([[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]], bool), np.ones((2, 6), bool)
  keys = [('base', name) for name in ('val', 'r', 'objectnet')]
  results = Results(
    dict.fromkeys(keys, every),
    dict.fromkeys(keys, (3, 5)),
    {'val': 1000, 'r': 200, 'objectnet': 113},
    {key[1]: np.arange(6) for key in keys},
    {'val': np.array(list('aabbcc')), 'r': None, 'objectnet': None},
    scorings={
      ('base', 'val', 'classes_of_r'): few,
      ('base', 'val', 'objectnet'): few,
      ('base', 'objectnet', 'imagenet_masked'): ~few,
      ('pruned', 'val', 'other'): few,
    },
    counts={
      ('val', 'classes_of_r'): np.arange(6) < 4,
      ('val', 'objectnet'): np.arange(6) < 4,
      ('objectnet', 'imagenet_masked'): np.ones(6, bool),
    },
  )
  line, error, df = axes_lib.line_accuracies(c, results, ('base', 'r'), (3, 5))
  wanted = robustness.line_accuracy('r', 0.75, 'classes')
  assert line == pytest.approx([wanted, wanted])
  # Of two groups, one has all answers right, the other half of them.
  of_images = robustness.mean_line_error('r', [0.75, 0.75], 'classes', 0.25, 1.0)
  assert (error, df) == pytest.approx(of_images) and df == pytest.approx(1, abs=0.02)
  assert axes_lib.line_accuracies(c, results, ('base', 'r'), (3, 4)) is None
  assert axes_lib.line_accuracies(c, results, ('base', 'objectnet'), (3,)) is None
  scored = results.scored('val', 'classes_of_r')
  assert list(scored.correct) == [('base', 'r'), ('base', 'objectnet'), ('base', 'val')]
  assert scored.groups['val'].tolist() == list('aabb') and len(scored.label['val']) == 4
  panels_of = {p['name']: p for p in panels.against_validation(facts_of(c, results))}
  assert set(panels_of) == {'r', 'objectnet'}
  points = panels_of['objectnet']['points']
  assert [(p['x'].value, p['y'].value) for p in points] == [(0.75, 0.5), (0.75, 0.5)]
  assert (points[0]['x'].images, points[0]['x'].groups) == (4, 2)
  names = ('against', 'x_scoring', 'y_scoring', 'xname', 'yname')
  assert [panels_of['objectnet'][name] for name in names] == [
    *('val', 'objectnet', 'imagenet_masked'),
    *('val (classes of objectnet)', 'objectnet (its ImageNet classes)'),
  ]
  assert panels_of['r']['xname'] == 'val (classes of r)' and panels_of['r']['line'] is not None


def test_the_placebo_is_the_reference_else_the_benchmark_nearest_to_the_anchor():
  c = config()
  results = Results(
    {('handwriting_pruned', b): np.ones((1, 2), bool) for b in c.benchmarks}, {}, {}, {}, {}
  )
  searched = {
    b: types.SimpleNamespace(anchor_similarity=np.full(2, t))
    for b, t in (('val', 0.5), ('outline', 0.9))
  }
  placebo = lambda: contrasts.placebo_benchmark(
    facts_of(c, results, searched), 'handwriting_pruned'
  )
  assert placebo() == 'val'
  c.report.reference = 'handwriting'  # its own: nothing to compare with
  assert placebo() == 'outline'
  del results.correct['handwriting_pruned', 'outline'], results.correct['handwriting_pruned', 'val']
  assert placebo() is None


def test_a_dose_without_a_matched_control_stands_in_the_curve_and_equal_rows_once():
  dropped = {'handwriting_pruned': 100, 'dose_50': 50, 'dose_100': 100}
  items = [
    {'split': name, 'control': 'some', 'control_rule': 'random', 'against_control': ESTIMATE}
    for name in dropped
  ]
  splits = {
    name: {'dropped': n, 'aligned_dropped': 100, 'slack': 0.0} for name, n in dropped.items()
  }
  (panel,) = panels.by_dose(facts_of(pruning_config(), splits=splits), items)
  assert [(p['split'], p['share'], p['control_rule']) for p in panel['points']] == [
    ('handwriting_pruned', 1.0, 'random'),
    ('dose_50', 0.5, 'random'),
  ]


def test_only_the_splits_that_answer_are_tests(monkeypatch):
  c = pruning_config()
  monkeypatch.setattr(
    contrasts,
    'compare',
    lambda facts, split, b: {
      'split': split,
      'benchmark': b,
      'control_rule': 'matched',
      'balance': Control('matched', ()),
      'against_control': ESTIMATE,
      'equivalence': types.SimpleNamespace(p_value=0.2),
    },
  )
  facts = facts_of(
    c, Results({(name, 'handwriting'): np.ones((3, 2), bool) for name in c.splits}, {}, {}, {}, {})
  )
  items = {item['split']: item for item in contrasts.comparisons(facts)}
  assert len(items) == 5 and {item['tests'] for item in items.values()} == {1}
  assert [name for name, item in items.items() if item['answers']] == ['handwriting_pruned']
  assert [name for name, item in items.items() if item['holm'] == 0.01] == ['handwriting_pruned']
  assert [n for n, item in items.items() if item['holm_same'] == 0.2] == ['handwriting_pruned']
  c.splits.handwriting_pruned.slack = 0.02
  assert [i['split'] for i in contrasts.comparisons(facts) if i['holm'] == 0.01] == [
    'dose_100'
  ]  # as much as slack 0


def test_the_answer_is_made_of_what_is_aligned_at_slack_0():
  c = pruning_config()
  c.splits.slack_only = defaults.split(rule='gap_aligned', benchmarks=('val',), slack=0.01)
  item = lambda split, benchmark, control: {
    'split': split,
    'benchmark': benchmark,
    'control_rule': control,
  }
  items = [
    item('handwriting_pruned', 'handwriting', 'random'),
    item('dose_50', 'handwriting', 'matched'),
    item('dose_100', 'handwriting', 'matched'),
    item('two_nearest', 'handwriting', 'random'),
    item('slack_only', 'val', 'random'),
  ]
  headline = lambda items: [i['split'] for i in contrasts.headline(c, items)]
  assert headline(items) == [
    'dose_100',
    'slack_only',
  ]  # the one with a matched control; a slack where nothing else is
  assert headline(items[:2] + items[3:]) == ['handwriting_pruned', 'slack_only']
