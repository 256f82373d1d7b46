"""Processes of this machine."""

import os


def is_dead(pid: int) -> bool:
  """Returns whether a process of this machine has ended, even if nobody has collected it."""
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return True
  except PermissionError:  # a process of another user
    pass
  try:  # Linux: 'pid (name) state ...'; the name may hold anything
    with open(f'/proc/{pid}/stat', 'rb') as f:
      return f.read().rpartition(b')')[2].split()[0] in (b'Z', b'X')  # a zombie, or dead
  except (FileNotFoundError, ProcessLookupError, IndexError):  # it ended meanwhile, or no /proc
    return False
