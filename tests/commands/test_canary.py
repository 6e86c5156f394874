"""`python run.py canary` against a running service, its rule, and `python run.py adapters`."""

import json
import shutil
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from click.testing import CliRunner

from bentos.schemas import AdapterVersion, CanaryArm, CanaryRequest, CanaryStatus, ShadowStatus
from commands.canary import decide, describe
from gpt2core.files import directory_sha256
from run import main
from tests.bentos.client import predict, served
from tests.helpers import build_bento, free_port, wait_until


def run(*words: str):
    return CliRunner().invoke(main, list(words))


@pytest.mark.slow
def test_a_canary_is_started_promoted_and_aborted(base_dir, adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_ADMIN_TOKEN", "admin")
    shutil.copytree(adapter_dir, tmp_path / "v2")
    with served(build_bento(base_dir, adapter_dir), GPT2_ADMIN_TOKEN="admin", GPT2_ADAPTERS_DIR=tmp_path) as url:

        def canary(*words: str) -> str:
            result = run("canary", *words, "--url", url)
            assert result.exit_code == 0, result.output
            return result.output

        assert canary("status") == "no canary\n"
        assert "0% of the requests go to v2" in canary("start", "v2", "--path", "v2", "--share", "0")
        assert "in shadow mode" in canary("start", "v2", "--share", "1", "--shadow")
        assert predict(url, instruction="Hello.").json()["adapter"]["name"] == "gpt2-instruct"
        wait_until(lambda: "1 answers compared: 1 agree, token F1 1.000" in canary("status"), 60, "a comparison")
        assert "start it without --shadow" in run("canary", "decide", "--url", url).output
        assert "0% of the requests go to v2\n" in canary("start", "v2", "--share", "0")
        assert canary("decide").startswith("wait: one of the versions has had no request yet")
        assert "100% of the requests go to v2" in canary("promote")
        assert predict(url, instruction="Hello.").json()["adapter"]["name"] == "v2"
        assert "1 completed, 0 failed" in canary("status")
        assert canary("abort") == "no canary\n"
        assert predict(url, instruction="Hello.", adapter="v2").status_code == 404
        for words, message in [(("promote",), "has no canary"), (("start", "v3"), "'v3' is not loaded")]:
            result = run("canary", *words, "--url", url)
            assert result.exit_code == 1
            assert message in result.output
            assert len(result.output.splitlines()) == 1


def test_versions_without_completions_have_no_means():
    arm = CanaryArm(adapter=AdapterVersion(name="v2", sha256="a" * 64), failed=1)
    shadow = ShadowStatus(dropped=2)
    canary = CanaryRequest(adapter="v2", share=0.5, shadow=True)
    assert describe(CanaryStatus(canary=canary, versions=[arm], shadow=shadow)).splitlines()[1:] == [
        "v2 (aaaaaaaaaaaaaaaa): 0 completed, 1 failed",
        "0 answers compared; 2 requests dropped",
    ]


def test_the_token_reaches_a_service_on_this_machine_in_spite_of_netrc_and_proxy(tmp_path, monkeypatch):
    class Admin(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Authorization"] == "Bearer admin"
            body = b'{"canary": null, "versions": [], "shadow": null}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *values): ...

    (tmp_path / "netrc").write_text("default login alice password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("GPT2_ADMIN_TOKEN", "admin")
    with HTTPServer(("127.0.0.1", 0), Admin) as server:
        Thread(target=server.handle_request).start()
        result = run("canary", "status", "--url", f"http://127.0.0.1:{server.server_port}")
    assert result.output == "no canary\n"


@pytest.mark.parametrize("body", [b'{"detail": "Not Found"}', b'"no"', b"<html>"])
@pytest.mark.parametrize("status", [200, 404])
def test_another_server_is_an_error_of_one_line(body, status):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *values):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        Thread(target=server.handle_request).start()
        result = run("canary", "status", "--url", f"http://127.0.0.1:{server.server_port}")
    assert result.exit_code == 1
    assert "is not this service" in result.output
    assert len(result.output.splitlines()) == 1


def arm(completed: int, failed: int, mean: float = 1.0, variance: float = 0.04) -> CanaryArm:
    adapter = AdapterVersion(name="v", sha256="0" * 64)
    return CanaryArm(adapter=adapter, completed=completed, failed=failed, mean_seconds=mean, variance=variance)


@pytest.mark.parametrize(
    ("stable", "new", "verdict"),
    [
        (arm(5000, 0), arm(2000, 0), "promote"),
        (arm(5000, 0), arm(100, 0), "wait"),  # up to 3.7 % of failures are possible
        (arm(5000, 0), arm(10, 10), "abort"),
        (arm(5000, 0), arm(2000, 0, mean=1.5), "abort"),
        (arm(5000, 0), arm(2000, 0, mean=1.2), "wait"),  # 20 % slower is the limit
        (arm(5000, 50), arm(2000, 20), "promote"),
        (arm(29, 0), arm(29, 0), "wait"),
        (arm(5000, 0), arm(0, 0), "wait"),
    ],
)
def test_the_rule_decides_only_when_the_intervals_are_narrow_enough(stable, new, verdict):
    status = CanaryStatus(canary=CanaryRequest(adapter="v2", share=0.1), versions=[stable, new], shadow=None)
    assert decide(status, 0.01, 0.2)[0] == verdict


def test_adapters_writes_the_manifest(tmp_path, adapter_dir):
    shutil.copytree(adapter_dir, tmp_path / "v2")
    result = run("adapters", str(tmp_path), "formal=v2", "--canary", "formal=0.1")
    digest = directory_sha256(tmp_path / "v2")
    assert result.output == f"formal: {digest}\n"
    assert json.loads((tmp_path / "adapters.json").read_text()) == {
        "adapters": {"formal": {"path": "v2", "sha256": digest}},
        "canary": {"adapter": "formal", "share": 0.1, "shadow": False},
    }
    (tmp_path / "link").symlink_to(adapter_dir)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for path in (str(adapter_dir), "link", "other", "."):
        assert run("adapters", str(tmp_path), f"formal={path}").exit_code == 1, path
    for words in (["formal=v3"], ["formal"], ["formal=v2", "--canary", "formal=2"], ["formal=v2", "--canary", "x"]):
        result = run("adapters", str(tmp_path), *words)
        assert result.exit_code in (1, 2)
        assert "Traceback" not in result.output


@pytest.mark.parametrize("option", ["--share", "--max-failures", "--max-slowdown"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_limit_that_is_not_a_finite_number_from_0_is_refused(option, value):
    result = run("canary", "decide", option, value)
    assert result.exit_code == 2
    assert f"'{option}': {float(value)} is not" in result.output
