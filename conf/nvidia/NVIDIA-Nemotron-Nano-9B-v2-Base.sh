#!/bin/bash
# nvidia/NVIDIA-Nemotron-Nano-9B-v2-Base: nvidia/NVIDIA-Nemotron-Nano-9B-v2, also in how it is launched.
HF_MODEL_CKPT="${HF_MODEL_CKPT:-nvidia/NVIDIA-Nemotron-Nano-9B-v2-Base}"
# shellcheck source=conf/nvidia/NVIDIA-Nemotron-Nano-9B-v2.sh
source "${BASH_SOURCE[0]%/*}/NVIDIA-Nemotron-Nano-9B-v2.sh"
