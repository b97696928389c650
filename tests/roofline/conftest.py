from pathlib import Path

import pytest

from jaxinfer.model.families import read_config

MODELS = Path(__file__).parents[2] / "configs" / "models"


@pytest.fixture(scope="session")
def published():
    """Reads a model of configs/models by its name."""
    return lambda name: read_config(MODELS / name)
