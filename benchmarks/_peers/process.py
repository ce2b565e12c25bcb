"""One measurement in a process of its own, with a time limit."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class RunError(RuntimeError):
    """A process failed or took too long; says so in one line."""


def run(python: Path | str, module: str, settings: dict[str, Any], seconds: float) -> Any:
    """Run `python -m module JSON` in the repository's root; return what its last line says.

    Nothing compiled before is used: caches of compiled programs on disk are switched off.

    Raises:
        RunError: it failed, printed no JSON, or was not done after `seconds`.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("JAX_COMPILATION_CACHE_DIR", "PYTHONPATH", "PYTHONHOME")
    }
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    command = [str(python), "-m", module, json.dumps(settings)]
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            cwd=ROOT,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"not done after {seconds:.0f} s") from None
    except OSError as error:
        raise RunError(str(error)) from error
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        tail = [line.strip() for line in done.stderr.splitlines() if line.strip()][-2:]
        raise RunError(f"exit code {done.returncode}: {' '.join(tail)[-300:]}")
    try:
        return json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        raise RunError("its last line is no JSON") from None
