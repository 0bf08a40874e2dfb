"""Checks shared by the tests of commands tell what differs, as those in test files do."""

import pytest

pytest.register_assert_rewrite("quantized_output")
