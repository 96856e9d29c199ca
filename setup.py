"""Packaging metadata; tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="hpdm",
    version="0.1.0",
    description="Hierarchical Patch Diffusion Models for video, as a library of fused Triton kernels",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hpdm", "hpdm.*", "hpdm_kernels", "hpdm_kernels.*"]),
    package_data={"hpdm": ["py.typed", "weights/*.safetensors"], "hpdm_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "einops",  # readable reshapes between videos, patches and tokens
        "numpy",
        "decord",  # the first video decoder: fast seeking, decodes a clip at a time
        "av>=18",  # decodes every file once, and most of them always; the only writer of mp4
        "safetensors",  # weights in a format that cannot run code and is mapped, not read
        "tqdm",  # progress bars with rate and ETA
        "tyro",  # the command line, made from typed dataclasses
        "pillow",  # contact sheets as PNG
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-benchmark",
            "hypothesis",  # inputs that nobody thought of, for what reads strangers' files, made small where one fails
            "pytest-xdist",  # tests on both cores: the interpreter and the compiler are slow
            "ruff",
            "mypy",
            "matplotlib",
            "tensorboard",
            "transformers>=4.56",  # tests encode captions with a tiny T5 of random weights
        ],
        "bench-video": [
            # Peers in the benchmark of reading. decord2, another one, has decord's module name and cannot be beside it.
            "torchcodec",  # the PyPI build needs a CUDA build of torch of a version that it was made for
        ],
        "plots": ["matplotlib"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],  # `--log wandb`, curves of a group's runs in one place
        "t2v": [
            "transformers>=4.56",  # the T5 text encoder; `dtype` is an argument since then
            "sentencepiece",  # tokenizers of the original T5 models, which are spiece.model files
            "protobuf",  # with which transformers reads these
        ],
    },
    entry_points={"console_scripts": ["hpdm = hpdm.cli:main"]},
)
