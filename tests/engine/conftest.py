import pytest

from tests.engine import tiny


@pytest.fixture
def one_rectangle():
    with tiny.one_rectangle():
        yield
