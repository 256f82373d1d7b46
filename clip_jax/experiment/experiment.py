"""One experiment: a config, its work directory, and the embedder that defines similarity."""

from collections.abc import Callable
import dataclasses
import functools
import os
import threading
from typing import Any

from clip_jax.core.products import EMBEDDERS
from clip_jax.core.types import Config
from clip_jax.experiment import blocks
from clip_jax.experiment.graph import Graph

_LOCK = threading.RLock()


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """The argument of every stage.

  The products of a further embedder are in WORKDIR/embedders/<name>/, in the same folders as those
  of the main embedder.
  """

  config: Config
  workdir: str
  embedder: str = ''  # a name in config.embedders; '': the main one

  @functools.cached_property
  def graph(self) -> Graph:
    return Graph(self.config)

  def with_embedder(self, embedder: str) -> 'Experiment':
    """Returns this experiment with another embedder ('': the main one), always the same object."""
    if embedder not in self._views:
      view = Experiment(self.config, self.workdir, embedder)
      view.__dict__.update(graph=self.graph, _views=self._views)
      self._views[embedder] = view
    return self._views[embedder]

  def for_split(self, split: str) -> 'Experiment':
    """Returns this experiment with the embedder whose similarities a split reads."""
    return self.with_embedder(blocks.embedder_of(self.config, split))

  @functools.cached_property
  def _views(self) -> dict[str, 'Experiment']:
    return {self.embedder: self}

  def path(self, *parts: str) -> str:
    """Returns a path in the work directory."""
    return os.path.join(self.workdir, *parts)

  def embedder_path(self, *parts: str) -> str:
    """Returns a path in the folder of this embedder's products."""
    return self.path(*((EMBEDDERS, self.embedder) if self.embedder else ()), *parts)

  @property
  def embedder_block(self) -> Config:
    return self.graph.embedder_block(self.embedder)

  @property
  def is_shared(self) -> bool:
    """Whether other commands make parts of the same stages."""
    return self.config.engine.name == 'shared'

  @property
  def suffix(self) -> str:
    """' (<name>)' for a further embedder, to be appended to log lines; '' for the main one."""
    return f' ({self.embedder})' if self.embedder else ''

  def cached(self, name: str, build: Callable[[], Any]) -> Any:
    """Returns build(), which is called once per stage and name: for a model, or decoded images.

    Threads may call this at the same time.
    """
    with _LOCK:
      if name not in self._shared:
        self._shared[name] = build()
      return self._shared[name]

  def close(self) -> None:
    """Frees all objects of `once`. The pipeline calls it after each stage."""
    for view in self._views.values():
      view._shared.clear()

  @functools.cached_property
  def _shared(self) -> dict[str, Any]:
    return {}
