"""What the tests of a GPU share."""

import pytest

from megatron_sft import parallel
from megatron_sft.config.run import ParallelConfig


@pytest.fixture(scope="module")
def ranks():
    yield parallel.initialize(ParallelConfig(), 1)
    parallel.finalize()
