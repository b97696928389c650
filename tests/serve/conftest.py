"""One server, for the modules that `tests/conftest.py` keeps in one process."""

import openai
import pytest

from tests.serve.running import COMPILED, serving
from tests.serve.shallow import write_shallow


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Servers keep what they compile for those that start after them, as they do for their users."""
    folder = tmp_path_factory.mktemp("compiled")
    COMPILED.update(JAX_ENABLE_COMPILATION_CACHE="true", JAX_COMPILATION_CACHE_DIR=str(folder))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The served checkpoint."""
    return write_shallow(tmp_path_factory.mktemp("served") / "demo")


@pytest.fixture(scope="session")
def server(folder):
    with serving(str(folder), served_model_name="demo", max_waiting=4) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
