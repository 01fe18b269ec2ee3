"""Order of the tests: the longest file first, so that two processes finish together."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "test_smollm2" not in item.nodeid)
