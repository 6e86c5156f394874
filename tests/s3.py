"""An S3 server on this machine, by moto, and ZenML stacks that use it as artifact store."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import ThreadedMotoServer
from zenml.client import Client
from zenml.enums import StackComponentType

CREDENTIALS = {"key": "anybody", "secret": "anything"}


@contextmanager
def serve_s3(bucket: str) -> Iterator[str]:
    """The URL of an S3 server with one bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        _client(url).create_bucket(Bucket=bucket)
        yield url
    finally:
        server.stop()


def keys(url: str, bucket: str) -> list[str]:
    """The keys of all objects in the bucket."""
    return [found["Key"] for found in _client(url).list_objects_v2(Bucket=bucket).get("Contents", [])]


def _client(url: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=CREDENTIALS["key"],
        aws_secret_access_key=CREDENTIALS["secret"],
    )


def register_stack(name: str, path: str, url: str) -> None:
    """Register and activate a stack that runs locally and stores artifacts in S3."""
    configuration = {"path": path, **CREDENTIALS, "client_kwargs": {"endpoint_url": url, "region_name": "us-east-1"}}
    client = Client()
    store = client.create_stack_component(name, "s3", StackComponentType.ARTIFACT_STORE, configuration)
    client.create_stack(name, {StackComponentType.ORCHESTRATOR: "default", StackComponentType.ARTIFACT_STORE: store.id})
    client.activate_stack(name)
