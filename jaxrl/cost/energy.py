"""Energy of a piece of work: counters where there are any, else a labelled estimate, else None.

    with EnergyMeter() as meter:
        state = train(key)
        meter.wait_for(state)  # JAX returns before the work is done
    meter.energy.J, meter.energy.method

- CPU and memory: the kernel's RAPL counters (/sys/class/powercap), of the whole machine.
- GPU: NVML's energy counter (`pip install jaxrl[energy]`), of the whole board.
- A CPU without a readable counter (every virtual machine): core-seconds of this process times watts
  per core, given as a range. That is a guess within a factor of two or three and says so.
- What nobody knows is None, never 0, and a total with an unknown part is None.

Nothing here uses the network or looks up where you are: grams of CO2e need an intensity.
"""

import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax

from jaxrl.checks import check_real

POWERCAP = Path("/sys/class/powercap")
REMEDY = "sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj"
WATTS_PER_CORE = 10.0  # of a server's or laptop's core at work; from one to another it lies in
WATTS_PER_CORE_RANGE = (4.0, 20.0)
WORLD_G_PER_KWH = 475.0  # gCO2e of a kWh of electricity, world average of 2018 (IEA)
J_PER_KWH = 3.6e6
SHORT_S = 1.0  # NVML's counter moves every 20 to 100 ms
SAMPLE_S = 30.0  # a RAPL counter of 65 kJ wraps after 130 s at 500 W


@dataclass(frozen=True)
class Reading:
    """Energy of one part of the machine."""

    part: str  # "CPU package-0", "GPU 0", ...
    J: float | None  # None: not known
    method: str  # "measured (...)", "estimated (...)" or "not available (...)"
    low_J: float | None = None  # of an estimate
    high_J: float | None = None

    @property
    def is_measured(self) -> bool:
        """Whether a counter was read."""
        return self.method.startswith("measured")

    def plus(self, later: "Reading") -> "Reading":
        """The sum of two readings of one part by one method; unknown where either is."""

        def total(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else a + b

        return Reading(
            self.part,
            total(self.J, later.J),
            self.method,
            total(self.low_J, later.low_J),
            total(self.high_J, later.high_J),
        )


@dataclass(frozen=True)
class Energy:
    """Energy of one window of time, by part, and what to know about it."""

    seconds: float
    readings: tuple[Reading, ...]
    notes: tuple[str, ...] = ()

    @property
    def J(self) -> float | None:
        """The sum of all parts, two digits where one is estimated; None if one is unknown."""
        return self._total("J")

    @property
    def low_J(self) -> float | None:
        """The sum with the lower ends of estimates."""
        return self._total("low_J")

    @property
    def high_J(self) -> float | None:
        """The sum with the upper ends of estimates."""
        return self._total("high_J")

    @property
    def kWh(self) -> float | None:
        """J in kWh."""
        return None if self.J is None else self.J / J_PER_KWH

    @property
    def is_measured(self) -> bool:
        """Whether every part has a counter that was read."""
        return bool(self.readings) and all(r.is_measured for r in self.readings)

    @property
    def method(self) -> str:
        """How each part is known, each way once."""
        methods = dict.fromkeys(r.method for r in self.readings)
        return " + ".join(methods) if methods else "not available"

    def __add__(self, later: "Energy") -> "Energy":
        """This window and a later one as one; what is known of the parts in two ways stays two."""
        parts: dict[tuple[str, str], Reading] = {}
        for r in (*self.readings, *later.readings):
            before = parts.get((r.part, r.method))
            parts[r.part, r.method] = r if before is None else before.plus(r)
        notes = tuple(dict.fromkeys((*self.notes, *later.notes)))
        return Energy(self.seconds + later.seconds, tuple(parts.values()), notes)

    def _total(self, end: str) -> float | None:
        values = [r.J if (v := getattr(r, end)) is None else v for r in self.readings]
        known = [v for v in values if v is not None]
        if not known or len(known) < len(values):
            return None
        return math.fsum(known) if self.is_measured else two_digits(math.fsum(known))

    def columns(
        self, env_steps: int | None = None, g_per_kwh: float | None = None
    ) -> dict[str, Any]:
        """Everything as columns of a table, unit and method in sight.

        Args:
            env_steps: environment steps of the window, for J_per_1M_steps.
            g_per_kwh: intensity of the electricity, for grams of CO2e.
        """

        def per_million(J: float | None) -> float | None:
            if J is None or not env_steps:
                return None
            return J * 1e6 / env_steps if self.is_measured else two_digits(J * 1e6 / env_steps)

        columns: dict[str, Any] = {
            "energy_J": self.J,
            "energy_low_J": self.low_J,
            "energy_high_J": self.high_J,
            "energy_kWh": self.kWh,
            "J_per_1M_steps": per_million(self.J),
            "J_per_1M_steps_low": per_million(self.low_J),
            "J_per_1M_steps_high": per_million(self.high_J),
            "energy_method": self.method,
            "energy_notes": list(self.notes),
        }
        if g_per_kwh is not None:
            ends = {"gCO2e": self.J, "gCO2e_low": self.low_J, "gCO2e_high": self.high_J}
            for name, J in ends.items():
                grams = gCO2e(J, g_per_kwh)
                if grams is not None and not self.is_measured:
                    grams = two_digits(grams)
                columns[name] = grams
            columns["gCO2e_method"] = f"energy_J ({self.method}) x {g_per_kwh:g} g/kWh"
        return columns


def two_digits(x: float) -> float:
    """Round to two significant digits: an estimate has no more."""
    return float(f"{x:.1e}")


def gCO2e(J: float | None, g_per_kwh: float = WORLD_G_PER_KWH) -> float | None:
    """Grams of CO2 equivalent of an energy; None of None.

    Raises:
        ValueError: the intensity is negative or not finite.
    """
    check_real("g_per_kwh", g_per_kwh, 0.0, math.inf)
    return None if J is None else J / J_PER_KWH * g_per_kwh


class Counters(Protocol):
    """A source of energy readings; `zeus_counters` makes one of another library."""

    def start(self) -> None:
        """Begin a window."""
        ...

    def read(self) -> tuple[list[Reading], list[str]]:
        """Return the readings since the start, and what to know about them."""
        ...


class EnergyMeter:
    """Context manager that measures the energy between its beginning and its end.

    `wait_for(arrays)` waits for the device; call it at the end of the block with what was computed,
    and give `EnergyMeter(ready=arrays)` what is still being computed at its beginning. Compile
    before, or the compiler's energy is in it.

    Args:
        ready: arrays to wait for before the window begins.
        powercap: folder of the kernel's power zones.
        nvml: the module `pynvml` or one like it; None: import it if JAX runs on a GPU.
        devices: JAX devices in use; None: all of them.
        watts_per_core: for the estimate where there is no counter; a value of your own has no
            range. None: no estimate.
        counters: other sources to use instead, e.g. `[zeus_counters()]`.
    """

    def __init__(
        self,
        ready: Any = None,
        *,
        powercap: Path = POWERCAP,
        nvml: Any = None,
        devices: Sequence[Any] | None = None,
        watts_per_core: float | None = WATTS_PER_CORE,
        counters: Sequence[Counters] | None = None,
    ):
        if watts_per_core is not None:
            check_real("watts_per_core", watts_per_core, 0.0, math.inf, above=True)
        self._ready = ready
        if counters is None:
            devices = jax.devices() if devices is None else devices
            gpus = [d for d in devices if d.platform in ("gpu", "cuda")]
            others = sorted({d.platform for d in devices} - {"cpu", "gpu", "cuda"})
            counters = [
                CpuCounters(powercap, watts_per_core),
                *([GpuCounters(gpus, nvml)] if gpus else []),
                *(Unknown(name) for name in others),
            ]
        self._counters = list(counters)
        self._energy: Energy | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "EnergyMeter":
        """Wait for `ready`, then begin."""
        self.wait_for(self._ready)
        self._ready = None
        for source in self._counters:
            source.start()
        self._began = time.perf_counter()
        # a counter that wraps must be looked at before it comes round; short runs end earlier
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """End: `energy` is what it was."""
        self._energy = self.so_far()
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def wait_for(self, arrays: Any) -> None:
        """Wait until arrays are computed."""
        jax.block_until_ready(arrays)

    def so_far(self) -> Energy:
        """Return the energy since the beginning."""
        with self._lock:
            seconds = time.perf_counter() - self._began
            parts = [source.read() for source in self._counters]
        readings = tuple(reading for some, _ in parts for reading in some)
        return Energy(seconds, readings, tuple(note for _, notes in parts for note in notes))

    @property
    def energy(self) -> Energy:
        """The energy of the finished window.

        Raises:
            RuntimeError: the block has not ended; see `so_far`.
        """
        if self._energy is None:
            raise RuntimeError("the meter is still running: energy is known when its block ends")
        return self._energy

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.so_far()


# CPU and memory -----------------------------------------------------------------------------------


@dataclass
class _Zone:
    """A RAPL power zone and what it has counted."""

    folder: Path
    name: str
    range_uj: int
    first: tuple[int, int] = (0, 0)  # two reads at the start
    last: int = 0
    total_uj: int = 0

    def read(self) -> int:
        return int((self.folder / "energy_uj").read_text())

    def add(self, value: int) -> None:
        """Count up to `value`; a smaller one than before has wrapped around."""
        step = value - self.last
        self.total_uj += step if step >= 0 else step + self.range_uj
        self.last = value


class CpuCounters:
    """RAPL counters of packages and memory, or an estimate from the time of the cores."""

    def __init__(self, powercap: Path = POWERCAP, watts_per_core: float | None = WATTS_PER_CORE):
        self.zones, self.why_not = find_zones(powercap)
        self.watts_per_core = watts_per_core

    def start(self) -> None:
        """Begin."""
        once = [zone.read() for zone in self.zones]
        for zone, value in zip(self.zones, once, strict=True):
            zone.first, zone.last, zone.total_uj = (value, zone.read()), value, 0
        self.cpu_s = time.process_time()

    def read(self) -> tuple[list[Reading], list[str]]:
        """Return one reading for each package and memory, or the estimate."""
        if not self.zones:
            return self.estimate()
        once = [zone.read() for zone in self.zones]
        windows = [(value, zone.read()) for zone, value in zip(self.zones, once, strict=True)]
        kept: list[int] = []
        notes = []
        for i, zone in enumerate(self.zones):
            zone.add(once[i])
            twin = next((j for j in kept if self._mirrors(i, j, windows)), None)
            if twin is None:
                kept.append(i)
            else:
                notes.append(f"{zone.name} mirrors {self.zones[twin].name}: counted once")
        readings = [
            Reading(
                f"{'memory' if 'dram' in zone.name else 'CPU'} {zone.name}",
                zone.total_uj / 1e6,
                f"measured (RAPL {'dram' if 'dram' in zone.name else 'package'}, whole machine)",
            )
            for zone in (self.zones[i] for i in kept)
        ]
        return readings, notes

    def _mirrors(self, i: int, j: int, now: list[tuple[int, int]]) -> bool:
        """Whether zone i shows zone j's counter: between two reads of j, then and now."""
        a, b = self.zones[j], self.zones[i]
        same_kind = ("dram" in a.name) == ("dram" in b.name)
        then = a.first[0] <= b.first[0] <= a.first[1]
        return same_kind and then and now[j][0] <= now[i][0] <= now[j][1]

    def estimate(self) -> tuple[list[Reading], list[str]]:
        """Core-seconds of this process times watts per core."""
        notes = [self.why_not]
        if self.watts_per_core is None:
            return [Reading("CPU", None, "not available (no counter, no estimate wanted)")], notes
        core_s = time.process_time() - self.cpu_s
        watts = self.watts_per_core
        low, high = WATTS_PER_CORE_RANGE if watts == WATTS_PER_CORE else (watts, watts)
        between = f", {low:g} to {high:g}" if low != high else ""
        method = f"estimated (core-seconds x {watts:g} W per core{between})"
        J, low_J, high_J = (two_digits(core_s * w) for w in (watts, low, high))
        return [Reading("CPU", J, method, low_J, high_J)], notes


def find_zones(powercap: Path = POWERCAP) -> tuple[list[_Zone], str]:
    """Return the RAPL zones to add up, and in words why there are none.

    Packages are the top-level zones; of their parts only the memory is not in them already. Left
    out: "psys", the whole board, which contains the packages, and the zones of the memory-mapped
    interface (intel-rapl-mmio) of a package that has its own.
    """
    try:
        folders = sorted(powercap.glob("intel-rapl*:*"), key=lambda path: _numbers(path.name))
    except OSError:
        folders = []
    zones: dict[tuple[str, str], _Zone] = {}
    denied = False
    # the plain interface first, so that its memory-mapped twin finds the place taken
    for folder in sorted(folders, key=lambda path: path.name.startswith("intel-rapl-mmio")):
        try:
            name = (folder / "name").read_text().strip()
            parent = folder.name.rpartition(":")[0]
            is_top = folder.name.count(":") == 1
            if is_top and name.startswith("package"):
                key = (name, "")
            elif not is_top and name == "dram":
                key = ((powercap / parent / "name").read_text().strip(), "dram")
            else:
                continue  # psys, core, uncore: in the package, or around it
            if key in zones:
                continue
            zone = _Zone(folder, " ".join(key).strip(), 0)
            zone.range_uj = int((folder / "max_energy_range_uj").read_text())
            zone.read()
        except PermissionError:
            denied = True
            continue
        except (OSError, ValueError):
            continue  # a zone that is switched off
        zones[key] = zone
    packages = [zone for zone in zones.values() if "dram" not in zone.name]
    if packages:
        return list(zones.values()), ""
    if denied:
        return [], f"the RAPL counters may be read by root alone: {REMEDY}"
    return [], f"no RAPL counter in {powercap} (none in virtual machines and outside of Linux)"


def _numbers(name: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", name)]


# GPU ----------------------------------------------------------------------------------------------


class GpuCounters:
    """NVML's energy counters of the GPUs that JAX uses.

    Args:
        devices: JAX devices, platform "gpu".
        nvml: the module `pynvml` or one like it; None: import it.
        pci_bus_id: PCI bus id of a JAX device; None if it cannot be told.
    """

    def __init__(
        self,
        devices: Sequence[Any],
        nvml: Any = None,
        pci_bus_id: Callable[[Any], str | None] | None = None,
    ):
        self.devices, self.nvml, self.why_not = list(devices), nvml, ""
        self.handles: list[Any] = [None] * len(self.devices)
        if nvml is None:
            try:
                import pynvml  # pyright: ignore[reportMissingImports]

                self.nvml = pynvml
            except ImportError:
                self.why_not = "nvidia-ml-py is not installed: pip install 'jaxrl[energy]'"
                return
        find = pci_bus_id or cuda_pci_bus_id
        try:
            self.nvml.nvmlInit()
            self.handles = [self._handle(find(device)) for device in self.devices]
        except self.nvml.NVMLError as error:
            self.why_not = f"NVML does not answer: {error}"

    def _handle(self, bus_id: str | None) -> Any:
        """NVML counts devices in another order than CUDA: the PCI bus id is common to both."""
        if bus_id is not None:
            return self.nvml.nvmlDeviceGetHandleByPciBusId(bus_id.encode())
        if self.nvml.nvmlDeviceGetCount() == 1:
            return self.nvml.nvmlDeviceGetHandleByIndex(0)
        self.why_not = "which of several GPUs JAX uses cannot be told: no PCI bus id"
        return None

    def _counter_mJ(self, handle: Any) -> int | None:
        if handle is None:
            return None
        try:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except self.nvml.NVMLError as error:
            self.why_not = f"no energy counter in NVML (Volta and newer have one): {error}"
            return None

    def start(self) -> None:
        """Begin."""
        self.first = [self._counter_mJ(handle) for handle in self.handles]
        self.began = time.perf_counter()

    def read(self) -> tuple[list[Reading], list[str]]:
        """Return one reading for each GPU."""
        readings = []
        for device, handle, first in zip(self.devices, self.handles, self.first, strict=True):
            now = self._counter_mJ(handle)
            if now is None or first is None:
                reading = Reading(f"GPU {device.id}", None, f"not available ({self.why_not})")
            else:
                J = (now - first) / 1e3
                reading = Reading(f"GPU {device.id}", J, "measured (NVML, whole board)")
            readings.append(reading)
        notes = [self.why_not] if self.why_not else []
        if any(r.is_measured for r in readings) and time.perf_counter() - self.began < SHORT_S:
            notes.append(
                f"NVML's counter moves every 20 to 100 ms: under {SHORT_S:g} s it is noise"
            )
        return readings, notes


def cuda_pci_bus_id(device: Any) -> str | None:
    """Ask the CUDA driver, which numbers devices as JAX does, for the PCI bus id of a device."""
    import ctypes

    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        buffer = ctypes.create_string_buffer(32)
        handle = ctypes.c_int()
        ordinal = device.local_hardware_id
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(handle), ctypes.c_int(ordinal)):
            return None
        if cuda.cuDeviceGetPCIBusId(buffer, ctypes.c_int(32), handle):
            return None
        return buffer.value.decode()
    except (OSError, AttributeError, TypeError):
        return None


@dataclass
class Unknown:
    """A device whose energy nobody tells."""

    platform: str
    notes: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Begin."""

    def read(self) -> tuple[list[Reading], list[str]]:
        """Return what is known: nothing."""
        return [Reading(self.platform, None, f"not available ({self.platform})")], self.notes


# another library ----------------------------------------------------------------------------------


class _Zeus:
    def __init__(self, monitor: Any):
        self.monitor = monitor

    def start(self) -> None:
        self.sums: dict[str, float] = {}
        self.missing: set[str] = set()
        self.monitor.begin_window("jaxrl", sync_execution=False)

    def read(self) -> tuple[list[Reading], list[str]]:
        window = self.monitor.end_window("jaxrl", sync_execution=False)
        self.monitor.begin_window("jaxrl", sync_execution=False)  # the next one, from here
        parts = {"GPU": window.gpu_energy, "CPU": window.cpu_energy, "memory": window.dram_energy}
        if not window.cpu_energy:
            self.missing.add("CPU")
        for part, values in parts.items():
            for index, J in (values or {}).items():
                name = f"{part} {index}"
                self.sums[name] = self.sums.get(name, 0.0) + J
        readings = [Reading(name, J, "measured (zeus)") for name, J in self.sums.items()]
        readings += [Reading(name, None, "not available (zeus)") for name in sorted(self.missing)]
        return readings, []


def zeus_counters(monitor: Any = None) -> Counters:
    """Return the counters of the library zeus (`pip install zeus`) for `EnergyMeter(counters=...)`.

    Args:
        monitor: a `zeus.monitor.ZeusMonitor`; None: a new one of all GPUs and packages.
    """
    if monitor is None:
        from zeus.monitor import ZeusMonitor  # pyright: ignore[reportMissingImports]

        monitor = ZeusMonitor()
    return _Zeus(monitor)


# the report ---------------------------------------------------------------------------------------


def model_card(energy: Energy, g_per_kwh: float | None = None, hardware: str = "") -> str:
    """Return the `co2_eq_emissions` block (YAML) of a model card.

    Emissions are in grams. Without an intensity the world's average is taken, and named. Where the
    energy is not known there are no emissions, and the block says why.
    """
    intensity = WORLD_G_PER_KWH if g_per_kwh is None else g_per_kwh
    origin = "world average" if g_per_kwh is None else "given by the user"
    grams = gCO2e(energy.J, intensity)
    digits = 6 if energy.is_measured else 2
    source = f"{energy.method}, x {intensity:g} g/kWh ({origin}); jaxrl"
    lines = [
        "co2_eq_emissions:",
        f"  emissions: {'null' if grams is None else f'{grams:.{digits}g}'}  # g",
        f'  source: "{source}"',
        '  training_type: "reinforcement learning from scratch"',
    ]
    if hardware:
        lines.append(f'  hardware_used: "{hardware}"')
    return "\n".join(lines) + "\n"
