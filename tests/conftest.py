"""One thread for torch, here and in the processes that tests start: small models gain nothing from more."""

import os

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # machines are shared: no test is timed
settings.load_profile("untimed")

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def choices_as_before():
    """What a test registers is gone after it; the examples of the docs register too."""
    from secateur import allocation, feedback, patterns, regrow, schedules, scores

    registries = (
        scores.SCORES,
        allocation.ALLOCATIONS,
        patterns.PATTERNS,
        schedules.SCHEDULES,
        regrow.REGROWTHS,
        feedback.FEEDBACKS,
    )
    before = [dict(registry._choices) for registry in registries]
    yield
    for registry, choices in zip(registries, before, strict=True):
        registry._choices = choices
