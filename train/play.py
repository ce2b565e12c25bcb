"""Show a trained policy: `python -m train.play runs/<name>`.

It is evaluated on fresh episodes, and one of them is drawn. Nothing is trained: network, normaliser
and settings come from the policy file.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jaxrl import policy, spaces
from jaxrl.checks import check_count
from train import _cli, _envs, _report


@dataclass(frozen=True)
class Options:
    """What to play, and on which episodes."""

    path: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a policy file."""
    policy: str = "best"
    """Of a run folder: "best", or the policy of one seed, e.g. seed_2."""
    episodes: int = 512
    """Episodes to evaluate on."""
    seed: int = 1
    """Decides the episodes; 0 gives those that training was evaluated on."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of the environment that differ from training's, e.g. obstacles=false."""
    out: Path | None = None
    """Animation file; by default play_<policy>_seed<seed>.gif beside the policy."""
    overwrite: bool = False
    """Replace the animation file if it exists."""
    animate: bool = True
    """Write the animation."""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and draw as the command line says; return the exit code."""
    return _cli.exit_code(lambda: prepare(sys.argv[1:] if argv is None else argv))


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Check everything that can be wrong before anything is compiled.

    Raises:
        ValueError, OSError: wrong input, in one sentence.
    """
    title = (__doc__ or "").partition(":")[0] + "."
    options = _cli.read(Options, argv, prog="python -m train.play", description=title)
    check_count("episodes", options.episodes)
    check_count("seed", options.seed, minimum=0)
    if options.episodes > _cli.MAX_EPISODES or options.seed >= 2**31:
        raise ValueError(
            f"episodes = {options.episodes} must be <= {_cli.MAX_EPISODES} and seed = "
            f"{options.seed} below 2**31"
        )
    path = policy_file(options.path, options.policy)
    saved = policy.read_policy(path)
    env_kwargs = {**saved.env_kwargs, **_cli.parse_pairs("env_kwargs", options.env_kwargs)}
    found = spaces.read(*_envs.probe(saved.env, env_kwargs))
    if found != (saved.action, saved.obs_shape):
        raise ValueError(
            f"env_kwargs = {env_kwargs} give observations of shape {found[1]}, but the policy of "
            f"{path} takes {saved.obs_shape}: leave them as in training"
        )
    folder = options.path if options.path.is_dir() else path.parent
    out = options.out or folder / f"play_{options.policy}_seed{options.seed}.gif"
    if options.animate and out.exists() and not options.overwrite:
        raise FileExistsError(f"{out} exists: choose another --out, or give --overwrite")
    if options.animate and not out.parent.is_dir():
        raise FileNotFoundError(f"out = {out}: there is no folder {out.parent}, make it first")
    setup = _envs.make_env(saved.env, **env_kwargs)
    return lambda: play(options, saved, setup, out)


def policy_file(path: Path, name: str) -> Path:
    """Return the policy file meant by a run folder (or policy file) and a name.

    Raises:
        ValueError, FileNotFoundError: there is none.
    """
    if not path.is_dir():
        if name != "best":
            raise ValueError(f"policy = {name!r} needs a run folder, but {path} is none")
        return path
    if name == "best":
        return path / "policy.msgpack"
    file = path / "policies" / f"{name}.msgpack"
    if not file.is_file():
        there = sorted(p.stem for p in path.glob("policies/*.msgpack"))
        raise FileNotFoundError(
            f"policy = {name!r} is not in {path / 'policies'}: choose best"
            + "".join(f", {name}" for name in there)
        )
    return file


def play(options: Options, saved: policy.SavedPolicy, setup: _envs.EnvSetup, out: Path) -> int:
    """Evaluate, print the table, draw."""
    console = Console()
    act = saved.act_fn()
    console.print(
        f"{saved.agent} trained on {saved.env} with seed {saved.seed}, from {options.path}",
        highlight=False,
        soft_wrap=True,
    )
    rows = _report.evaluate(
        setup, act, _report.stack([saved.policy]), options.seed, options.episodes
    )
    stats = _report.aggregate(rows, 0, setup.endings)
    title = f"{options.episodes} {setup.episodes_are}, most likely actions"
    console.print(_report.table(title, [str(saved.seed)], [stats], stats))
    _report.print_endings(console, [stats])
    if not options.animate:
        return 0
    if setup.animate is None:
        console.print(f"no animation: there is no picture of {saved.env}", highlight=False)
    else:
        shown = setup.animate(
            lambda obs: act(saved.policy, obs), options.seed, options.episodes, out
        )
        console.print(f"{out}: {shown}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
