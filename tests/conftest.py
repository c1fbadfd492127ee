"""For all tests: one thread, and a Ctrl-C that arrives.

The models are tiny, and two threads wait for each other when the machine is busy. A shell that starts the tests in the
background has them ignore Ctrl-C, and so would the processes that tests start and interrupt.
"""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch or numpy is imported, here and in the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
