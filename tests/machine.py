"""python tests/machine.py ...: a command as on a machine of its own, whose leases end in seconds.

MACHINE is its name. IN_USE: seconds for which files of a full mirror stay.
"""

import os
import socket
import sys

from absl import app

from clip_jax import main
from clip_jax.core import command, folders, leases

if __name__ == '__main__':
  socket.gethostname = lambda: os.environ['MACHINE']
  leases.TTL_SECS, leases.BEAT_SECS = 12.0, 2.0
  folders._IN_USE_SECS = float(os.environ.get('IN_USE', folders._IN_USE_SECS))
  sys.exit(app.run(main.main, flags_parser=command.parse_flags))
