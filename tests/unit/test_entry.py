"""What every command line has in common."""

import warnings

import pytest

from megatron_sft import entry


@pytest.mark.parametrize("text", ["Apex is not installed. Falling back to Torch Norm", "transformer_engine is missing"])
def test_no_command_warns_of_kernels_that_nothing_here_needs(text: str) -> None:
    """megatron-core does, where it is imported."""

    def command(argv: object, world_size: int) -> int:
        warnings.warn(text, UserWarning, stacklevel=1)
        return 0

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert entry.run(command, []) == 0
    assert seen == []
