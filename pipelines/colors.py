"""Whether ZenML's log is colored."""

import os
import sys


def set_colors() -> None:
    """Disable ZenML's colors in files and pipes, and with NO_COLOR. ZenML reads this when it sets up its log."""
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        os.environ.setdefault("ZENML_LOGGING_COLORS_DISABLED", "true")
