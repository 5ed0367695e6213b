"""The contracts: what every variant of the model must keep, and mutants that break each of them."""

import pytest

pytest.register_assert_rewrite("contracts.properties")
