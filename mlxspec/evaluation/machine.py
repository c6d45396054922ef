"""What figures were measured on, and the energy they took where the platform tells it."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxspec import __version__

RAPL = Path("/sys/class/powercap")  # Linux: microjoules of each processor package, usually readable by root only


def machine() -> dict[str, Any]:
    """Chip, memory, versions and the git revision of a checkout."""
    info = mx.device_info()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "chip": info.get("device_name") or platform.processor(),
        "device": str(mx.default_device().type).removeprefix("DeviceType."),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "mlx_lm": version("mlx-lm"),
        "mlxspec": __version__,
        "revision": git_revision(),
    }


def git_revision() -> str | None:
    """Of the checkout that this package is run from, with a + if files were changed; None if it is none."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def joules(folder: Path = RAPL) -> float | None:
    """The processors' energy counter; None where there is none that may be read, as on macOS without root."""
    packages = [path for path in folder.glob("*:*") if path.name.count(":") == 1]
    try:
        return sum(int((path / "energy_uj").read_text()) for path in packages) / 1e6 if packages else None
    except (OSError, ValueError):
        return None
