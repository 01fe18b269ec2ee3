"""Weights in and out: Hugging Face folders (hf.py) and Megatron's torch_dist checkpoints (distributed.py)."""
