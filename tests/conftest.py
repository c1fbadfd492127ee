"""For all tests: one thread. The models are tiny, and two threads wait for each other when the machine is busy."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch or numpy is imported, here and in the processes that tests start
