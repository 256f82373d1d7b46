"""The stage report on fake work directories: right numbers, finished or not, no requests."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import fake_workdir
import numpy as np
import pytest
from test_page import parsed
import test_planted_copies

from clip_jax import defaults
from clip_jax.core import files
from clip_jax.core import products
from clip_jax.data import reader
from clip_jax.evaluation.statistics import Estimate
from clip_jax.reporting import svg
from clip_jax.stages import report
from clip_jax.stages import report_data
from clip_jax.stages import report_panels
from clip_jax.stages import report_planted
from clip_jax.stages import report_statistics


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A finished work directory with its report: (path, config, page)."""
  c = fake_workdir.config()
  folder = fake_workdir.build(tmp_path_factory.mktemp('finished'), c)
  report.run(c, folder)
  return folder, c, page_of(folder)


@pytest.fixture(scope='module')
def pruned(tmp_path_factory):
  """A work directory with a split of every rule, made and not trained: (path, config, page)."""
  c = fake_workdir.pruning_config()
  folder = fake_workdir.build(tmp_path_factory.mktemp('pruned'), c, 'prune')
  report.run(c, folder)
  return folder, c, page_of(folder)


@pytest.fixture
def blank_figures(monkeypatch):
  """Figures take most of the time: these tests are about all else."""
  blank = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 100"></svg>'
  monkeypatch.setattr(svg, 'render', lambda draw, height, title: blank)


@pytest.fixture
def copied(finished, tmp_path, blank_figures):
  """A copy of it that a test may change."""
  return shutil.copytree(finished[0], tmp_path / 'copy', symlinks=True).as_posix(), finished[1]


def page_of(folder) -> str:
  with open(os.path.join(folder, 'report', 'index.html'), encoding='utf8') as f:
    return f.read()


def table(folder, name) -> list[dict]:
  with open(os.path.join(folder, 'report', 'tables', f'{name}.csv'), encoding='utf8') as f:
    return list(csv.DictReader(f))


def correct(folder, split, benchmark, seeds=(0, 1, 2)):
  return np.stack(
      [np.load(f'{folder}/evaluate/{split}/seed{s}/{benchmark}.npz')['correct'] for s in seeds])


def built(tmp_path, upto, c=None):
  """Returns the page of a work directory as it is after the stage `upto`."""
  c = c or fake_workdir.config()
  folder = fake_workdir.build(tmp_path / upto, c, upto)
  report.run(c, folder)
  return page_of(folder)


def test_page_is_self_contained_and_well_formed(finished):
  page = finished[2]
  parser = parsed(page)
  assert all(link.startswith(('data:', '#')) for link in parser.links)
  assert not re.search(r'https?://', re.sub(r'xmlns(:\w+)?="[^"]*"', '', page))
  assert '<script' not in page
  sections = {
      link[1:]
      for link in parser.links
      if link.startswith('#') and not re.match(r'#[mp][0-9a-f]', link)
  }
  assert sections <= set(parser.ids) and len(sections) == 13


def test_captions_are_escaped(finished):
  assert '&lt;b&gt;' in finished[2] and not re.search(r'<b>(zero|one|two|three)', finished[2])


def test_answer_names_both_shares(finished):
  folder, _, page = finished
  answer = re.search(r'class="answer">(.*?)</p>', page, re.S).group(1)
  assert 'On handwriting' in answer and 'base beats anchor_only' in answer
  assert 'the matched control beats anchor_only' in answer
  with open(os.path.join(folder, 'report', 'summary.txt'), encoding='utf8') as f:
    assert f.read().startswith('On handwriting')


def test_accuracies_are_the_means_of_the_results(finished):
  folder, _, page = finished
  rows = {(r['split'], r['benchmark']): r
          for r in table(folder, 'accuracy')
          if r['without_leaked'] == 'False'}
  for split in ('base', 'anchor_only', 'handwriting_pruned', 'handwriting_matched'):
    for benchmark in ('val', 'outline', 'handwriting'):
      expected = correct(folder, split, benchmark).mean()
      assert float(rows[split, benchmark]['accuracy']) == pytest.approx(expected)
      assert f'{100 * expected:.1f}' in page
      assert float(rows[split, benchmark]['low']) < expected < float(rows[split, benchmark]['high'])
  assert {r['method'] for r in rows.values()} == {'crossed'}
  assert rows['base', 'val']['samples'] == '25600' and rows['base', 'val']['anchor_rows'] == '320'


def test_splits_with_one_seed_say_so(finished):
  folder, _, page = finished
  rows = table(folder, 'accuracy_seeds_1')
  assert {r['split'] for r in rows} == {'near_75', 'far_75', 'random_75'}
  assert {r['seeds'] for r in rows} == {'1'} and 'this checkpoint' in page
  assert {r['mark'] for r in rows if r['split'] == fake_workdir.LATE} == {'not converged'}


def test_leaked_queries_are_left_out_of_the_second_column(finished):
  folder, c, _ = finished
  vectors = {
      n: np.load(f'{folder}/embeddings/{n}/00000.npy').astype(float)
      for n in ('anchor', 'handwriting')
  }
  unit = {n: x / np.linalg.norm(x, axis=1, keepdims=True) for n, x in vectors.items()}
  leaked = (unit['handwriting'] @ unit['anchor'].T).max(1) >= 1 - fake_workdir.THRESHOLD
  assert 0 < leaked.sum() < 20
  row = next(
      r for r in table(folder, 'accuracy')
      if r['split'] == 'base' and r['benchmark'] == 'handwriting' and r['without_leaked'] == 'True')
  assert int(row['images']) == (~leaked).sum()
  assert float(row['accuracy']) == pytest.approx(
      correct(folder, 'base', 'handwriting')[:, ~leaked].mean())


def test_comparisons_are_differences_on_the_same_seeds_and_images(finished):
  folder = finished[0]
  rows = {r['what']: r for r in table(folder, 'comparison_handwriting_pruned_handwriting')}
  acc = {
      s: correct(folder, s, 'handwriting').mean()
      for s in ('base', 'anchor_only', 'handwriting_pruned', 'handwriting_matched')
  }
  gap, matched, base, anchor = (
      acc[s] for s in ('handwriting_pruned', 'handwriting_matched', 'base', 'anchor_only'))
  assert float(rows['against_control']['value']) == pytest.approx(gap - matched)
  assert float(rows['against_base']['value']) == pytest.approx(gap - base)
  assert float(rows['E']['value']) == pytest.approx((base - gap) / (base - anchor))
  assert float(rows['E_control']['value']) == pytest.approx((matched - gap) / (matched - anchor))
  val = correct(folder, 'handwriting_pruned', 'val').mean() - correct(folder, 'handwriting_matched',
                                                                      'val').mean()
  assert float(rows['placebo']['value']) == pytest.approx(gap - matched - val)
  assert rows['against_control']['p_holm'] and rows['hit_minus_unhit']['value']


def test_removed_rows_and_hits_are_those_of_the_split(finished):
  folder, _, page = finished
  about = files.read_json(f'{folder}/splits/handwriting_pruned/split.json')
  assert f'{about["dropped"]} of {about["candidates"]} candidates are removed' in page
  q = about['queries']['handwriting']
  assert f'{q["hit"]} of {q["queries"]} queries' in page
  rows = table(folder, 'slack_handwriting_pruned')
  assert {r['slack']: int(r['dropped']) for r in rows}['0.0'] == about['dropped']
  words = table(folder, 'words_handwriting_pruned')
  assert words[0]['word'] == 'handwritten'


def test_duplicates_are_found_again(finished):
  folder, _, page = finished
  planted = {r['kind']: (r['planted'], r['found']) for r in table(folder, 'planted_duplicates')}
  assert planted == {'exact': ('3', '3'), 'near': ('1', '0')}
  rates = {r['benchmark']: r for r in table(folder, 'duplicate_rates')}
  assert rates['handwriting']['exact_pool'] == '1'  # the image that pool and benchmark share
  assert int(rates['handwriting']['pool']) >= 1 and rates['val']['exact_pool'] == '0'
  assert 'De-duplication marked' in page


def test_skipped_unreadable_and_replaced_are_listed(finished):
  folder, _, page = finished
  assert table(folder, 'skipped') == [{'dataset': 'pool', 'key': 'lost', 'reason': 'no caption'}, {
      'dataset': 'pool', 'key': f'pool-{fake_workdir.UNREADABLE:05d}', 'reason': 'unreadable image'
  }]
  assert 'base/seed0: 1, base/seed1: 1' in page


def test_overlap_counts_pool_rows(finished):
  folder = finished[0]
  rows = {(r['split'], r['also_in']): float(r['share']) for r in table(folder, 'overlap')}
  assert rows['near_75', 'base'] == rows['base', 'base'] == 1.0
  near, far = (np.load(f'{folder}/splits/{s}/rows.npy') for s in ('near_75', 'far_75'))
  near, far = near[near < fake_workdir.POOL_ROWS], far[far < fake_workdir.POOL_ROWS]
  assert rows['near_75', 'far_75'] == pytest.approx(len(np.intersect1d(near, far)) / len(near))
  assert not any('anchor_only' in pair for pair in rows)


def test_near_and_far_are_said_in_words_wherever_they_are_printed(finished):
  assert 'near-pruned (most similar removed)' in finished[2]
  assert 'far-pruned (most similar kept)' in finished[2]


def test_provenance(finished):
  page = finished[2]
  assert '--config=configs/fake.py' in page and 'abababababababab' in page and '0.10.2' in page
  assert '21 min 5 s' in page and '25,600 samples for every split, 64 a batch' in page


def test_figures_and_tables_are_files_too(finished):
  folder = finished[0]
  names = set(os.listdir(f'{folder}/report/figures'))
  assert {
      'answer.svg', 'comparisons.svg', 'size_handwriting.svg', 'similarity_val.svg',
      'plane_outline.svg', 'accuracy_by_similarity_val.svg', 'accuracy_by_excess_val.svg',
      'loss.svg'
  } <= names
  recorded = products.read_sidecar(folder, 'report/index')['files']
  assert {f'report/figures/{name}' for name in names} <= set(recorded)


def test_a_second_run_does_nothing_and_a_new_product_remakes_the_page(copied):
  folder, c = copied
  path = os.path.join(folder, 'report', 'index.html')
  before = os.stat(path).st_mtime_ns
  report.run(c, folder)
  assert os.stat(path).st_mtime_ns == before
  products.finish(folder, products.Product('train/other/seed0/run', {}), [])
  report.run(c, folder)
  assert os.stat(path).st_mtime_ns > before


def test_equal_results_give_equal_bytes(finished, tmp_path):
  """Drawn again in another process, from the same files."""
  folder, c, page = finished
  code = ('import sys, fake_workdir; from clip_jax.stages import report\n'
          'html, summary, _ = report.gather(fake_workdir.config(), sys.argv[1])\n'
          'open(sys.argv[2], "w", encoding="utf8").write(html)')
  out = tmp_path / 'again.html'
  path = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
  subprocess.run([sys.executable, '-c', code, folder, str(out)], check=True,
                 env={**os.environ, 'PYTHONPATH': path, 'PYTHONHASHSEED': '7'})
  assert out.read_text('utf8') == page


def test_a_control_without_donors_counts_as_random(copied):
  folder, c = copied
  path = f'{folder}/splits/handwriting_matched/split.json'
  about = files.read_json(path)
  about['draws']['rows-seed1']['no_matched_control'] = True
  files.write_json(path, about)
  html, summary, _ = report.gather(c, folder)
  assert 'no matched control exists; against random rows' in html
  assert 'the random control' in summary and 'Holm, ' not in html


def test_some_runs_missing(copied):
  folder, c = copied
  for split in ('anchor_only', 'handwriting_pruned'):
    shutil.rmtree(f'{folder}/evaluate/{split}/seed2')
  html, summary, _ = report.gather(c, folder)
  assert '2 of 15 runs are not evaluated yet: anchor_only/seed2, handwriting_pruned/seed2' in html
  assert 'handwriting_pruned/seed2' in summary and 'range of 2 seeds' in html


def test_a_source_file_that_is_gone_costs_its_images_only(copied):
  folder, c = copied
  index = files.read_json(f'{folder}/ingest/pool/files.json')
  text = json.dumps(index).replace('pool-00000.tar', 'gone-00000.tar')
  files.write_bytes(f'{folder}/ingest/pool/files.json', text.encode())
  html, _, _ = report.gather(c, folder)
  assert 'not readable' in html and html.count('data:image/png') > 10


@pytest.mark.parametrize('upto, has, lacks', [
    ('ingest', 'The pool was not searched yet.', 'data:image/png'),
    ('embed', 'Nothing', 'data:image/png'),
    ('search', 'The answer needs base, anchor-only', 'No split was evaluated yet.'),
    ('train', 'candidates are removed', 'Accuracy by similarity</h3>')])
def test_unfinished_work_directories(tmp_path, blank_figures, upto, has, lacks):
  page = built(tmp_path, upto)
  parsed(page)
  assert 'Not answered yet' in page and lacks not in page
  if has != 'Nothing':
    assert has in page


def test_missing_parts_name_the_command_that_makes_them(tmp_path, blank_figures):
  page = built(tmp_path, 'search')
  assert ('python -m clip_jax.main --config=configs/fake.py --workdir='
          f'{tmp_path}/search --stages=prune,train,evaluate,report') in page


def test_an_empty_work_directory_has_a_page(tmp_path):
  c = fake_workdir.config()
  report.run(c, str(tmp_path / 'empty'))
  assert 'Nothing was indexed yet.' in page_of(tmp_path / 'empty')
  assert '--config=CONFIG.py' in page_of(tmp_path / 'empty')


def test_an_audit_without_anchor_and_splits(tmp_path):
  page = built(tmp_path, 'search', fake_workdir.audit_config())
  assert 'an audit of the pool. It holds an image at least 0.98 similar to 0.7 % of val (95 % interval' in page
  assert 'nearest in the anchor' not in page and 'Accuracy of every split' not in page
  assert 'Without an anchor there is no similarity gap to align to' in page and 'Rows dropped' not in page
  assert page.index('id="duplicates"') < page.index('id="neighbours"')
  assert {r['rule'] for r in table(tmp_path / 'search', 'cut_by_size')} == {'near', 'far'}


def test_an_audit_with_an_anchor_says_what_each_rule_would_remove(tmp_path, blank_figures):
  c = fake_workdir.audit_config(anchor=True)
  page, folder = built(tmp_path, 'search', c), tmp_path / 'search'
  excess = np.concatenate([np.load(folder / f'search/handwriting/pool-0000{i}.npz')['excess'] for i in (0, 1)])
  keep = np.load(folder / 'dedup/keep.npy') & np.isfinite(excess)
  rows = {(r['benchmark'], r['slack']): int(r['dropped']) for r in table(folder, 'rows_by_slack')}
  assert rows['handwriting', '0.0'] == (excess[keep] > 0).sum() > 0
  assert rows['handwriting', '-0.05'] == (excess[keep] > -0.05).sum()
  assert rows['all together', '0.0'] >= max(rows[b, '0.0'] for b in c.benchmarks)
  summary = (folder / 'report/summary.txt').read_text()
  assert f'{rows["handwriting", "0.0"]} rows for handwriting' in summary and 'aligning would drop' in summary
  assert 'kept rows over a threshold: 7 of' in page
  rates = {r['benchmark']: r for r in table(folder, 'duplicate_rates')}
  low, value, high = (float(rates['val'][key]) for key in ('pool_low', 'pool_share', 'pool_high'))
  assert low < value < high and value == pytest.approx(int(rates['val']['pool']) / 300)
  assert f'{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]' in summary


def test_vectors_only_leave_out_the_pictures_and_say_so(pruned, tmp_path, monkeypatch, blank_figures):
  monkeypatch.setattr(reader.Source, 'has_images', property(
      lambda source: os.path.basename(source._directory) != 'pool'))
  shutil.copytree(pruned[0], tmp_path / 'prune')
  shutil.rmtree(tmp_path / 'prune/report')
  report.run(pruned[1], str(tmp_path / 'prune'))
  page = page_of(tmp_path / 'prune')
  assert 'data:image/png' not in page and page.count('give --config.pool.images=DIR.') == 2
  assert 'candidates are removed' in page and 'words_handwriting_pruned.csv' in os.listdir(
      tmp_path / 'prune/report/tables')
  rate = next(r for r in table(tmp_path / 'prune', 'duplicate_rates') if r['benchmark'] == 'val')
  assert rate['pool'] == '2' and rate['exact_pool'] == '' and rate['exact_anchor'] == '0'


def test_what_was_removed_needs_no_training(pruned):
  folder, c, page = pruned
  parsed(page)
  removed = page[page.index('<section id="removed">'):page.index('<section id="sensitivity">')]
  for name in c.splits:
    shown = f'<h3>{name} <small>' in removed.replace('<wbr>', '')
    assert shown == (c.splits[name].rule not in ('all', 'anchor', 'matched')), name
  strips = re.findall(r'<div class="group"><p>([^<]*)</p>(.*?)</div></div>', removed, re.S)
  counts = {}
  for title, pictures in strips:
    counts.setdefault(title, []).append(pictures.count('<img'))
  assert counts['removed, largest excess'] == [12] * 5  # three doses, the aligned one, k neighbours
  assert counts['removed, median'] == [12] * 7
  assert counts['removed, just over the cut'] == counts['kept, just under the cut'] == [12] * 5  # not k, but near
  assert counts['removed, least similar'] == [12]  # far
  assert counts['removed, evenly over the pool'] == [12] * 3  # domains, intersection, minus
  lines = re.findall(r'<small>(outline|filled|handwriting)</small>', removed)
  assert lines == ['outline'] * 12 + [x for x in lines[12:] if x != 'outline'] and len(lines) == 24
  assert 'not alignment: without rows whose domain is outline' in removed and 'outline: 206 rows.' in removed
  assert 'what handwriting_pruned and no_outline keep' in removed and 'The slack is +0.0' in removed
  assert 'Accuracy against split size' not in page and 'handwriting_pruned  117 rows' in (
      pathlib.Path(folder) / 'report/summary.txt').read_text()


def test_second_looks_are_shown_and_marked(pruned, monkeypatch, blank_figures):
  folder, c, page = pruned
  assert '<h2>Preview: ridge regression on frozen features, not CLIP training</h2>' in page
  assert len(table(folder, 'preview')) == len(c.splits) * len(c.benchmarks)
  assert table(folder, 'sensitivity')[0]['same_count_jaccard'] == '0.625'
  assert 'removed under other only' in page and 'the largest of 4 rows' in page
  assert len(table(folder, 'dedup_audit')) == 4
  monkeypatch.setattr(report_data, 'sensitivity', lambda workdir: {})
  assert 'not compared with those of other embedders yet' in report.gather(c, folder)[0]


def test_the_dose_curve_has_each_split_against_its_own_control(tmp_path, blank_figures):
  c = fake_workdir.pruning_config()
  for name in list(c.splits):
    if name not in ('base', 'anchor_only', 'handwriting_pruned', 'two_nearest') and not name.startswith('dose'):
      del c.splits[name]
  c.train.seeds = (0,)
  built(tmp_path, 'evaluate', c)
  rows = table(tmp_path / 'evaluate', 'dose')
  assert [(r['split'], r['control']) for r in rows] == [
      (f'dose_{d}', f'dose_{d}_matched') for d in (50, 100, 125)]
  assert [float(r['share']) for r in rows] == [59 / 117, 1.0, 146 / 117]
  expected = correct(tmp_path / 'evaluate', 'dose_50', 'handwriting', (0,)).mean() - correct(
      tmp_path / 'evaluate', 'dose_50_matched', 'handwriting', (0,)).mean()
  assert float(rows[0]['estimate']) == pytest.approx(expected)


def test_planted_copies_are_said_on_top(copied, monkeypatch):
  folder, c = copied
  monkeypatch.setattr(report_planted, 'planted', lambda config, workdir, found: test_planted_copies.FOUND)
  html, summary, shown = report.gather(c, folder)
  assert html.index('class="alarm"') < html.index('class="answer"') and 'planted' in [s.id for s in shown]
  assert summary.startswith('This experiment holds planted copies of test images.')


@pytest.mark.parametrize('seeds, said', [((0,), 'this checkpoint'), ((0, 1), 'range of 2 seeds')])
def test_few_seeds_claim_nothing(tmp_path, blank_figures, seeds, said):
  page = built(tmp_path, 'evaluate', fake_workdir.config(seeds))
  assert said in page and 'as a claim needs three' in page
  assert 'mattered because' not in page and 'Holm, ' not in page


def test_results_share_seeds():
  ones = np.ones((3, 4), bool)
  found = report_data.Results({('a', 'b'): ones, ('c', 'b'): ones[:2] & False},
                              {('a', 'b'): (0, 1, 2), ('c', 'b'): (2, 5)}, {}, {}, {})
  (first, second), seeds = found.on_shared_seeds(('a', 'b'), ('c', 'b'))
  assert seeds == (2,) and first.shape == second.shape == (1,
                                                           4) and first.all() and not second.any()
  assert found.on_shared_seeds(('a', 'b'), ('x', 'b')) is None
  found.seeds['c', 'b'] = (7, 8)
  assert found.on_shared_seeds(('a', 'b'), ('c', 'b')) is None


@pytest.mark.parametrize('benchmark, classes, shift', [('sketch', 1000, 'sketch'),
                                                       ('imagenet-r', 200, 'r'),
                                                       ('imagenet_v2', 1000, 'v2'),
                                                       ('sketch', 7, None),
                                                       ('handwriting', 1000, None)])
def test_robustness_lines_hold_for_the_imagenet_family_only(benchmark, classes, shift):
  c = fake_workdir.config()
  found = report_data.Results({}, {}, {'val': 1000, benchmark: classes}, {}, {})
  assert report_statistics.shift_of(c, found, benchmark) == shift
  found.classes['val'] = 10
  assert report_statistics.shift_of(c, found, benchmark) is None


def test_the_placebo_is_the_reference_else_the_benchmark_nearest_to_the_anchor():
  c = fake_workdir.config()
  found = report_data.Results(
      {('handwriting_pruned', b): np.ones((1, 2), bool) for b in c.benchmarks}, {}, {}, {}, {})
  searched = {b: {'anchor_similarity': np.full(2, t)} for b, t in (('val', 0.5), ('outline', 0.9))}
  placebo = lambda: report_statistics.placebo_benchmark(c, found, searched, 'handwriting_pruned')
  assert placebo() == 'val'
  c.report.reference = 'handwriting'  # its own: nothing to compare with
  assert placebo() == 'outline'
  del found.correct['handwriting_pruned', 'outline'], found.correct['handwriting_pruned', 'val']
  assert placebo() is None


def test_log_adds_up_the_starts_of_a_stage(tmp_path):
  (tmp_path / 'log.txt').write_text(
      ''.join(f'2025-01-01 10:00:00,000 I {line}\n' for line in (
          'clip_jax: python first', 'train took 2 h 5 min.', 'clip_jax: python second',
          'train took 30 s.', 'lunch took 1 h 0 min.')))
  log = report_data.log(str(tmp_path))
  assert log.command == 'python second' and log.stages == [{'stage': 'train', 'seconds': 7530.0}]


def test_a_dose_without_a_matched_control_stands_in_the_curve_and_equal_rows_once():
  c = fake_workdir.pruning_config()
  own = Estimate(-0.1, -0.2, -0.05, 0.02, 3.0, 0.01, 3, 100, 100, 'crossed')
  dropped = {'handwriting_pruned': 100, 'dose_50': 50, 'dose_100': 100}
  items = [{'split': name, 'control': 'some', 'control_rule': 'random', 'against_control': own} for name in dropped]
  abouts = {name: {'dropped': n, 'aligned_dropped': 100, 'slack': 0.0} for name, n in dropped.items()}
  panel, = report_panels.by_dose(c, abouts, items)
  assert [(p['split'], p['share'], p['control_rule']) for p in panel['points']] == [
      ('handwriting_pruned', 1.0, 'random'), ('dose_50', 0.5, 'random')]


def test_only_the_splits_that_answer_are_tests(monkeypatch):
  c = fake_workdir.pruning_config()
  own = Estimate(-0.1, -0.2, -0.05, 0.02, 3.0, 0.01, 3, 100, 100, 'crossed')
  monkeypatch.setattr(report_statistics, '_comparison', lambda config, workdir, found, abouts, searched, split, b: {
      'split': split, 'benchmark': b, 'control_rule': 'matched', 'against_control': own})
  found = report_data.Results({(name, 'handwriting'): np.ones((3, 2), bool) for name in c.splits}, {}, {}, {}, {})
  items = {item['split']: item for item in report_statistics.comparisons(c, '', found, {}, {})}
  assert len(items) == 5 and {item['tests'] for item in items.values()} == {1}
  assert [name for name, item in items.items() if item['answers']] == ['handwriting_pruned']
  assert [name for name, item in items.items() if item['holm'] == 0.01] == ['handwriting_pruned']
  c.splits.handwriting_pruned.slack = 0.02
  items = report_statistics.comparisons(c, '', found, {}, {})
  assert [i['split'] for i in items if i['holm'] == 0.01] == ['dose_100']  # as much as slack 0


def test_the_answer_is_made_of_what_is_aligned_at_slack_0():
  c = fake_workdir.pruning_config()
  c.splits.slack_only = defaults.split(rule='gap_aligned', benchmarks=('val',), slack=0.01)
  item = lambda split, benchmark, control: {'split': split, 'benchmark': benchmark, 'control_rule': control}
  items = [item('handwriting_pruned', 'handwriting', 'random'), item('dose_50', 'handwriting', 'matched'),
           item('dose_100', 'handwriting', 'matched'), item('two_nearest', 'handwriting', 'random'),
           item('slack_only', 'val', 'random')]
  headline = lambda items: [i['split'] for i in report_statistics.headline(c, items)]
  assert headline(items) == ['dose_100', 'slack_only']  # the one with a matched control; a slack where nothing else is
  assert headline(items[:2] + items[3:]) == ['handwriting_pruned', 'slack_only']
