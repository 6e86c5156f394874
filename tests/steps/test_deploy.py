from click.testing import CliRunner

from run import main


def test_an_image_of_a_service_that_was_never_built_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    result = CliRunner().invoke(main, ["image", "service"])
    assert result.exit_code == 1
    assert result.output == "Error: there is no Bento yet; build one with: make run\n"
