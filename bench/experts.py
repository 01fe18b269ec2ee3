"""CPU time of a model of 32 experts, forward and backward: experts by grouped products (model/experts.py) over one after another.

python bench/experts.py [--experts 32] [--hidden 256] [--inner 128] [--tokens 1024] [--times 3]
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

SIZES = ((64, 32, 256), (256, 128, 1024))
"""hidden size, an expert's inner size, tokens."""
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def model_of(experts: int, hidden: int, inner: int) -> Any:
    """A chunk of four layers with random weights, four experts a token, fp32."""
    import torch

    from megatron_sft.config.run import ModelConfig, ParallelConfig, TrainConfig
    from megatron_sft.model.build import build_model

    sizes = dict(num_layers=4, hidden_size=hidden, ffn_hidden_size=inner, num_attention_heads=4, kv_channels=16)
    sizes |= dict(num_query_groups=2, vocab_size=1024, padded_vocab_size=1024, max_position_embeddings=1024)
    fields = {"num_moe_experts": experts, "moe_ffn_hidden_size": inner, "moe_router_topk": 4, "moe_router_dtype": "fp32"}
    chunk = build_model(ModelConfig(**sizes).with_core(fields), ParallelConfig(), TrainConfig())[0]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in chunk.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    return chunk


def measure(experts: int, hidden: int, inner: int, count: int, times: int) -> dict[str, float]:
    """Seconds of CPU of a forward and backward pass, by kind."""
    import torch
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_sft.model.attention import packed_seq_params
    from megatron_sft.model.experts import GroupedExperts

    chunk, grouped = model_of(experts, hidden, inner), GroupedExperts.forward
    tokens, labels = torch.randint(0, 1024, (2, 1, count))
    places = torch.arange(count)[None]
    packed = packed_seq_params(torch.tensor([0, count], dtype=torch.int32), count)
    seconds = {"grouped": 0.0, "loop": 0.0}
    for number in range(times + 1):  # in turn, so that other work on the machine slows both
        for name, forward in (("grouped", grouped), ("loop", SequentialMLP.forward)):
            GroupedExperts.forward = forward  # type: ignore[method-assign]
            start = time.process_time()
            chunk(tokens, places, None, labels=labels, packed_seq_params=packed).sum().backward()
            seconds[name] += (time.process_time() - start) / times if number else 0.0
    GroupedExperts.forward = grouped  # type: ignore[method-assign]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    from megatron_sft.config.run import ParallelConfig
    from megatron_sft.parallel import finalize, initialize

    initialize(ParallelConfig(), 1)
    for hidden, inner, count in SIZES:
        seconds = measure(options.experts, hidden, inner, count, options.times)
        figures = ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items())
        share = seconds["grouped"] / seconds["loop"]
        print(f"{options.experts} experts of {hidden} x {inner}, {count} tokens: {figures} of CPU, {share:.2f}x")
    finalize()


if __name__ == "__main__":
    main()
