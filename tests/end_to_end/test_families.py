"""Families of models from the checkpoint to the answer; `make test-families` takes all of them."""

import json

import family_suite
import pytest
import supported_models
from families import FAMILIES, ORDINARY


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    return family_suite.in_processes(tmp_path_factory.mktemp("families"), list(ORDINARY))


@pytest.mark.engine
@pytest.mark.parametrize("name", ORDINARY)
def test_a_family_is_served_as_its_reference_runs_it(results, name):
    result = results[name]
    assert "failed" not in result, result["failed"]
    assert result["same_tokens"]
    assert result["difference"] < supported_models.TOLERANCE


def test_every_family_of_the_last_run_was_right():
    found = json.loads(supported_models.RESULTS.read_text())
    assert set(found) == set(FAMILIES)
    for name, result in found.items():
        assert "failed" not in result, name
        assert result["same_tokens"], name
        assert result["difference"] < supported_models.TOLERANCE, name


def test_the_page_is_that_of_the_last_run():
    found = json.loads(supported_models.RESULTS.read_text())
    again = "run: python tests/helpers/supported_models.py --write"
    assert supported_models.PAGE.read_text() == supported_models.page(found), again
