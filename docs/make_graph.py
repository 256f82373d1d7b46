"""Draws the graph of products of a small experiment into docs/architecture.md, with the code behind
`--graph`.

Run `python docs/make_graph.py` from the repository after a change of the graph.
"""

import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / 'docs' / 'architecture.md'
START, END = '```mermaid\n', '\n```'


def draw() -> str:
  """Returns the graph of tests/squares.py: one benchmark, two splits."""
  sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
  import squares

  from clip_jax.core.products import STAGES
  from clip_jax.experiment.experiment import Experiment
  from clip_jax.stages import plan

  with tempfile.TemporaryDirectory() as folder:
    squares.make(pathlib.Path(folder))
    x = Experiment(squares.config(folder), f'{folder}/run')
    return plan.draw_graph(x, list(STAGES))


def committed() -> str:
  return PAGE.read_text().split(START)[1].split(END)[0]


if __name__ == '__main__':
  before, rest = PAGE.read_text().split(START)
  PAGE.write_text(before + START + draw() + END + rest.split(END, 1)[1])
