"""What the tests of layouts share."""

import pytest

from tests.distributed.layout_rig import folders


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tiny models by name, as HF folders."""
    return folders(tmp_path_factory.mktemp("hf"))
