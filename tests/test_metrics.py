"""core/metrics.py: lines in, lines out, cut back to a step."""

from clip_jax.core import metrics


def test_write_truncate_and_a_half_written_line(tmp_path):
  path = tmp_path / 'run/metrics.jsonl'
  writer = metrics.MetricsWriter(path)
  for step in (1, 2, 3):
    writer.write(step, {'train/loss': step / 2})
  assert [line['step'] for line in metrics.read(path)] == [1, 2, 3]
  with open(path, 'a') as f:
    f.write('{"step": 4, "train/lo')  # killed while writing
  assert len(metrics.read(path)) == 3
  writer.truncate(2)
  assert metrics.read(path) == [{'step': 1, 'train/loss': 0.5}, {'step': 2, 'train/loss': 1.0}]
  writer.write(3, {'train/loss': float('nan')})
  assert metrics.read(path)[-1] == {'step': 3, 'train/loss': None}


def test_truncate_without_a_file(tmp_path):
  metrics.MetricsWriter(tmp_path / 'm.jsonl').truncate(5)
  assert metrics.read(tmp_path / 'm.jsonl') == []
