"""What every benchmark shares: interleaved runs in one process, medians, and records in the format of the contract."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def race(runners: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each runner over `rounds` interleaved rounds, after `warmup` rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(warmup + rounds):
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            if number >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> str:
    """The GPU, if there is one, the processor and the number of threads, in words."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        fields = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
        model = f"{fields.get('model name', model)} (family {fields.get('cpu family')}, model {fields.get('model')})"
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{model}, {torch.get_num_threads()} threads"


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes, such as VmRSS, VmHWM or RssAnon."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def record(case: str, name: str, value: float, unit: str, **ratios: float) -> dict[str, Any]:
    """One record of a results file; `ratios` are `ratio_to_best_peer` and `ratio_to_floor`."""
    versions = {"torch": version("torch")}
    rounded = {key: round(ratio, 3) for key, ratio in ratios.items()}
    return {
        "case": case,
        "name": name,
        "value": value,
        "unit": unit,
        "machine": machine(),
        "versions": versions,
        **rounded,
    }


def write(name: str, records: list[dict[str, Any]]) -> None:
    """Write `benchmarks/results/<name>.json`."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(records, indent=2, sort_keys=True) + "\n", encoding="utf-8")
