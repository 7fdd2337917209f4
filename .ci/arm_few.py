"""What of the kernels' tests runs under an emulator, which takes twenty times as long: CASES of each test,
far apart, few examples of what hypothesis draws, and nothing of the references in torch. Loaded by .ci/arm.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import settings

CASES, EXAMPLES = 4, 5

settings.register_profile("arm", deadline=None, max_examples=EXAMPLES, derandomize=True, database=None)
settings.load_profile("arm")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each test function the first, the last, and cases at equal distances between them."""
    cases = defaultdict[str, list[pytest.Item]](list)
    for item in (i for i in items if "reference]" not in i.nodeid and "[reference" not in i.nodeid):
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = set[pytest.Item]()
    for own in cases.values():
        count = min(CASES, len(own))
        kept |= {own[round(i * (len(own) - 1) / max(1, count - 1))] for i in range(count)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
