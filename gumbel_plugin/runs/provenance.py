"""What a result came from: versions, git revision, machine, time."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from typing import Any

import torch

from gumbel_plugin.storage.versions import library_versions

__all__ = ["git_revision", "library_versions", "machine", "provenance"]


def provenance() -> dict[str, Any]:
    """Return everything of this module that a run's summary notes."""
    return {
        "versions": library_versions(),
        "git": git_revision(),
        "machine": machine(),
        "finished": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def git_revision() -> str | None:
    """Return the current folder's git revision, marked if files differ from it; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine() -> str:
    """Return what latencies were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} CPU threads, {device}"
