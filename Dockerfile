# megatron-sft on CUDA, with the commands of `megatron-sft` as its own:
#
#   docker build -t megatron-sft .
#   docker build -t megatron-sft --build-arg FLAVOUR=cudnn-devel --build-arg TRANSFORMER_ENGINE=2.9 .
#   docker run --gpus all --ipc=host -v "$PWD:/data" megatron-sft finetune Qwen/Qwen3-0.6B --finetune-hf-dataset /data/chats.jsonl
#
# torch brings its own CUDA libraries; TransformerEngine (a version, or nothing) is compiled and needs FLAVOUR=cudnn-devel.
ARG CUDA=12.9.1
ARG FLAVOUR=base
FROM nvidia/cuda:${CUDA}-${FLAVOUR}-ubuntu24.04

ARG TRANSFORMER_ENGINE=
ARG EXTRAS=wandb
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:${PATH} HF_HOME=/data/.cache/huggingface XDG_CACHE_HOME=/data/.cache PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv

WORKDIR /opt/megatron-sft
COPY setup.py pyproject.toml finetune.py generate.py ./
COPY megatron_sft megatron_sft
COPY conf conf
COPY examples/post_training examples/post_training
RUN pip install --no-cache-dir ".[${EXTRAS}]"
RUN if [ -n "${TRANSFORMER_ENGINE}" ]; then \
      pip install --no-cache-dir --no-build-isolation "transformer-engine[pytorch]==${TRANSFORMER_ENGINE}"; \
    fi

WORKDIR /data
ENTRYPOINT ["megatron-sft"]
CMD ["--help"]
