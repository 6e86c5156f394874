import pytest
from click.testing import CliRunner

import steps.outputs
from run import main
from steps.deploy import rollback


def test_there_is_nothing_to_take_back_before_anything_was_deployed():
    with pytest.raises(RuntimeError, match="no run has deployed anything yet"):
        rollback()


def test_an_image_of_a_service_that_was_never_built_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.outputs, "OUTPUTS", tmp_path)
    result = CliRunner().invoke(main, ["image", "service"])
    assert result.exit_code == 1
    assert result.output == "Error: there is no Bento yet; make run builds one\n"
