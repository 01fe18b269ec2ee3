"""What stands between megatron-core, torch and us gives what they give."""

import importlib

import torch
from torch.nn.attention import varlen

from megatron_sft.core_compat import fuse_gradient_norm, varlen_attention


def test_gradient_norm_and_clipping_are_megatron_cores_in_fp32():
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    importlib.reload(clip_grads)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((300, 7), (65,), (1,))]
    cpu = [g.clone() for g in gradients]
    local_multi_tensor_scale(0, None, [cpu, cpu], 0.3)
    expected = torch.norm(torch.tensor([float(torch.norm(g)) for g in gradients]))
    assert clip_grads.l2_norm_impl is local_multi_tensor_l2_norm
    fuse_gradient_norm()
    norm, _ = clip_grads.l2_norm_impl(0, None, [gradients], False)
    assert norm.shape == (1,) and norm.dtype == torch.float32 and norm[0] == expected
    clip_grads.multi_tensor_scale_impl(0, None, [gradients, gradients], 0.3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, cpu, strict=True))
    fuse_gradient_norm()  # a second time changes nothing
    narrow = [g.to(torch.bfloat16) for g in cpu]
    exact = torch.norm(torch.stack([g.double().norm() for g in narrow]))
    assert abs(float(clip_grads.l2_norm_impl(0, None, [narrow], False)[0]) / float(exact) - 1) < 1e-6


def test_varlen_attention_asks_for_grouped_queries_where_torch_wants_to_be_asked(monkeypatch):
    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        return "2.11"

    def of_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return enable_gqa

    for function, answer in ((of_2_11, "2.11"), (of_2_12, True)):
        monkeypatch.setattr(varlen, "varlen_attn", function)
        assert varlen_attention()(0, 1, 2, 3, 4, 5, 6, scale=None, window_size=(-1, 0)) == answer
