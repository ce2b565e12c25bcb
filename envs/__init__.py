"""The environments, pure functions on gymnax 1.0's interface. Import them as `jaxrl.envs`.

Importing this package registers them: `env, env_params = gymnax.make("MicroRacer-v0")`.
"""

if __name__ == "envs":  # reached from the repository root: be the package jaxrl.envs
    import sys

    import jaxrl.envs  # noqa: F401

    for name in [n for n in sys.modules if n.startswith("jaxrl.envs")]:
        sys.modules[name.removeprefix("jaxrl.")] = sys.modules[name]
else:
    from gymnax import registration as _registration

    from ._tracks import make_tracks as make_tracks
    from .lunar_lander import LanderEnding as LanderEnding
    from .lunar_lander import LunarLander as LunarLander
    from .lunar_lander import LunarLanderContinuous as LunarLanderContinuous
    from .mars_rover import MarsRover as MarsRover
    from .micro_racer import Ending as Ending
    from .micro_racer import MicroRacer as MicroRacer

    ENVIRONMENTS = {
        "LunarLander-v3": LunarLander,
        "LunarLanderContinuous-v3": LunarLanderContinuous,
        "MarsRover-v0": MarsRover,
        "MicroRacer-v0": MicroRacer,
    }

    for _env_id, _factory in ENVIRONMENTS.items():
        if _env_id not in _registration.registered_envs:  # also after importlib.reload
            _registration.register(_env_id, _factory)
