"""`make chaos`: inject faults into real runs; print per fault what was injected, observed and lost.

Each fault has a fresh store, except that a rerun continues in the store of the previous run. The exit status is the
number of faults that lost something, or whose error message lacks required information.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from gpt2core.files import directory_sha256
from tests.helpers import flip_bit

ROOT = Path(__file__).parent.parent
RUN = ("run.py", "finetune", "--config", "configs/dev.yaml")
LIMIT = 600  # seconds for one command


class Store:
    """A fresh home for ZenML, BentoML and outputs/, and commands that run in it; their output is in the file log."""

    def __init__(self, directory: Path, settings: Sequence[str] = (), **environment: str) -> None:
        """
        Args:
            settings: further arguments of the runs.
            environment: further variables.
        """
        self.directory, self.command = directory, (*RUN, *settings)
        self.outputs, self.zenml, self.bentos = (directory / name for name in ("outputs", "zenml", "bentoml"))
        (directory / "tmp").mkdir(parents=True)
        self.environment = os.environ | {
            "ZENML_CONFIG_PATH": str(self.zenml),
            "ZENML_REPOSITORY_PATH": str(directory / "repository"),
            "ZENML_CUSTOM_SOURCE_ROOT": str(ROOT),
            "ZENML_ANALYTICS_OPT_IN": "false",
            "BENTOML_HOME": str(self.bentos),
            "BENTOML_DO_NOT_TRACK": "true",
            "GPT2_INSTRUCT_OUTPUTS": str(self.outputs),
            "TMPDIR": str(directory / "tmp"),
            **environment,
        }

    def start(self, *command: str, prepare: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *(command or self.command)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=prepare,
        )

    def run(self, *command: str, prepare: Callable[[], None] | None = None) -> tuple[int, str]:
        """Exit status, and the error message (else the last line) of the output."""
        process = self.start(*command, prepare=prepare)
        output = process.communicate(timeout=LIMIT)[0].strip()
        with (self.directory / "log").open("a") as log:
            log.write(output + "\n")
        message = output[output.rfind("Error: ") :] if "Error: " in output else output.rpartition("\n")[2]
        return process.returncode, " ".join(message.split())

    def adapter(self) -> str:
        return directory_sha256(self.outputs / "latest" / "adapter")


@click.command()
@click.option("--kills", default=5, show_default=True, help="Moments of kill -9, evenly over a run.")
def main(kills: int) -> None:
    with TemporaryDirectory(prefix="chaos-") as temporary:
        directory = Path(temporary)
        whole = Store(directory / "whole")
        begin = time.monotonic()
        status, message = whole.run()
        if status != 0:
            raise click.ClickException(f"the run without a fault failed: {message}")
        seconds, adapter = time.monotonic() - begin, whole.adapter()
        print(f"no fault | completed in {seconds:.0f} s | adapter {adapter[:12]}", flush=True)
        failed = sum(
            [
                *(kill(Store(directory / f"kill-{i}"), seconds * (i + 1) / (kills + 1), adapter) for i in range(kills)),
                _stop(Store(directory / "stop"), seconds / 2, adapter),
                _full_disk(Store(directory / "disk"), adapter),
                _flipped_bits_in_stores(whole, adapter),
                _flipped_bit_in_outputs(whole),
                _damaged_database(whole),
            ]
        )
        click.echo(f"{failed} faults failed; {time.monotonic() - begin:.0f} s")
    sys.exit(failed)


def kill(store: Store, moment: float, adapter: str) -> bool:
    process = store.start()
    time.sleep(moment)
    process.kill()
    process.communicate(timeout=LIMIT)
    observed = "killed" if process.returncode == -signal.SIGKILL else "MISSED: the run had ended before"
    return _rerun(store, f"kill -9 after {moment:.0f} s", observed, adapter)


def _stop(store: Store, moment: float, adapter: str) -> bool:
    process = store.start()
    time.sleep(moment)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=LIMIT)[0].strip()
    observed = f"ended in {time.monotonic() - begin:.1f} s: {output.rpartition(chr(10))[2]}"
    return _rerun(store, f"SIGTERM after {moment:.0f} s", observed, adapter)


def _full_disk(store: Store, adapter: str) -> bool:
    """Simulate a full disk by a file size limit of 2 MB, which is less than the base but more than ZenML's database."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    status, message = store.run(prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**6, limit)))
    unnamed = status == 0 or not ("bytes" in message and "/" in message)
    return _rerun(store, "file size limit of 2 MB", message + " (UNNAMED)" * unnamed, adapter) or unnamed


def _flipped_bits_in_stores(store: Store, adapter: str) -> bool:
    """Flip one bit in ZenML's copy of the adapter, and one in the Bento's copy of the base: the rerun rebuilds both."""
    [artifact] = store.zenml.glob("local_stores/*/finetune/adapter/*/*/data.tar.gz")
    [model] = store.bentos.glob("models/gpt2-instruct-base/*/model.safetensors")
    flip_bit(artifact)
    flip_bit(model)
    lost = _rerun(store, "one bit flipped in the cached adapter and in the Bento's base", "detected", adapter)
    status, message = store.run("run.py", "verify", str(store.outputs / "latest"))
    return _report("the same, verified afterwards", message, status != 0) or lost


def _flipped_bit_in_outputs(store: Store) -> bool:
    flip_bit(store.outputs / "latest" / "adapter" / "adapter.safetensors")
    found = [store.run("run.py", *words) for words in (("verify", str(store.outputs / "latest")), ("ask", "Hello?"))]
    lost = any(status == 0 for status, _ in found)
    return _report("one bit flipped in the adapter in outputs/", " / ".join(message for _, message in found), lost)


def _damaged_database(store: Store) -> bool:
    [database] = store.zenml.rglob("zenml.db")
    database.write_bytes(b"not a database" * 1000)
    status, message = store.run()
    return _report("ZenML's database overwritten", message, status == 0 or "database" not in message)


def _rerun(store: Store, injected: str, observed: str, adapter: str) -> bool:
    """Run again; something is lost unless the adapter has the same bytes as without a fault."""
    status, message = store.run()
    lost = status != 0 or store.adapter() != adapter
    return _report(injected, f"{observed}; rerun: {'completed' if status == 0 else message}", lost)


def _report(injected: str, observed: str, lost: bool) -> bool:
    print(f"{injected} | {observed} | {'LOST' if lost else 'nothing lost'}", flush=True)
    return lost


if __name__ == "__main__":
    main()
