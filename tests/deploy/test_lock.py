"""The lock of deployments, with a double of the engine; tests/deploy/test_docker_target.py has a real one."""

import threading
from io import BytesIO
from types import SimpleNamespace

import pytest
from docker.errors import APIError, NotFound
from requests import Response

from deploy.containers import lock
from deploy.containers.client import EngineError
from deploy.containers.lock import engine_lock
from tests.helpers import wait_until


class Engine:
    """Keeps containers by name; each is created, then running until it is removed."""

    def __init__(self):
        self.named = {}
        self.containers = self
        self.api = SimpleNamespace(attach_socket=lambda *_, **__: BytesIO())

    def create(self, image, name, **options):
        if name in self.named:
            conflict = Response()
            conflict.status_code = 409
            raise APIError("in use", conflict)
        container = SimpleNamespace(id=str(len(self.named)), status="created")
        container.start = lambda: setattr(container, "status", "running")
        container.remove = lambda force=False: self.named.pop(name)
        return self.named.setdefault(name, container)

    def get(self, name):
        if name not in self.named:
            raise NotFound("none")
        return self.named[name]


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(lock, "POLL", 0.01)
    monkeypatch.setattr(lock, "CREATED_TIMEOUT", 0)
    return Engine()


def test_one_holder_waits_for_the_other(engine, caplog):
    caplog.set_level("INFO")
    order = []

    def second():
        with engine_lock(engine, "a-lock", "image"):
            order.append("second")

    with engine_lock(engine, "a-lock", "image"), engine_lock(engine, "b-lock", "image"):
        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: "waiting for another" in caplog.text, 60, "the second to wait")
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert "waiting for another deployment, which holds the lock a-lock" in caplog.text
    assert engine.named == {}


def test_the_lock_is_released_after_an_error(engine):
    with pytest.raises(ValueError, match="failed"), engine_lock(engine, "a-lock", "image"):
        raise ValueError("failed")
    assert engine.named == {}


@pytest.mark.parametrize("status", ["exited", "dead", "created"])
def test_the_lock_of_a_killed_process_is_taken_over(engine, status):
    engine.create("image", "a-lock").status = status
    with engine_lock(engine, "a-lock", "image"):
        assert engine.named["a-lock"].status == "running"


def test_a_lock_that_is_not_released_is_named_in_the_error(engine, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_TIMEOUT", 0)
    with (
        engine_lock(engine, "a-lock", "image"),
        pytest.raises(EngineError, match="another deployment holds the lock a-lock"),
    ):
        engine_lock(engine, "a-lock", "image").__enter__()
