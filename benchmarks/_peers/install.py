"""Environments of other libraries, made by uv from exact versions, once.

An environment is described by two files in `requirements/`: `name.in` is what is wanted, `name.txt`
the version of everything (`uv pip compile --universal -p 3.11 name.in -o name.txt`), given to uv as
constraints. JAX alone follows ours, so that libraries are compared and not compilers. What uv is
told by its own variables (an index, UV_TORCH_BACKEND=cpu, which saves some GB of torch's) holds.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
NAMES = ("rejax", "sb3", "envpool")
WITH_JAX = ("rejax", "sb3")
UV = "uv>=0.8,<1"
CACHE = Path.home() / ".cache" / "jaxrl-peers"


class InstallError(RuntimeError):
    """An environment could not be made; says why in one line."""


def python(name: str, folder: Path = CACHE, jax_extra: str = "") -> Path:
    """Return the interpreter that has the library `name`; makes its environment the first time.

    Args:
        name: one of NAMES.
        folder: where environments are kept, one folder for each set of versions.
        jax_extra: extra of JAX there, "cuda13" for a GPU.

    Raises:
        InstallError: it cannot be made.
    """
    wanted = (REQUIREMENTS / f"{name}.in").read_text()
    pinned = (REQUIREMENTS / f"{name}.txt").read_text()
    if name in WITH_JAX:
        version = importlib.metadata.version("jax")
        wanted += f"jax{f'[{jax_extra}]' if jax_extra else ''}=={version}\n"
        pinned = re.sub(r"(?m)^jax(lib)?==.*\n", "", pinned)
    what = f"{sys.version_info[:3]}\n{wanted}\n{pinned}"
    home = folder / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:10]}"
    found = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = home / "installed"
    if stamp.exists() and found.exists():
        return found
    print(f"installing {name} into {home} ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    uv = _uv(folder)
    _run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(home)])
    (home / "wanted.in").write_text(wanted)
    (home / "pinned.txt").write_text(pinned)
    files = ["-r", str(home / "wanted.in"), "-c", str(home / "pinned.txt")]
    _run([*uv, "pip", "install", "--quiet", "--python", str(found), *files])
    stamp.write_text(what)
    return found


def _uv(folder: Path) -> list[str]:
    """Return a command that is uv: ours, the machine's, or one installed beside the peers."""
    if importlib.util.find_spec("uv"):
        return [sys.executable, "-m", "uv"]
    if found := shutil.which("uv"):
        return [found]
    home = folder / "uv"
    interpreter = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not interpreter.exists():
        _run([sys.executable, "-m", "venv", str(home)])
    _run([str(interpreter), "-m", "pip", "install", "--quiet", UV])
    return [str(interpreter), "-m", "uv"]


def _run(command: list[str]) -> None:
    """Run a step of the installation.

    Raises:
        InstallError: it failed.
    """
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=3600, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"{' '.join(command[:4])}: {error}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise InstallError(f"{' '.join(command[-8:])} failed: {' '.join(lines[-4:])[-400:]}")
