"""The two errors that the user can correct.

A message has one or two sentences: what is wrong, the value, what to do. Commands print it without
a traceback. Any other exception is a bug and keeps its traceback.
"""


class ConfigError(ValueError):
  """The command line or the config is wrong. Commands exit with status 2."""


class InputError(ValueError):
  """A file, a dataset or a work directory is invalid. Commands exit with status 1."""
