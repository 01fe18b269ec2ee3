#!/bin/bash
# Qwen/Qwen3-14B-Base: Qwen/Qwen3-14B, also in how it is launched, but for the longest position.
HF_MODEL_CKPT="${HF_MODEL_CKPT:-Qwen/Qwen3-14B-Base}"
# shellcheck source=conf/Qwen/Qwen3-14B.sh
source "${BASH_SOURCE[0]%/*}/Qwen3-14B.sh"
MODEL_ARGS+=(--max-position-embeddings 32768)
