#!/usr/bin/env python3
"""Set up everything and run the project: Python 3.11+ and git are all it needs.

    python3 dev.py train [options of train.ppo]     set up, train racers, show the result
    python3 dev.py test  [options of pytest]        set up, run the tests
    python3 dev.py test-all [options of pytest]     the same with the slow ones
    python3 dev.py check                            set up, lint, check formatting and types
    python3 dev.py setup                            only set up
    python3 dev.py run COMMAND ...                  run a command inside the environment

Setting up means: a virtual environment in .venv with exactly the packages of uv.lock. It is skipped
while .venv matches uv.lock and pyproject.toml, so an installed machine needs no network.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "jaxrl-setup"  # written last: what this environment was made from
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
UV = "uv>=0.8,<1"


def main(argv: list[str]) -> int:
    """Run one of the commands above; return its exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036  (this file must be able to say so)
        return fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    command, *rest = argv or ["help"]
    commands = {
        "train": lambda: run("python", "-m", "train.ppo", *rest),
        "test": lambda: test("-m", "not slow", *rest),
        "test-all": lambda: test(*rest),
        "check": check,
        "setup": lambda: 0,
        "run": lambda: run(*rest) if rest else fail("run needs a command"),
    }
    if command not in commands:
        print(__doc__)
        return 0 if command in ("help", "-h", "--help") else 2
    return setup() or commands[command]()


def setup() -> int:
    """Make .venv what uv.lock says; nothing happens if it already is."""
    # the version of Python as well: a new one needs new wheels
    inputs = [(ROOT / name).read_bytes() for name in ("uv.lock", "pyproject.toml")]
    lock = hashlib.sha256(b"\0".join(inputs)).hexdigest()
    interpreter = f"{sys.version} {os.path.realpath(sys.executable)}"
    wanted = f"{lock}\n{interpreter}\n"
    found = STAMP.read_text() if STAMP.is_file() else ""
    if found == wanted or (sys.prefix == str(VENV) and found.startswith(lock)):
        return 0
    print("Setting up .venv (once; the packages take about 1 GB) ...", flush=True)
    STAMP.unlink(missing_ok=True)
    try:
        # another Python: its packages would be the old one's
        other = bool(found) and not found.endswith(f"{interpreter}\n")
        clear = other or not Path(python()).exists()
        venv.create(VENV, with_pip=True, clear=clear, symlinks=os.name != "nt")
    except subprocess.CalledProcessError:
        return fail("venv cannot install pip: on Debian and Ubuntu, apt install python3-venv")
    steps = [
        [python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV],
        # --inexact keeps uv itself, which the lock does not name
        [python(), "-m", "uv", "sync", "--locked", "--inexact", "--quiet", "--active"],
    ]
    environment = {**os.environ, "VIRTUAL_ENV": str(VENV)}
    for step in steps:
        code = subprocess.run(step, cwd=ROOT, env=environment, check=False).returncode
        if code:
            return fail(f"setting up failed ({' '.join(step[1:])}); is there a network?")
    STAMP.write_text(wanted)
    return 0


def test(*options: str) -> int:
    """Run the tests, two files at a time (-n 0: one by one)."""
    return run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *options)


def check() -> int:
    """Lint, formatting, types: all of them, then the worst exit code."""
    return max(
        run("ruff", "check", "."),
        run("ruff", "format", "--check", "."),
        run("basedpyright", "--level", "error"),
    )


def run(program: str, *arguments: str) -> int:
    """Run a program of the environment in the repository root; its exit code."""
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "VIRTUAL_ENV": str(VENV), "PATH": path}
    executable = BIN / program if (BIN / program).exists() else program
    process = subprocess.Popen([executable, *arguments], cwd=ROOT, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the program has had it too: let it save what it has
            continue


def python() -> str:
    """The environment's interpreter."""
    return str(BIN / "python")


def fail(why: str) -> int:
    """Say why, in one line."""
    print(f"dev.py: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
