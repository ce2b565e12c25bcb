"""Several processes that are one run (`jax.distributed`): started, agreed with, lost.

Every process runs the same script with the same options and keeps its own devices busy; the first
one alone writes the run folder. What decides where the run goes (a signal, a file that is refused)
must be known to all of them, else they wait for each other: `from_first` and `vote`.

A process that is lost takes the others with it: a collective operation fails, or JAX ends the
process itself, without Python. Either way the last thing on stderr is a sentence on what happened
and what to do: a small helper process watches for the end and says it.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    from train._cli import Options

JOIN_S = 300  # for all processes to come
HEARTBEAT_S = 40  # after which one that is silent is lost
SHUTDOWN_S = 120  # at the end, for the others to come to theirs
FAILED = 1
# of errors that mean: another process is not there any more
LOST = re.compile(
    r"gloo|nccl|coordination|heartbeat|barrier|connection (closed|reset)|socket closed"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED",
    re.IGNORECASE,
)
# says the last line it was given when its input ends, unless that was the word for a good end
WATCHER = """
import sys
last = ""
for line in sys.stdin:
    last = line
if last != "done\\n":
    sys.stderr.write(last)
"""


def check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Raise ValueError unless these three are given together and can be meant."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return
    if coordinator is None or num_processes is None or process_id is None:
        there = next(f"{n} = {v!r}" for n, v in given.items() if v is not None)
        raise ValueError(
            f"{there} needs {' and '.join(missing)} as well: processes that are started by hand "
            "are told all three"
        )
    if not re.fullmatch(r"\[?[\w.:-]+\]?:[0-9]{1,5}", coordinator):
        raise ValueError(
            f"coordinator = {coordinator!r} must be HOST:PORT, a free port of the machine on "
            "which process 0 runs"
        )
    if num_processes < 2:
        raise ValueError(f"num_processes = {num_processes} must be an integer >= 2")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id = {process_id} must be from 0 to num_processes - 1 = {num_processes - 1}"
        )


@dataclass
class Processes:
    """The processes of a run, seen from one of them."""

    watcher: "subprocess.Popen[str] | None" = None  # None where the process is alone
    remedy: str = ""
    _vote: Callable[[jax.Array], jax.Array] | None = field(default=None, repr=False)

    @property
    def alone(self) -> bool:
        """Whether this is the only one."""
        return self.watcher is None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes the run folder."""
        return self.alone or jax.process_index() == 0

    @property
    def name(self) -> str:
        """Which this is, for people."""
        return f"process {jax.process_index()} of {jax.process_count()}"

    def say_how_to_go_on(self, remedy: str) -> None:
        """Set what the last sentence advises."""
        self.remedy = remedy
        self.last_words(
            f"error: {self.name} was killed, or ended because it lost another one. {remedy}"
        )

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return what `make` returns in the first process (anything JSON takes), to all.

        Raises:
            ValueError, OSError: of `make`, in all processes.
        """
        if self.alone:
            return make()
        text, error = b"", None
        if self.is_first:
            try:
                text = json.dumps([None, make()]).encode()
            except (ValueError, OSError) as e:
                error = e
                text = json.dumps([str(e), None]).encode()
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
        data = np.frombuffer(text.ljust(size, b" "), np.uint8)
        data = np.asarray(multihost_utils.broadcast_one_to_all(data))
        refused, content = json.loads(data.tobytes())
        if error is not None:
            raise error
        if refused is not None:
            raise ValueError(refused)
        return content

    def vote(self, code: int) -> jax.Array | None:
        """Begin to find the highest `code` of all processes; None where this is the only one."""
        if self.alone:
            return None
        mesh = Mesh(np.array(jax.devices()), ("all",))
        sharding = NamedSharding(mesh, P("all"))
        if self._vote is None:
            everywhere = NamedSharding(mesh, P())
            self._vote = jax.jit(lambda codes: codes.max(), out_shardings=everywhere)
        codes = np.full(jax.device_count(), code, np.int32)  # of which each process gives its own
        return self._vote(jax.make_array_from_callback(codes.shape, sharding, lambda i: codes[i]))

    @contextlib.contextmanager
    def guarded(self, refusals: bool = False) -> Iterator[None]:
        """Turn the loss of another process into one sentence; end at once, without waiting for it.

        An error of this process alone ends it at once as well: the others then lose it. With
        `refusals` a ValueError or OSError is wrong input, of which all processes hear.
        """
        try:
            yield
        except Exception as error:
            if self.alone:
                raise
            text = " ".join(str(error).split())
            if isinstance(error, ValueError | OSError | jax.errors.JaxRuntimeError) and (
                LOST.search(text)
            ):
                reason = text if len(text) < 200 else f"{text[:200]} ..."
                print(
                    f"error: {self.name} has lost another one ({reason}). {self.remedy}",
                    file=sys.stderr,
                )
            elif refusals and isinstance(error, ValueError | OSError):
                self.close()
                raise
            else:
                traceback.print_exc()
            self.leave(FAILED)

    def leave(self, code: int) -> int:
        """End this process with `code`, while the others may be anywhere; alone, return it."""
        if self.alone:
            return code
        self.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no handler at exit that waits for processes that do not come

    def finish(self) -> None:
        """Wait for the others to come to their end, too."""
        if self.alone:
            return
        jax.distributed.shutdown()
        self.close()

    def last_words(self, line: str) -> None:
        """Set what the watcher says if this process ends without a word of its own."""
        pipe = None if self.watcher is None else self.watcher.stdin
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(OSError):  # it has been killed: nothing depends on it
                pipe.write(line.replace("\n", " ") + "\n")
                pipe.flush()

    def close(self) -> None:
        """Let the watcher go: there is nothing for it to say."""
        self.last_words("done")
        if self.watcher is not None and self.watcher.stdin is not None:
            with contextlib.suppress(OSError):
                self.watcher.stdin.close()
            self.watcher.wait()


def start(options: "Options") -> Processes:
    """Join the other processes, if there are to be others; before JAX computes anything.

    Where they do not all come JAX ends the process: the watcher says so.

    Raises:
        ValueError: JAX cannot tell who they are.
    """
    if options.coordinator is None and options.distributed is None:
        return Processes()
    told: dict[str, Any] = {}
    if options.coordinator is not None:
        told = {
            "coordinator_address": options.coordinator,
            "num_processes": options.num_processes,
            "process_id": options.process_id,
        }
        what = f"coordinator = {options.coordinator}, process_id = {options.process_id}"
    else:
        what = f"distributed = {options.distributed!r}"
        if options.distributed != "auto":
            told = {"cluster_detection_method": options.distributed}
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WATCHER],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the run
    )
    processes = Processes(watcher)
    processes.last_words(
        f"error: {what}: the processes did not all come within {JOIN_S} s, or one cannot be "
        "reached. Start all of them, with the same coordinator."
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jax.distributed.initialize(
                **told,
                initialization_timeout=JOIN_S,
                heartbeat_timeout_seconds=HEARTBEAT_S,
                shutdown_timeout_seconds=SHUTDOWN_S,
            )
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        processes.close()
        remedy = "give --coordinator, --num-processes and --process-id"
        if options.distributed is None:
            remedy = "start all processes, with the same coordinator"
        raise ValueError(
            f"{what}: JAX cannot join the other processes ({type(error).__name__}: {error}): "
            f"{remedy}"
        ) from error
    processes.say_how_to_go_on("Start all processes again.")
    return processes
