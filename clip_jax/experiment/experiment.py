"""One experiment: a config, its work directory, and the embedder through which similarity is
seen.
"""

from collections.abc import Callable
import dataclasses
import functools
import os
from typing import Any

from clip_jax.core.products import EMBEDDERS
from clip_jax.core.types import Config
from clip_jax.experiment.graph import Graph


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """What every stage gets. embedder: one of config.embedders, '' for the main one.

  The products of a further embedder lie in WORKDIR/embedders/<name>/, laid out as those of the main
  one.
  """

  config: Config
  workdir: str
  embedder: str = ''

  @functools.cached_property
  def graph(self) -> Graph:
    return Graph(self.config)

  def under(self, embedder: str) -> 'Experiment':
    """Returns the experiment as another embedder sees it, the same object each time; '' for the
    main one.
    """
    if embedder not in self._views:
      view = Experiment(self.config, self.workdir, embedder)
      view.__dict__.update(graph=self.graph, _views=self._views)
      self._views[embedder] = view
    return self._views[embedder]

  @functools.cached_property
  def _views(self) -> dict[str, 'Experiment']:
    return {self.embedder: self}

  def path(self, *parts: str) -> str:
    """Returns a path in the work directory."""
    return os.path.join(self.workdir, *parts)

  def home(self, *parts: str) -> str:
    """Returns a path among the products of this embedder."""
    return self.path(*((EMBEDDERS, self.embedder) if self.embedder else ()), *parts)

  @property
  def embedder_block(self) -> Config:
    return self.graph.embedder_block(self.embedder)

  @property
  def suffix(self) -> str:
    """' (<name>)' of a further embedder, for what a stage prints."""
    return f' ({self.embedder})' if self.embedder else ''

  def once(self, name: str, build: Callable[[], Any]) -> Any:
    """Returns what `build` returns, built once a stage: a model, decoded images, what several
    products share.
    """
    if name not in self._shared:
      self._shared[name] = build()
    return self._shared[name]

  def close(self) -> None:
    """Drops what `once` keeps.

    The pipeline calls it after each stage, so that memory is free for the next.
    """
    for view in self._views.values():
      view._shared.clear()

  @functools.cached_property
  def _shared(self) -> dict[str, Any]:
    return {}
