"""Rows -> messages -> tokens and masks -> packs -> batches. No Megatron, no CUDA needed."""
