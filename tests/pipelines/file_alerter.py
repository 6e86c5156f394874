"""An alerter of a stack that appends its messages to a file."""

from pathlib import Path

from zenml.alerter.base_alerter import BaseAlerter, BaseAlerterConfig, BaseAlerterFlavor


class FileAlerterConfig(BaseAlerterConfig):
    file: str


class FileAlerter(BaseAlerter):
    def post(self, message, params=None) -> bool:
        with Path(self.config.file).open("a") as stream:
            stream.write(message + "\n")
        return True


class FileAlerterFlavor(BaseAlerterFlavor):
    name = "file"
    config_class = FileAlerterConfig
    implementation_class = FileAlerter
