"""What data preparation costs beside the least it could, and beside others. See benchmarks/README.md.

python -m benchmarks.data_prep [--text FOLDER] [--tokenizer FOLDER] [--rounds N] [--other-python PATH] [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.data_prep_rivals import RIVALS
from benchmarks.data_reads import measure_reads
from benchmarks.text import fetch_text
from common.cpu import cpu_name
from common.errors import UserError, exit_on_user_error
from data_prep.executor.pool import num_cores

ELSEWHERE = ("datatrove",)  # packages that may live in another Python


def measure(name: str, options: argparse.Namespace, files: list[Path], cores: int) -> dict[str, Any] | None:
    """Run one rival in a process of its own; None where its package is not installed."""
    python = options.other_python if name in ELSEWHERE and options.other_python else sys.executable
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        arguments = [str(options.tokenizer), folder, str(cores), *map(str, files)]
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        environment |= {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true" if cores > 1 else "false"}
        done = subprocess.run(
            [python, "-m", "benchmarks.data_prep_rivals", name, *arguments],
            check=False, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode == 3:
        return None
    if done.returncode != 0:
        raise UserError(f"{name} failed: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1][:300]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def compare(options: argparse.Namespace, files: list[Path], cores: int, unit: str) -> dict[str, dict[str, float]]:
    """Every rival against the floor of the same round, the median over rounds; printed."""
    names = [name for name in RIVALS if options.only is None or name in ("floor", *options.only.split(","))]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            result = measure(name, options, files, cores)
            if result is not None:
                found[name].append(result)
                line = f"{unit} on {cores}, round {number + 1} of {options.rounds}, {name}: {result[unit]:.1f} s"
                print(line, file=sys.stderr, flush=True)
    rows: dict[str, dict[str, float]] = {}
    print(f"\n{unit} on {cores} core{'s' if cores > 1 else ''}, median of {options.rounds} rounds")
    for name, results in found.items():
        if not results:
            print(f"{name:44} not installed")
            continue
        ratios = [r[unit] / floor[unit] for r, floor in zip(results, found["floor"], strict=True)]
        rows[name] = {
            "seconds": statistics.median(r[unit] for r in results),
            "x_floor": statistics.median(ratios),
            "tokens": results[0]["tokens"],
        }
        row = rows[name]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"{RIVALS[name].title:44} {row['seconds']:8.1f} s  {row['x_floor']:5.2f} x floor ({spread})  "
            f"{row['tokens']:,} tokens",
            flush=True,
        )
    return rows


def main() -> int:
    """Measure everything in one run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_prep", description=__doc__)
    parser.add_argument("--text", type=Path, default=Path("inputs/benchmark"), help="a folder of .jsonl; fetched once")
    parser.add_argument("--tokenizer", type=Path, default=Path("inputs/smollm2-135m"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", default="cpu,wall,reads", help="which of them; by default all")
    parser.add_argument("--only", help="rivals besides the floor, comma-separated")
    parser.add_argument("--other-python", help="a Python with datatrove, if this one has none")
    parser.add_argument("--scratch", help="where shards are written, and deleted; by default the system's place")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    files = sorted(options.text.glob("*.jsonl")) or fetch_text(options.text)
    size = sum(file.stat().st_size for file in files)
    print(f"{size / 1e6:.1f} MB in {len(files)} files, {cpu_name()}, Python "
          f"{platform.python_version()}, {num_cores()} cores", flush=True)  # fmt: skip
    figures: dict[str, Any] = {"bytes": size, "cores": num_cores()}
    wanted = options.measure.split(",")
    if "cpu" in wanted:
        figures["cpu"] = compare(options, files, 1, "cpu")
    if "wall" in wanted:
        figures["wall"] = compare(options, files, num_cores(), "wall")
    if "reads" in wanted:
        figures["reads"] = measure_reads()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main))
