"""Before any test is imported: no compiler on a CPU, and Triton interpreted there. Order of the tests: the longest file first, so
that two processes finish together."""

import pytest

import tests.triton_kernels  # noqa: F401 # before anything imports triton


def pytest_sessionstart() -> None:
    from megatron_sft.core_compat import leave_out_compiler

    leave_out_compiler()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "test_smollm2" not in item.nodeid)
