"""The two ways in which a run ends for a reason that is the user's to mend.

Each message is one or two sentences: what is wrong, the value got, what to do. Commands print it
without a traceback; any other exception is a bug and keeps its traceback.
"""


class ConfigError(ValueError):
  """The command line or the config is wrong. Commands exit with status 2."""


class InputError(ValueError):
  """A file, a dataset or a work directory is not as it must be. Commands exit with status 1."""
