"""The energy that this machine spends, where it tells: processors and memory by Linux's RAPL, NVIDIA GPUs by NVML."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

log = logging.getLogger("toolkit")
ROOT = Path("/sys/class/powercap")
# A counter of 65 kJ, the shortest there is, is full after two minutes at 500 W.
PERIOD = 30.0


@dataclass(frozen=True)
class Counter:
    """Something that counts joules: its `name`, how it is `read`, and where it begins again at 0 (None: nowhere)."""

    name: str
    read: Callable[[], float]
    full: float | None = None


class Energy:
    """The joules that all `counters` together have counted since this was made, plus those `before`; None where there are no
    counters or those before are not known.

    They count for the whole machine, whatever else runs on it. A daemon thread reads them every half minute until the `end`, so
    that none can come full circle unseen.
    """

    def __init__(self, counters: Sequence[Counter], before: float | None = 0.0, period: float = PERIOD) -> None:
        self.counters, self.total, self.names = list(counters), before or 0.0, ", ".join(c.name for c in counters)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.last: list[float] = []
        self.told = bool(counters) and before is not None and self._began()
        if self.told:
            threading.Thread(target=self._watch, args=(period,), name="energy", daemon=True).start()

    def joules(self) -> float | None:
        """What was spent so far."""
        with self._lock:
            self._read()
            return self.total if self.told else None

    def end(self) -> float | None:
        """What was spent, now that it is over."""
        self._stop.set()
        return self.joules()

    def _began(self) -> bool:
        try:
            self.last = [counter.read() for counter in self.counters]
        except Exception as error:  # of a file or of a library
            log.debug("no energy: %s", error)
        return bool(self.last)

    def _watch(self, period: float) -> None:
        while not self._stop.wait(period):
            self.joules()

    def _read(self) -> None:
        if not self.told:
            return
        try:
            now = [counter.read() for counter in self.counters]
        except Exception as error:  # a counter that is gone leaves the sum unknown
            log.debug("no energy any more: %s", error)
            self.told = False
            return
        for counter, before, after in zip(self.counters, self.last, now, strict=True):
            self.total += after - before + (counter.full or 0.0) * (after < before)
        self.last = now


def counters(device: str = "cpu", root: Path = ROOT) -> list[Counter]:
    """The counters that can be read here: of processor packages and their memory, and of the GPU that is the `device`."""
    return [*_packages(root), *(_gpu(device) if device.startswith("cuda") else ())]


def _packages(root: Path) -> Iterator[Counter]:
    """The zones of RAPL that contain no other: cores are a part of their package."""
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            full = int((zone / "max_energy_range_uj").read_text()) / 1e6
            (zone / "energy_uj").read_text()  # only the administrator may, on many machines
        except (OSError, ValueError):
            continue
        if name.startswith("package") or name == "dram":
            yield Counter(name, partial(_joules, zone / "energy_uj"), full)


def _joules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def _gpu(device: str) -> Iterator[Counter]:
    try:
        import pynvml  # which torch.cuda also asks, where it is installed

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # there since Volta
    except Exception as error:  # of a library that may not be there, or not be able to
        log.debug("no energy of %s: %s", device, error)
        return
    yield Counter(device, lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
