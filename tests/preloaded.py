"""What nearly every process of the tests imports; tests/gloo.py forks them from one that has imported this."""

import torch.distributed.checkpoint
import torch.utils.tensorboard  # noqa: F401
import transformers.modeling_utils  # noqa: F401

from megatron_sft.core_compat import leave_out_compiler, silence_missing_kernels

silence_missing_kernels()
leave_out_compiler()

import megatron_sft.tasks.evaluation  # noqa: E402
import megatron_sft.train.setup  # noqa: E402

megatron_sft.config.arguments.flag_table()
