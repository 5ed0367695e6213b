"""`variant`: every contract that takes it runs on each configuration."""

import pytest

from contracts.variants import variants
from ncn.config.model import NCNConfig


@pytest.fixture(params=list(variants), ids=str)
def variant(request: pytest.FixtureRequest) -> NCNConfig:
    return variants[request.param]
