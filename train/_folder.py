"""The run folder: which files are in it, who may write it, and what is cut off to go on with it."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT = "jaxrl run 1"
FILES = (
    "config.json",
    "metrics.csv",
    "evaluation_curve.csv",
    "checkpoints",
    "tensorboard",
    "learning_curve.png",
    "policies",
    "policy.msgpack",
    "evaluation.csv",
    "animation.gif",
    "summary.json",
)
GROWING = ("metrics.csv", "evaluation_curve.csv")  # what goes on where a checkpoint was


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless `folder` is free, or an earlier run that may be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} exists and is not a plain folder: choose another --name")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        read_run(folder)
    except (OSError, ValueError):
        raise FileExistsError(
            f"{folder} exists and does not hold a run: choose another --name or --runs-dir"
        ) from None
    if not overwrite:
        raise FileExistsError(
            f"run folder {folder} exists: choose another --name, or give --overwrite to replace it"
        )
    with lock(folder):  # no process is writing it
        pass


def make_folder(folder: Path) -> None:
    """Make the run folder; of an earlier run only the files that a run writes are removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder, FILES)
        (folder / "policies").mkdir()
    except OSError as error:
        raise OSError(
            f"run folder {folder} cannot be written ({error.strerror}): choose another --runs-dir"
        ) from error


def cut(folder: Path, sizes: dict[str, int]) -> None:
    """Bring a run folder back to where a checkpoint was written.

    The growing files keep their first bytes, as many as they had; what is made at the end of a run
    is removed. Config and checkpoints stay.

    Raises:
        OSError: it cannot be written.
    """
    try:
        for name in GROWING:
            if sizes.get(name, 0):
                os.truncate(folder / name, sizes[name])
        gone = [name for name in GROWING if not sizes.get(name, 0)]
        _remove(folder, [n for n in FILES if n not in ("config.json", "checkpoints", *GROWING)])
        _remove(folder, gone)
        (folder / "policies").mkdir()
    except OSError as error:
        raise OSError(f"run folder {folder} cannot be written ({error.strerror})") from error


def check_sizes(folder: Path, sizes: dict[str, int]) -> None:
    """Raise ValueError if a growing file has lost bytes that a checkpoint counts on."""
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            raise ValueError(
                f"{path} has {found} bytes, but had {size} when the checkpoint was written: rows "
                "are missing, the run cannot go on as if nothing had happened"
            )


def sync(folder: Path) -> dict[str, int]:
    """See that the growing files are on the disk; return their sizes."""
    sizes = {}
    for name in GROWING:
        path = folder / name
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                sizes[name] = os.fstat(file.fileno()).st_size
    return sizes


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the run folder: the lock is on config.json and ends with the process, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    with (folder / "config.json").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing the run in {folder}") from None
        except OSError:
            pass  # a file system without locks
        yield


def read_run(folder: Path) -> dict[str, Any]:
    """Read config.json of a run folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not that of a run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} does not hold a run: there is no {path}")
    try:
        written = json.loads(path.read_bytes())
        if written["format"] == FORMAT:
            return written
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is not that of a run of this version")


def status(folder: Path) -> str | None:
    """How the run in a folder ended: "finished", "interrupted", "diverged"; None: it did not."""
    try:
        return json.loads((folder / "summary.json").read_bytes())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a new JSON file, whole or not at all."""
    text = json.dumps(content, indent=2, allow_nan=False)
    if path.exists():
        raise FileExistsError(f"{path} exists")
    part = path.with_name(f".{path.name}.part")
    part.write_text(text + "\n")
    part.rename(path)


def _remove(folder: Path, names: Any) -> None:
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
