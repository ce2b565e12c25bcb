"""Energy counters on a fake tree of power zones and a fake NVML, and honest words without them."""

import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxrl.cost import energy
from jaxrl.cost.energy import Energy, EnergyMeter, Reading

CPU = SimpleNamespace(platform="cpu", id=0)
RANGE = 262_143_328_850  # uJ, of a usual package


def zone(root, folder, name, uj, range_uj=RANGE):
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")


def set_uj(root, **values):
    for folder, uj in values.items():
        (root / folder.replace("_", ":").replace("rapl", "intel-rapl")).joinpath(
            "energy_uj"
        ).write_text(f"{uj}\n")


def meter(root, **kwargs):
    return EnergyMeter(powercap=root, devices=[CPU], **kwargs)


def parts(energy):
    return {r.part: r.J for r in energy.readings}


@pytest.fixture
def server(tmp_path):
    """Two sockets with memory, cores and graphics, the board, and the memory-mapped twins."""
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 500_000)
    zone(tmp_path, "intel-rapl:0:1", "uncore", 100_000)
    zone(tmp_path, "intel-rapl:0:2", "dram", 200_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    zone(tmp_path, "intel-rapl:1:0", "dram", 300_000)
    zone(tmp_path, "intel-rapl:2", "psys", 20_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    zone(tmp_path, "dtpm", "dtpm", 1)
    return tmp_path


# RAPL ---------------------------------------------------------------------------------------------


def test_packages_and_memory_are_added_and_nothing_twice(server):
    with meter(server) as m:
        for folder, uj in [
            ("intel-rapl:0", 3_500_000),  # 2.5 J
            ("intel-rapl:0:0", 2_500_000),  # in the package
            ("intel-rapl:0:1", 900_000),  # in the package
            ("intel-rapl:0:2", 1_200_000),  # 1 J
            ("intel-rapl:1", 11_000_000),  # 4 J
            ("intel-rapl:1:0", 800_000),  # 0.5 J
            ("intel-rapl:2", 90_000_000),  # the packages and more
            ("intel-rapl-mmio:0", 3_500_000),  # package 0 again
        ]:
            (server / folder / "energy_uj").write_text(str(uj))
    assert parts(m.energy) == {
        "CPU package-0": 2.5,
        "memory package-0 dram": 1.0,
        "CPU package-1": 4.0,
        "memory package-1 dram": 0.5,
    }
    assert m.energy.J == 8.0
    assert m.energy.kWh == pytest.approx(8.0 / 3.6e6)
    assert m.energy.low_J == m.energy.high_J == 8.0
    assert m.energy.is_measured
    assert m.energy.method == (
        "measured (RAPL package, whole machine) + measured (RAPL dram, whole machine)"
    )


def test_a_counter_that_wraps_goes_on(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_000_000)
    with meter(tmp_path) as m:
        (tmp_path / "intel-rapl:0/energy_uj").write_text("500000")
        assert pytest.approx(1.5) == m.so_far().J
        # once more round, seen on the way: first to the end, then to 2 J
        (tmp_path / "intel-rapl:0/energy_uj").write_text(str(RANGE - 500_000))
        m.so_far()
        (tmp_path / "intel-rapl:0/energy_uj").write_text("2000000")
    assert pytest.approx(1.5 + (RANGE - 1_000_000) / 1e6 + 2.5) == m.energy.J


def test_a_long_window_is_looked_at_before_a_counter_comes_round(tmp_path, monkeypatch):
    """Twice round between beginning and end: only a look in between can tell."""
    monkeypatch.setattr(energy, "SAMPLE_S", 0.01)
    zone(tmp_path, "intel-rapl:0", "package-0", 0, range_uj=10_000_000)
    seen = []
    read = energy.CpuCounters.read
    monkeypatch.setattr(energy.CpuCounters, "read", lambda self: (read(self), seen.append(1))[0])

    def wait_for_a_look():
        n, began = len(seen), time.monotonic()
        while len(seen) < n + 2:
            assert time.monotonic() - began < 30
            time.sleep(0.005)

    with meter(tmp_path) as m:
        for uj in (9_000_000, 8_000_000, 7_000_000):
            path = tmp_path / "intel-rapl:0/energy_uj"
            path.with_suffix(".new").write_text(str(uj))
            path.with_suffix(".new").replace(path)  # never half written
            wait_for_a_look()
    assert pytest.approx(9 + 9 + 9) == m.energy.J


def test_dies_that_mirror_one_counter_count_once(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0-die-0", 5_000_000)
    zone(tmp_path, "intel-rapl:1", "package-0-die-1", 5_000_000)
    zone(tmp_path, "intel-rapl:2", "package-1-die-0", 9_000_000)
    with meter(tmp_path) as m:
        set_uj(tmp_path, rapl_0=8_000_000, rapl_1=8_000_000, rapl_2=10_000_000)
    assert parts(m.energy) == {"CPU package-0-die-0": 3.0, "CPU package-1-die-0": 1.0}
    assert m.energy.notes == ("package-0-die-1 mirrors package-0-die-0: counted once",)


@pytest.mark.parametrize("start", [5_000_000, 5_500_000])
@pytest.mark.parametrize("end", [8_000_000, 7_000_000])
def test_dies_with_counters_of_their_own_count_both(tmp_path, start, end):
    """Equal once, by chance or after a reset, is no mirror; equal twice would be."""
    zone(tmp_path, "intel-rapl:0", "package-0-die-0", 5_000_000)
    zone(tmp_path, "intel-rapl:1", "package-0-die-1", start)
    with meter(tmp_path) as m:
        set_uj(tmp_path, rapl_0=8_000_000, rapl_1=end)
    mirrors = (start, end) == (5_000_000, 8_000_000)
    assert 3.0 + (0.0 if mirrors else (end - start) / 1e6) == m.energy.J
    assert len(m.energy.notes) == mirrors


def test_a_twin_alone_is_the_counter(tmp_path):
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    with meter(tmp_path) as m:
        (tmp_path / "intel-rapl-mmio:0/energy_uj").write_text("4000000")
    assert m.energy.J == 3.0


# no counter ---------------------------------------------------------------------------------------


def work(seconds=0.05):
    began = time.process_time()
    while time.process_time() - began < seconds:
        math.sqrt(2.0)


def test_counters_for_root_alone_give_an_estimate_and_the_remedy(server, monkeypatch):
    read_text = Path.read_text

    def denied(self, *args, **kwargs):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)
    with meter(server) as m:
        work()
    assert not m.energy.is_measured
    (note,) = m.energy.notes
    assert "root alone: sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj" in note
    assert m.energy.method.startswith("estimated (")


def test_without_counters_an_estimate_says_so_and_has_a_range(tmp_path, monkeypatch):
    clock = iter([100.0, 112.34])
    monkeypatch.setattr(energy.time, "process_time", lambda: next(clock))
    with meter(tmp_path) as m:
        pass
    # 12.34 core-seconds at 10 W, 4 W and 20 W, two digits
    (reading,) = m.energy.readings
    assert (reading.J, reading.low_J, reading.high_J) == (120.0, 49.0, 250.0)
    assert (m.energy.J, m.energy.low_J, m.energy.high_J) == (120.0, 49.0, 250.0)
    assert reading.method == "estimated (core-seconds x 10 W per core, 4 to 20)"
    assert "no RAPL counter" in m.energy.notes[0]


def test_watts_of_your_own_have_no_range_and_none_means_none(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(energy.time, "process_time", lambda: next(clock))
    with meter(tmp_path, watts_per_core=6.5) as m:
        pass
    assert (m.energy.J, m.energy.low_J, m.energy.high_J) == (13.0, 13.0, 13.0)
    assert m.energy.method == "estimated (core-seconds x 6.5 W per core)"
    monkeypatch.undo()
    with meter(tmp_path, watts_per_core=None) as m:
        work(0.01)
    assert m.energy.J is None
    assert m.energy.method.startswith("not available")
    with pytest.raises(ValueError, match="watts_per_core = 0 must lie in"):
        meter(tmp_path, watts_per_core=0)


def test_psys_alone_is_no_package(tmp_path):
    zone(tmp_path, "intel-rapl:0", "psys", 1)
    with meter(tmp_path) as m:
        work(0.01)
    assert not m.energy.is_measured


# NVML ---------------------------------------------------------------------------------------------


class FakeNvml:
    """Two boards, counted in another order than CUDA does; what NVML is asked is written down."""

    class NVMLError(Exception):
        pass

    def __init__(self, mJ=(1_000, 50_000), supported=True, answers=True):
        self.boards = [b"00000000:01:00.0", b"00000000:41:00.0"][: len(mJ)]
        self.mJ = dict(zip(self.boards, mJ, strict=True))
        self.supported, self.answers = supported, answers

    def nvmlInit(self):
        if not self.answers:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self):
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, i):
        return self.boards[i]

    def nvmlDeviceGetHandleByPciBusId(self, bus_id):
        return next(b for b in self.boards if b.endswith(bus_id[-10:]))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.supported:
            raise self.NVMLError("Not Supported")
        return self.mJ[handle]


GPU = SimpleNamespace(platform="gpu", id=0, local_hardware_id=0)


def test_a_gpu_is_found_by_its_bus_and_not_by_its_number():
    nvml = FakeNvml()
    counters = energy.GpuCounters([GPU], nvml, pci_bus_id=lambda d: "0000:41:00.0")
    with EnergyMeter(counters=[counters]) as m:
        nvml.mJ[nvml.boards[0]] += 900_000
        nvml.mJ[nvml.boards[1]] += 12_345
    assert parts(m.energy) == {"GPU 0": 12.345}
    assert m.energy.method == "measured (NVML, whole board)"
    assert "under 1 s it is noise" in m.energy.notes[0]


def test_one_board_needs_no_bus_and_two_do():
    with EnergyMeter(
        counters=[energy.GpuCounters([GPU], FakeNvml((5,)), pci_bus_id=lambda d: None)]
    ) as m:
        pass
    assert m.energy.J == 0.0
    with EnergyMeter(
        counters=[energy.GpuCounters([GPU], FakeNvml(), pci_bus_id=lambda d: None)]
    ) as m:
        pass
    assert m.energy.J is None
    assert "which of several GPUs" in m.energy.method


@pytest.mark.parametrize(
    ("nvml", "why"),
    [
        (FakeNvml((5,), supported=False), "no energy counter in NVML"),
        (FakeNvml((5,), answers=False), "NVML does not answer: Driver Not Loaded"),
    ],
)
def test_a_gpu_that_does_not_tell_is_none_and_so_is_the_total(server, nvml, why):
    with EnergyMeter(powercap=server, devices=[GPU], nvml=nvml) as m:
        set_uj(server, rapl_0=2_000_000)
    assert parts(m.energy)["CPU package-0"] == 1.0
    assert parts(m.energy)["GPU 0"] is None
    assert m.energy.J is None  # not 1 J: the larger part is missing
    assert why in m.energy.method
    columns = m.energy.columns(env_steps=1000, g_per_kwh=100.0)
    assert columns["J_per_1M_steps"] is None
    assert columns["gCO2e"] is None


def test_without_nvml_the_remedy_is_named(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import fails
    with EnergyMeter(powercap=server, devices=[GPU]) as m:
        pass
    assert m.energy.J is None
    assert "pip install 'jaxrl[energy]'" in m.energy.method


def test_a_tpu_is_not_known(server):
    with EnergyMeter(powercap=server, devices=[SimpleNamespace(platform="tpu", id=0)]) as m:
        pass
    assert m.energy.J is None
    assert "not available (tpu)" in m.energy.method


# the report ---------------------------------------------------------------------------------------

MEASURED = Energy(10.0, (Reading("CPU package-0", 1800.0, "measured (RAPL package)"),))
ESTIMATED = Energy(10.0, (Reading("CPU", 1800.0, "estimated (guess)", 720.0, 3600.0),))


def test_columns_have_units_and_methods():
    columns = MEASURED.columns(env_steps=3_000_000, g_per_kwh=400.0)
    assert columns["energy_J"] == 1800.0
    assert columns["energy_kWh"] == 0.0005
    assert columns["J_per_1M_steps"] == 600.0
    assert columns["gCO2e"] == pytest.approx(0.2)
    assert columns["energy_method"] == "measured (RAPL package)"
    assert columns["gCO2e_method"] == "energy_J (measured (RAPL package)) x 400 g/kWh"
    assert "gCO2e" not in MEASURED.columns(env_steps=3_000_000)  # only when asked


def test_an_estimate_keeps_two_digits_and_its_range():
    columns = ESTIMATED.columns(env_steps=7_000_000, g_per_kwh=433.0)
    assert columns["gCO2e"] == 0.22  # 0.2165
    assert (columns["gCO2e_low"], columns["gCO2e_high"]) == (0.087, 0.43)
    assert columns["J_per_1M_steps"] == 260.0  # 257.1
    assert (columns["J_per_1M_steps_low"], columns["J_per_1M_steps_high"]) == (100.0, 510.0)


def test_measured_and_estimated_together_are_an_estimate():
    both = Energy(1.0, (Reading("GPU 0", 1000.0, "measured (NVML)"), *ESTIMATED.readings))
    assert not both.is_measured
    assert (both.J, both.low_J, both.high_J) == (2800.0, 1700.0, 4600.0)
    assert both.method == "measured (NVML) + estimated (guess)"


def test_nothing_known_is_none_and_not_zero():
    assert Energy(1.0, ()).J is None
    assert energy.gCO2e(None) is None
    assert energy.gCO2e(3.6e6) == 475.0
    with pytest.raises(ValueError, match="g_per_kwh = -1 must lie in"):
        energy.gCO2e(1.0, -1)


def test_model_card_block():
    text = energy.model_card(MEASURED, 400.0, hardware="a CPU")
    assert text == (
        "co2_eq_emissions:\n"
        "  emissions: 0.2  # g\n"
        '  source: "measured (RAPL package), x 400 g/kWh (given by the user); jaxrl"\n'
        '  training_type: "reinforcement learning from scratch"\n'
        '  hardware_used: "a CPU"\n'
    )
    assert "emissions: 0.24 " in energy.model_card(ESTIMATED)
    assert "x 475 g/kWh (world average)" in energy.model_card(ESTIMATED)
    assert "emissions: null " in energy.model_card(Energy(1.0, ()))


# the meter ----------------------------------------------------------------------------------------


def test_the_meter_waits_for_the_device(tmp_path):
    function = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ x), x))
    x = jnp.ones((100, 100)) / 100
    function(x).block_until_ready()
    with meter(tmp_path) as m:
        y = function(x)
        m.wait_for(y)
        assert y.is_ready()
    assert m.energy.seconds > 0
    running = meter(tmp_path)
    with pytest.raises(RuntimeError, match="still running"):
        _ = running.energy


def test_zeus_windows_are_summed():
    windows = iter(
        [
            SimpleNamespace(gpu_energy={0: 5.0, 1: 1.0}, cpu_energy={0: 1.0}, dram_energy=None),
            SimpleNamespace(gpu_energy={0: 2.0, 1: 0.5}, cpu_energy={0: 4.0}, dram_energy=None),
        ]
    )
    calls = []
    monitor = SimpleNamespace(
        begin_window=lambda key, sync_execution: calls.append("begin"),
        end_window=lambda key, sync_execution: (calls.append("end"), next(windows))[1],
    )
    with EnergyMeter(counters=[energy.zeus_counters(monitor)]) as m:
        assert m.so_far().J == 7.0
    assert parts(m.energy) == {"GPU 0": 7.0, "GPU 1": 1.5, "CPU 0": 5.0}
    assert m.energy.method == "measured (zeus)"
    assert calls == ["begin", "end", "begin", "end", "begin"]


def test_zeus_without_a_cpu_counter_has_no_total():
    window = SimpleNamespace(gpu_energy={0: 5.0}, cpu_energy=None, dram_energy=None)
    monitor = SimpleNamespace(
        begin_window=lambda key, sync_execution: None,
        end_window=lambda key, sync_execution: window,
    )
    with EnergyMeter(counters=[energy.zeus_counters(monitor)]) as m:
        pass
    assert parts(m.energy) == {"GPU 0": 5.0, "CPU": None}
    assert m.energy.J is None
