"""How much is fuzzed: a little and always the same in the suite, much and always other cases in `make fuzz`."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("fuzz", settings.get_profile("suite"), max_examples=10_000, derandomize=False)
settings.load_profile("suite")
