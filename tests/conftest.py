"""One thread for torch, here and in the processes that tests start: small models gain nothing from more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
