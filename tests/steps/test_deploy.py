from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from deploy.containers import images as image
from run import main


def test_an_image_of_a_service_that_was_never_built_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    result = CliRunner().invoke(main, ["image", "service"])
    assert result.exit_code == 1
    assert result.output == "Error: there is no Bento yet; make run builds one\n"


DIGEST = "host:5000/team/gpt2@sha256:" + "1" * 64


@pytest.mark.parametrize(
    ("reference", "digests", "exact"),
    [
        ("host:5000/team/gpt2:1", ["other/gpt2@sha256:" + "0" * 64, DIGEST], DIGEST),
        ("host:5000/team/gpt2:1", [], "host:5000/team/gpt2:1"),  # loaded into the nodes, never pushed
        (DIGEST, None, DIGEST),
        ("host:5000/team/gpt2:1", None, "host:5000/team/gpt2:1"),  # no engine, or one that does not know it
    ],
)
def test_an_image_is_named_by_the_digest_that_a_registry_gave_it(reference, digests, exact, monkeypatch):
    @contextmanager
    def engine():
        if digests is None:
            raise image.EngineError("no such image")
        yield SimpleNamespace(images={reference: SimpleNamespace(attrs={"RepoDigests": digests})})

    monkeypatch.setattr(image, "engine", engine)
    assert image.pinned(reference) == exact
