"""Nothing of one test's models is left in megatron-core for the next test."""

import importlib.util
import sys

import pytest


@pytest.fixture(autouse=True)
def no_layers_of_other_models() -> None:
    """Empties megatron-core's tracker of balancing losses: other models of this process had other numbers of layers.

    The scale of these losses' gradients is kept too, by whoever set it first in the shape that it had there.
    """
    if "megatron.core.transformer.moe.moe_utils" not in sys.modules:
        return
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging"):  # megatron-core 0.19
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        destroy_moe_metrics_tracker()
    else:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
