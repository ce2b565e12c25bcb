"""Checkpoints: what comes back, what is kept, what is noticed, what is refused."""

import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import checkpoint
from jaxrl.checkpoint import Checkpoints, restore

ROOT = Path(__file__).parents[1]


def a_state():
    return {
        "params": (jnp.arange(6.0).reshape(2, 3), jnp.ones(3, jnp.bfloat16)),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]),
        "flag": jnp.array(True),
        "nothing": None,
        "empty": jnp.zeros((0, 3), jnp.int32),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 5),
    }


def bits(tree):
    """The bytes of every leaf: NaN and -0.0 count."""
    leaves = jax.tree.leaves(tree)
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    data = [jax.random.key_data(x) if k else x for x, k in zip(leaves, is_key, strict=True)]
    return [(str(x.dtype), np.asarray(d).tobytes()) for x, d in zip(leaves, data, strict=True)]


def test_every_bit_comes_back_and_keys_are_keys(tmp_path):
    state = a_state()
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(7, state, {"seed": 3, "rate": 0.1}, score=-1.5)
    found = restore(tmp_path / "c", jax.eval_shape(a_state))
    assert (found.step, found.metadata, found.score) == (7, {"seed": 3, "rate": 0.1}, -1.5)
    assert found.damaged == {}
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    assert bits(found.state) == bits(state)
    assert jax.random.normal(found.state["key"]) == jax.random.normal(jax.random.key(3))


def test_what_is_saved_is_the_state_before_it_was_donated(tmp_path):
    """Also where it is donated before it is saved; and nothing keeps the buffer from being used."""
    double = jax.jit(lambda x: 2.0 * x, donate_argnums=0)
    counts = np.arange(1_000_000.0, dtype=np.float32)

    def doubled(x):
        place = x.unsafe_buffer_pointer()
        after = jax.block_until_ready(double(x))
        assert x.is_deleted()  # else the program has copied it: twice the memory
        assert after.unsafe_buffer_pointer() == place  # and this has overwritten it
        return after

    x = jnp.array(counts)
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for step in range(2):  # as the scripts do
            snapshot = checkpoint.to_host({"x": x})
            x = doubled(x)
            checkpoints.save(step, snapshot)
        for step in range(2, 4):
            checkpoints.save(step, {"x": x})
            x = doubled(x)
    for step in range(4):
        found = restore(tmp_path, {"x": x}, step=step).state["x"]
        np.testing.assert_array_equal(found, counts * 2**step)
    doubled(found)  # what was read may be donated as well


def test_the_last_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, score in enumerate([0.0, 9.0, 1.0, float("nan"), 3.0]):
            checkpoints.save(step, {"x": jnp.float32(step)}, score=score)
        checkpoints.wait()
        assert checkpoint.steps(tmp_path) == [1, 3, 4]
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # another process knows the scores
        checkpoints.save(5, {"x": jnp.float32(5)}, score=9.0)
    assert checkpoint.steps(tmp_path) == [5]  # of equals the later one
    assert checkpoint.best_step(tmp_path) == 5
    assert restore(tmp_path, {"x": jnp.float32(0)}).state["x"] == 5.0


def test_leftovers_of_a_killed_process_are_swept_away(tmp_path):
    (tmp_path / "4.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (tmp_path / f"3{checkpoint.REMOVED}").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoint.steps(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        restore(tmp_path, {})
    with Checkpoints(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Steps 1 and 2; the second one is damaged by the tests, and mended."""
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": jnp.arange(1000.0) + step, "y": jnp.ones(3)}, {"s": step})
    return folder


def files_with_checksums(folder):
    content = json.loads((folder / "2" / checkpoint.MANIFEST).read_text())["content"]
    return [folder / "2" / name for name in [*content["files"], checkpoint.MANIFEST]]


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_any_damaged_file_is_named_and_the_checkpoint_before_is_used(two, damage):
    template = {"x": jnp.zeros(1000), "y": jnp.zeros(3)}
    files = files_with_checksums(two)
    assert len(files) > 5
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2
        try:
            if damage == "gone":
                path.unlink()
            elif damage == "cut":
                path.write_bytes(whole[:middle])
            else:
                path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
            found = restore(two, template)
            assert (found.step, found.metadata) == (1, {"s": 1})
            assert found.state["x"][0] == 1.0
            assert str(path) in found.damaged[2]
            with pytest.raises(checkpoint.DamagedError, match=path.name):
                restore(two, template, step=2)
        finally:
            path.write_bytes(whole)
    assert restore(two, template).step == 2


def test_nothing_whole_is_said_with_every_reason(tmp_path):
    for step in (1, 2):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / checkpoint.MANIFEST).write_text("{}" if step == 1 else "[" * 10_000)
    with pytest.raises(checkpoint.DamagedError, match=r"no checkpoint in .* is whole: .*/2/.*/1/"):
        restore(tmp_path, {})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"x": (1000,)}, r"holds \['y'\], float32\[3\], which is not here"),
        ({"x": (1000,), "y": (3,), "z": (1,)}, r"has no \['z'\], which is float32\[1\] here"),
        ({"x": (999,), "y": (3,)}, r"\['x'\] is float32\[1000\] there and float32\[999\] here"),
    ],
)
def test_another_tree_is_refused_by_leaf_and_both_shapes(two, template, words):
    with pytest.raises(ValueError, match=words):
        restore(two, {name: jnp.zeros(shape) for name, shape in template.items()})


def test_another_type_is_refused(two):
    with pytest.raises(ValueError, match=r"\['y'\] is float32\[3\] there and key<fry>\[3\] here"):
        restore(two, {"x": jnp.zeros(1000), "y": jax.random.split(jax.random.key(0), 3)})


def test_wrong_arguments_are_refused(two, tmp_path):
    with pytest.raises(ValueError, match="keep = 0"):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(two) as checkpoints:
        with pytest.raises(ValueError, match="step = 2 is already in"):
            checkpoints.save(2, {})
        with pytest.raises(ValueError, match="step = -1"):
            checkpoints.save(-1, {})
        with pytest.raises(ValueError, match="not JSON compliant"):
            checkpoints.save(3, {"x": jnp.zeros(1)}, {"loss": float("nan")})
    assert checkpoint.steps(two) == [1, 2]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file cannot be written \(File exists\)"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 9"):
        restore(two, {}, step=9)


def too_big(folder):
    """Save a small state, then one that does not fit, then a small one; say what happened."""
    small, big = {"x": jnp.ones(10)}, {"x": np.random.default_rng(0).random(500_000)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, small)
        checkpoints.wait()
        if os.environ.get("FILE_LIMIT"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            checkpoints.save(2, big)
            checkpoints.wait()
        except OSError as error:
            print(error)
        print(checkpoint.steps(folder))
        checkpoints.save(3, small)
    print(checkpoint.steps(folder), restore(folder, small).step)


@pytest.mark.parametrize("full", ["file size limit", "disk"])
def test_a_full_disk_is_said_and_costs_nothing_already_saved(full, tmp_path):
    code = f"from tests.test_checkpoint import too_big; too_big({str(tmp_path / 'c')!r})"
    command = [sys.executable, "-c", code]
    environment = dict(os.environ)
    if full == "disk":  # a file system of 1 MB, for this process alone
        mount = f"mount -t tmpfs -o size=1m none {tmp_path}"
        alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        try:
            subprocess.run([*alone, mount], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no file system can be mounted here without privileges")
        command = [*alone, f'{mount} && exec "$0" "$@"', *command]
    else:
        environment["FILE_LIMIT"] = "1"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, check=True, capture_output=True
    )
    error, after, last = done.stdout.splitlines()
    reason = "No space left on device" if full == "disk" else "File too large"
    assert f"the checkpoint of step 2 could not be written to {tmp_path / 'c'} ({reason})" in error
    assert "the earlier ones are kept" in error
    assert (after, last) == ("[1]", "[1, 3] 3")
    assert "Traceback" not in done.stderr


class Trap:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["TRAP"]),)


def test_reading_executes_nothing_from_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    bomb = pickle.dumps(Trap())
    pickle.loads(bomb)
    assert (tmp_path / "sprung").exists()  # that is what a pickle could do
    (tmp_path / "sprung").unlink()
    state = {"x": jnp.arange(10.0)}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state)
    unpickled = []
    sys.addaudithook(lambda event, _: unpickled.append(event) if "pickle" in event else None)
    restore(tmp_path / "c", state)
    # every file replaced by a pickle, with checksums that fit
    manifest = tmp_path / "c" / "1" / checkpoint.MANIFEST
    content = json.loads(manifest.read_text())["content"]
    for name in content["files"]:
        (manifest.parent / name).write_bytes(bomb)
        content["files"][name] = [len(bomb), hashlib.sha256(bomb).hexdigest()]
    written = {"content": content, "sha256": checkpoint._digest(content)}
    manifest.write_text(json.dumps(written))
    with pytest.raises(checkpoint.DamagedError, match="cannot be read"):
        restore(tmp_path / "c", state)
    assert not unpickled
    assert not (tmp_path / "sprung").exists()
