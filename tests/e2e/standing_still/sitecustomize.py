"""Makes a server's workers stand still now and then, immediately before they touch a file.

It is on the path of servers that a test starts. Python imports it before anything else, and the
test wakes up whoever stands still.
"""

import os
import random
import signal
import time

#: The most seconds between two times, in each worker.
_MOST = float(os.environ.get("STAND_STILL_WITHIN", "inf"))

_next = float("inf")


def _begin():
    global _next
    _next = time.monotonic() + random.uniform(0.2, 1.0) * _MOST


def _standing_still_before(call):
    def wrapper(*args, **kwargs):
        if time.monotonic() > _next:
            os.kill(os.getpid(), signal.SIGSTOP)
            _begin()
        return call(*args, **kwargs)

    return wrapper


for _name in (
    "copy_file_range",
    "ftruncate",
    "link",
    "pwrite",
    "rename",
    "replace",
    "splice",
    "unlink",
):
    setattr(os, _name, _standing_still_before(getattr(os, _name)))
# Only workers: the server itself has to start first.
os.register_at_fork(after_in_child=_begin)
