"""No file that is read is executed: what a stranger's run folder holds is data or is refused.

Of checkpoints: `test_checkpoint.py`.
"""

import ast
import io
import os
import pickle
import sys
from pathlib import Path

import gymnax
import jax
import msgpack
import numpy as np
import pytest

from jaxrl import policy, spaces
from jaxrl.agents import ppo
from train import _cost, _folder, _sweep, play, sweep
from train import cost as cost_script
from train import ppo as ppo_script

ROOT = Path(__file__).parents[1]
SERIALISERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}


class Trap:
    """What a pickle may do when it is read: here, make a file."""

    def __reduce__(self):
        return Path.touch, (Path(os.environ["TRAP"]),)


unpickled = []
sys.addaudithook(lambda event, _: unpickled.append(event) if "pickle" in event else None)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A pickle that is known to act; afterwards it has not, and none was even looked at."""
    sprung = tmp_path / "sprung"
    monkeypatch.setenv("TRAP", str(sprung))
    bomb = pickle.dumps(Trap())
    pickle.loads(bomb)
    assert sprung.exists()
    assert "pickle.find_class" in unpickled
    sprung.unlink()
    unpickled.clear()
    yield bomb
    assert not sprung.exists()
    assert not unpickled


def numpy_file(save, **names):
    file = io.BytesIO()
    save(file, *([] if names else [np.array([Trap()])]), **names)
    return file.getvalue()


CONTENTS = {
    "pickle": lambda bomb: bomb,
    "npy of objects": lambda bomb: numpy_file(lambda f, a: np.save(f, a, allow_pickle=True)),
    "npz of objects": lambda bomb: numpy_file(np.savez, a=np.array([Trap()])),
    "msgpack": lambda bomb: msgpack.packb(msgpack.ExtType(1, bomb)),
}
READERS = {
    "policy.msgpack": (policy.read_policy, "is not a policy file"),
    "config.json": (lambda path: _folder.read_run(path.parent), "is not that of a run"),
    "chunk.json": (lambda path: _sweep.read_finished(path.parent), "is damaged"),
    "calibration.json": (_cost.read_calibration, "is no calibration"),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", READERS)
def test_a_pickle_under_any_name_is_refused(name, content, trap, tmp_path):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / name
    path.write_bytes(CONTENTS[content](trap))
    unpickled.clear()
    read, words = READERS[name]
    with pytest.raises(ValueError, match=f"{name} {words}"):
        read(path)


@pytest.mark.parametrize("content", CONTENTS)
def test_the_scripts_refuse_such_files_in_one_line(content, trap, tmp_path, capsys):
    bad = CONTENTS[content](trap)
    unpickled.clear()
    for name in ("policy.msgpack", "config.json", "summary.json", "sweep.json"):
        (tmp_path / name).write_bytes(bad)
    folder = str(tmp_path)
    assert play.main([folder]) == 2
    assert "is not a policy file" in capsys.readouterr().err
    assert ppo_script.main(["--resume", folder]) == 2
    assert "is not that of a run" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="does not hold a sweep"):
        sweep.open_folder(tmp_path, {}, False)
    assert _folder.status(tmp_path) is None
    assert cost_script.main(["--run", folder, "--model-card", str(tmp_path / "card.md")]) == 2
    assert "summary.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def saved():
    """A policy, untrained."""
    env, params = gymnax.make("Pendulum-v1")
    config = ppo.Config(num_envs=2, num_steps=4, total_steps=8, num_minibatches=1, hidden=(4,))
    state = jax.jit(ppo.make_train(config, env, params).init)(jax.random.key(0))
    action, shape = spaces.read(env, params)
    return policy.SavedPolicy(
        "ppo", config, action, shape, "Pendulum-v1", {}, 0, ppo.get_policy(state)
    )


def test_a_policy_with_something_else_among_its_numbers_is_refused(saved, trap, tmp_path):
    """Every kind of msgpack extension that flax knows, and some that it does not."""
    policy.save_policy(tmp_path / "whole", saved)
    policy.read_policy(tmp_path / "whole")  # as it is, it can be read

    def packed(value):
        """The file with `value` in the place of one array."""
        arrays = msgpack.unpackb((tmp_path / "whole").read_bytes(), strict_map_key=False)
        assert "log_std" in arrays["params"]["params"]
        arrays["params"]["params"]["log_std"] = value
        return msgpack.packb(arrays)

    objects = msgpack.packb(((1,), "object", trap))  # shape, type and bytes, as flax has them
    values = [trap, "cos\nsystem\n", *(msgpack.ExtType(code, trap) for code in (*range(6), 127))]
    values += [msgpack.ExtType(code, objects) for code in (1, 3)]
    for i, value in enumerate(values):
        path = tmp_path / f"{i}.msgpack"
        path.write_bytes(packed(value))
        with pytest.raises(ValueError, match=rf"{i}.msgpack(: .* holds no numbers| is not a pol)"):
            policy.read_policy(path)


def modules():
    folders = ("jaxrl", "envs", "train", "benchmarks")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_module_reads_what_can_execute():
    """Neither unpickling nor evaluation of text, in anything that is installed or run."""
    paths = modules()
    assert len(paths) > 60
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & SERIALISERS, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in SERIALISERS, where
            elif isinstance(node, ast.Call):
                name = getattr(node.func, "id", None)
                assert name not in {"eval", "exec", "__import__"}, where
                asked = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert asked.get("allow_pickle", False) is False, where
