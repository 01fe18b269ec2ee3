"""Package metadata and dependency ranges. Tool settings are in pyproject.toml.

The ranges resolve on Python 3.11 (megatron-core 0.16) and on 3.12 and later (megatron-core 0.19). torch has an upper
bound at the newest version tested.
"""

from setuptools import find_packages, setup

setup(
    name="megatron-sft",
    version="0.1.0",
    description="Supervised fine-tuning on megatron-core: packed, assistant-only, from and to Hugging Face weights.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_sft", "megatron_sft.*"]),
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26,<3",
        "transformers>=5.0,<6",
        "datasets>=4.0,<6",
        "pyarrow>=18",
        "sentencepiece>=0.2,<0.3",
        "tiktoken>=0.9,<1",
        "nvidia-modelopt>=0.40,<1",
        "safetensors>=0.5,<1",
        "jinja2>=3.1,<4",
        "psutil>=5.9,<8",
        "requests>=2.31,<3",
        "tensorboard>=2.16,<3",
    ],
    extras_require={
        "test": ["pytest>=8,<10", "ruff>=0.15,<0.18", "mypy>=1.15,<3", "gguf>=0.17,<1", "matplotlib>=3.9,<4"],
        "demo": ["gguf>=0.17,<1", "matplotlib>=3.9,<4"],
        "wandb": ["wandb>=0.18,<1"],
        "te": ["transformer-engine[pytorch]>=2.5"],
    },
    entry_points={"console_scripts": ["megatron-sft=megatron_sft.__main__:run"]},
)
