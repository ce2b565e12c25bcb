"""The built wheel: one name in site-packages, the environments inside, and it works elsewhere."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel as a release makes it: from the sdist."""
    builder = pytest.importorskip("hatchling.build", reason="hatchling is not installed")
    del builder
    out = tmp_path_factory.mktemp("dist")
    build = (
        "import sys, tarfile, os, pathlib, hatchling.build as b; out = sys.argv[1];"
        "sdist = b.build_sdist(out);"
        "tarfile.open(pathlib.Path(out, sdist)).extractall(out, filter='data');"
        "os.chdir(pathlib.Path(out, sdist.removesuffix('.tar.gz'))); print(b.build_wheel(out))"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return out / done.stdout.strip().splitlines()[-1]


def test_wheel_holds_jaxrl_alone_with_the_environments_inside(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info" not in n.split("/")[0]}
    assert tops == {"jaxrl"}
    sources = {
        "jaxrl/" + str(p.relative_to(ROOT))
        for p in (ROOT / "envs").rglob("*.py")
        if "__pycache__" not in p.parts
    } | {
        str(p.relative_to(ROOT))
        for p in (ROOT / "jaxrl").rglob("*.py")
        if (ROOT / "jaxrl" / "envs") not in p.parents
    }
    assert {n for n in names if n.endswith(".py")} == sources
    assert "jaxrl/py.typed" in names


def test_wheel_imports_from_another_folder(wheel, tmp_path):
    """From the unpacked wheel and nothing else of the project."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p != sys.argv[2]];"
        "sys.path.insert(0, sys.argv[1]); import jaxrl.envs, gymnax; print(jaxrl.envs.__file__);"
        "print(type(gymnax.make('MicroRacer-v0', num_tracks=1)[0]).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), str(ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, name = done.stdout.split()
    assert where.startswith(str(tmp_path))
    assert name == "MicroRacer"
