"""Fixtures: a tiny model and its data, made once, and stock LLaMA-Factory in this process."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
os.environ.setdefault("MPLBACKEND", "agg")

from pathlib import Path

import pytest
from host import Host
from tiny import make_data, make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def host(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> Host:
    return Host(tmp_path, tiny_model, tiny_data)
