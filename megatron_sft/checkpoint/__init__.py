"""Megatron's torch_dist checkpoints: saved, chosen, checked and loaded (distributed.py)."""
