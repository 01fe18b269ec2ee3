"""Operations that one Triton kernel does in one pass over memory, each beside what torch makes of it.

X.py has the operation's torch reference and the door to both; X_triton.py the kernel, imported where it is asked for alone
(`takes_triton`). Not here: which layer or loss they belong to (model/, train/).
"""

from megatron_sft.core_compat import triton_lacks
from megatron_sft.errors import ConfigError


def takes_triton(kernels: str) -> bool:
    """Whether Triton's kernels take the place of torch's operations.

    Args:
        kernels: auto, torch or triton (--kernels). auto is torch as long as no GPU has shown which one is faster.

    Raises:
        ConfigError: triton cannot run here.
    """
    if kernels != "triton":
        return False
    if lacks := triton_lacks():
        raise ConfigError([f"--kernels triton: {lacks}. Expected a CUDA device, triton and a C compiler. Pass --kernels torch."])
    return True
