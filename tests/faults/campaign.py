"""Kill a two-rank run again and again; at the end it must be the uninterrupted one, bit by bit.

python -m tests.faults.campaign [--kills 50] [--inside-saves 15] [--seed 1] FOLDER
"""

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from pipeline.checkpoint.store import MANIFEST
from pipeline.checkpoint.tensors import load_tensors
from pipeline.records.record import read_rows
from pipeline.records.run_folder import METRICS_FILE
from tests.faults.processes import Launch
from tests.helpers.rows import TIMING
from tests.helpers.tiny import run_tree, save_model

VICTIMS = ("rank 0", "rank 1", "both ranks", "launch", "pipeline")
SECONDS_TO_END = (
    75.0  # of all that is left of a launch: DeepSpeed's launcher gives a rank 30 s, a rank its launcher 30 s
)


def write_run(folder: Path, name: str, steps: int) -> Path:
    """A run whose saves take long enough to be hit."""
    if not (folder / "model").is_dir():
        save_model(folder / "model", hidden_size=128, intermediate_size=1024)
    tree = run_tree(
        folder,
        name=name,
        parallel={"ranks": 2, "ep_size": 2, "micro_batch_size": 2},
        stage1={"tokens": 8 * 32 * steps, "lr": 1e-3},
        deepspeed="ds_configs/bf16_zero1.json",
        checkpoint={"every_steps": 10, "every_minutes": None, "keep": 3},
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


class Campaign:
    """One run under fire."""

    def __init__(self, folder: Path, kills: int, inside_saves: int, steps: int, seed: int) -> None:
        self.folder, self.kills, self.inside_saves, self.steps = folder, kills, inside_saves, steps
        self.seed, self.random = seed, random.Random(seed)
        self.stage = folder / "runs" / "killed" / "stage1"
        self.log = folder / "killed.log"
        self.records: list[dict[str, Any]] = []
        self.launched = 0.0

    def run(self) -> dict[str, Any]:
        """The whole campaign; its summary.

        Raises:
            AssertionError: a process outlived its launch, or the run ended otherwise than the uninterrupted one.
        """
        path = write_run(self.folder, "killed", self.steps)
        while len(self.records) < self.kills or self.hits() < self.inside_saves:
            self.launched = time.time()
            launch = Launch(["run", str(path), "--until", "stage1"], self.log)
            try:
                self.shoot(launch)
            finally:
                launch.kill()
        launch = Launch(["run", str(path), "--until", "stage1"], self.log)
        assert launch.wait(1200) == 0, self.log.read_text()[-2000:]
        straight = write_run(self.folder, "straight", self.steps)
        reference = Launch(["run", str(straight), "--until", "stage1"], self.folder / "straight.log")
        assert reference.wait(1200) == 0, (self.folder / "straight.log").read_text()[-2000:]
        compare(self.stage, self.folder / "runs" / "straight" / "stage1")
        return self.summary()

    def hits(self) -> int:
        """Kills inside a save."""
        return sum(record["inside a save"] for record in self.records)

    def shoot(self, launch: Launch) -> None:
        """Kill one victim of a launch at a random moment, and see everything else end."""
        aim = self.random.choices(("start", "training", "save"), (0.15, 0.35, 0.5))[0]
        delay = self.random.uniform(0.0, {"start": 12.0, "training": 2.0, "save": 0.12}[aim])
        rows = self.num_rows()
        deadline = time.monotonic() + 120
        while aim != "start" and launch.process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            if (aim == "training" and self.num_rows() != rows) or (aim == "save" and self.saving()):
                break
            time.sleep(0.002)
        time.sleep(delay)
        victim = self.random.choice(VICTIMS)
        targets = self.targets(launch, victim)
        if launch.process.poll() is not None or not targets:
            assert launch.process.poll() != 0, "the run ended before the campaign did; give it more steps"
            return
        inside, step = self.saving(), self.num_rows()
        for target in targets:
            try:
                target.kill()
            except psutil.Error:
                return
        seconds = launch.wait_until_gone(SECONDS_TO_END)
        self.records.append({"victim": victim, "aim": aim, "step": step, "inside a save": inside, "seconds": seconds})
        print(f"kill {len(self.records)}: {victim} at {aim}, step {step}, inside a save: {inside}, all gone after "
              f"{seconds:.1f} s", flush=True)  # fmt: skip

    def targets(self, launch: Launch, victim: str) -> list[psutil.Process]:
        """The victim's processes, if they live."""
        if victim in ("launch", "pipeline"):
            process = launch.launcher(victim)
            return [process] if process else []
        ranks = launch.ranks()
        wanted = (0, 1) if victim == "both ranks" else (int(victim[-1]),)
        return [ranks[number] for number in wanted if number in ranks]

    def saving(self) -> bool:
        """Whether this launch is writing a checkpoint: a tag's folder without a manifest, not left by one before."""
        for path in self.stage.glob("step*"):
            try:
                is_new = path.stat().st_mtime >= self.launched
            except FileNotFoundError:
                continue
            if is_new and not (path / MANIFEST).is_file():
                return True
        return False

    def num_rows(self) -> int:
        """Steps in the log."""
        path = self.stage / METRICS_FILE
        return path.read_text().count("\n") if path.is_file() else 0

    def summary(self) -> dict[str, Any]:
        """What was done."""
        seconds = sorted(record["seconds"] for record in self.records)
        return {
            "seed": self.seed,
            "kills": len(self.records),
            "inside a save": self.hits(),
            "victims": dict(Counter(record["victim"] for record in self.records)),
            "aims": dict(Counter(record["aim"] for record in self.records)),
            "steps": self.steps,
            "seconds until all had ended": {"median": seconds[len(seconds) // 2], "most": seconds[-1]},
        }


def compare(ours: Path, theirs: Path) -> None:
    """The loss curve, each step once, and all weights and moments of the last checkpoint are equal, bit by bit."""
    mine, other = (
        [{key: value for key, value in row.items() if key not in TIMING} for row in read_rows(path / METRICS_FILE)]
        for path in (ours, theirs)
    )
    assert mine == other
    assert [row["step"] for row in other] == list(range(1, len(other) + 1))
    tags = [(path / "latest").read_text() for path in (ours, theirs)]
    assert tags[0] == tags[1] == f"step{len(other):06d}"
    names = {path.name for path in (theirs / tags[1]).glob("*.pt")}
    assert {path.name for path in (ours / tags[0]).glob("*.pt")} == names
    assert sum("optim_states" in name for name in names) == 2
    for name in sorted(names):
        a, b = load_tensors(ours / tags[0] / name), load_tensors(theirs / tags[1] / name)
        tensors_a, tensors_b = dict(tensors(a)), dict(tensors(b))
        assert tensors_a.keys() == tensors_b.keys()
        assert tensors_b, name
        for key, tensor in tensors_b.items():
            assert torch.equal(tensors_a[key], tensor), (name, key)


def tensors(value: Any, path: str = "") -> Any:
    """All tensors in nested dicts and lists, with their paths."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}[{index}]")


def main() -> None:
    """Run a campaign and print its summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--inside-saves", type=int, default=15)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(options.folder, options.kills, options.inside_saves, options.steps, options.seed)
    print(json.dumps(campaign.run(), indent=1))


if __name__ == "__main__":
    main()
