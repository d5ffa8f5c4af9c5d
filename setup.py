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
    package_data={"daa_ext": ["py.typed"]},
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
        "pyyaml",
        "wrapt>=1.16,<3",
        "safetensors>=0.5",
        "huggingface_hub>=0.30",
        "matplotlib>=3.7",
        "rich>=13",
        "typer>=0.12",
    ],
    extras_require={
        "8bit": ["bitsandbytes>=0.45"],
        "demo": ["gguf>=0.10"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "psutil",
            "hypothesis>=6.100",
            "tensorboard",
            "bitsandbytes>=0.45",  # its 8-bit AdamW has CPU kernels
            "galore-torch>=1.0",  # a baseline of examples/yaml
        ],
        "quality": ["ruff>=0.8,<1", "mypy>=1.13,<3", "types-PyYAML"],
    },
    entry_points={
        "torch.backends": ["daa_ext = daa_ext.plugin:autoload"],
        "console_scripts": ["daa = daa_ext.cli:main"],
    },
)
