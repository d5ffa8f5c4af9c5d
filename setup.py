"""Packaging of daa_ext. The entry point is what makes stock `llamafactory-cli` know DAA."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="daa_ext",
    version="0.1.0",
    description="Dynamic Anchor Annealing for LLaMA-Factory: domain fine-tuning that keeps "
    "general ability, without general data in the mix",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["daa_ext", "daa_ext.*"]),
    package_data={"daa_ext": ["py.typed", "tasks/*.yaml"]},
    install_requires=[
        # torch 2.12 and later: torchaudio on PyPI is built for another CUDA and cannot be loaded.
        "torch>=2.6,<2.12",
        "torchvision>=0.21,<0.27",
        "torchaudio>=2.6,<2.12",
        "llamafactory>=0.9.5,<0.9.6",
        "transformers>=5.0,<=5.6.0",
        # 0.18 and older lose gradients where ZeRO-2 offloads and accumulates, with any method.
        "deepspeed>=0.19,<0.20",
        "datasets",
        "peft>=0.18,<0.19",  # OSF, for use_osft
        "pyyaml",
        "wrapt>=1.16,<3",
        "safetensors>=0.5",
        "huggingface_hub>=0.30",
        "matplotlib>=3.7",
        "rich>=13",
        "typer>=0.12",
        # daa compare and daa newsqa
        "filelock>=3.12",
        "httpx>=0.27,<1",
        "omegaconf>=2.3",
        "psutil>=5.9",
        "pydantic>=2.6,<3",
        "scikit-learn>=1.4,<2",
        "scipy>=1.11,<2",
    ],
    extras_require={
        "8bit": ["bitsandbytes>=0.45"],
        "demo": ["gguf>=0.10"],
        "eval": ["lm-eval[hf,ifeval]>=0.4.13,<0.5"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "tensorboard",
            "bitsandbytes>=0.45",  # its 8-bit AdamW has CPU kernels
            "galore-torch>=1.0",  # a baseline of examples/yaml
            "apollo-torch>=1.0",
            "lm-eval[hf]>=0.4.13,<0.5",
        ],
        "quality": ["ruff>=0.8,<1", "mypy>=1.13,<3", "types-PyYAML"],
    },
    entry_points={
        "torch.backends": ["daa_ext = daa_ext.plugin:autoload"],
        "console_scripts": ["daa = daa_ext.cli:main"],
    },
)
