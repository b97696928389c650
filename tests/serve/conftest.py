"""One server with the embedded demo model, for the modules that `tests/conftest.py` keeps in one process."""

import openai
import pytest

from tests.serve.running import serving


@pytest.fixture(scope="session")
def server():
    with serving(max_waiting=4) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
