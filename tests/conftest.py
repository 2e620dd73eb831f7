"""Settings every test shares."""

from hypothesis import HealthCheck, settings

# Machines differ: an example may be slow anywhere, and a failure must come back on the next run.
settings.register_profile(
    "ds4py",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ds4py")
