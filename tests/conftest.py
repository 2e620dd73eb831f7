"""Settings every test shares."""

import os
import signal

from hypothesis import HealthCheck, settings

# The matrices are small: BLAS threads would spin, waiting for one another, on processors that other
# processes of the tests want. Read when numpy is loaded; golden/test_threads.py has several.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A shell without job control starts what it puts into the background with Ctrl-C ignored, nohup
# with the end of its terminal ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Machines differ: an example may be slow anywhere, and a failure must come back on the next run.
settings.register_profile(
    "ds4py",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ds4py")
