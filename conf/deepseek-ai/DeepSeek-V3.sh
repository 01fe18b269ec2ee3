#!/bin/bash
# deepseek-ai/DeepSeek-V3: deepseek-ai/DeepSeek-R1, also in how it is launched.
HF_MODEL_CKPT="${HF_MODEL_CKPT:-deepseek-ai/DeepSeek-V3}"
# shellcheck source=conf/deepseek-ai/DeepSeek-R1.sh
source "${BASH_SOURCE[0]%/*}/DeepSeek-R1.sh"
