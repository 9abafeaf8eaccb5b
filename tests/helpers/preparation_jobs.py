"""Real preparation jobs for tests: started as users start them, killed, and started again."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.helpers.tiny import write_run

ROOT = Path(__file__).parents[2]
BACKENDS = ("local", "mpi", "array")
WORDS = {
    "en": "house river stone bread water light green morning window letter garden winter",
    "el": "σπίτι ποτάμι πέτρα ψωμί νερό φως πράσινο πρωί παράθυρο γράμμα κήπος χειμώνας",
    "hu": "ház folyó kő kenyér víz fény zöld reggel ablak levél kert tél",
}


def write_corpus(folder: Path, language: str, documents: int) -> Path:
    """Rows of made-up text with exact copies, near copies and short ones among them."""
    draw = random.Random(language)
    rows: list[dict[str, Any]] = []
    words = WORDS[language].split()
    for page in range(documents):
        text = " ".join(f"{draw.choice(words)}{draw.randrange(400)}" for _ in range(draw.randrange(30, 120)))
        rows.append({"text": text, "page": f"page-{page}"})
        if page % 5 == 0:
            rows.append({"text": text, "page": f"copy-{page}"})
        if page % 7 == 0:
            rows.append({"text": text + " and a word more", "page": f"near-{page}"})
        if page % 11 == 0:
            rows.append({"text": "short", "page": f"short-{page}"})
    draw.shuffle(rows)
    path = folder / f"{language}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_preparation_run(folder: Path, documents: int = 300, **data: Any) -> Path:
    """A tiny run with every phase of preparation in it, in many small slices."""
    corpus = {language: str(write_corpus(folder, language, documents)) for language in WORDS}
    sections = {
        "held_out": {"by": "page", "fraction": 0.05},
        "slice_bytes": 40_000,
        "replay": {"tokens": 30_000},
        "filters": {"normalize": "NFC", "min_characters": 20, "exact_duplicates": True, "near_duplicates": {}},
        "old": {"en": {"path": corpus["en"]}},
        "new": {"el": {"path": corpus["el"], "max_tokens": 150_000}, "hu": {"path": corpus["hu"]}},
    }
    return write_run(folder, data=sections | data)


def digests(cache: Path) -> dict[str, str]:
    """The sha256 of every file of the finished sets in a cache, and of their page."""
    files = sorted(path for path in (cache / "tokens").glob("[!.]*/**/*") if path.is_file())
    files += sorted((cache / "tokens").glob("*.html"))
    return {str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Job:
    """The command in one of its ways, with so many ranks, workers or array tasks; in a session of its own."""

    def __init__(self, run: Path, backend: str, ranks: int) -> None:
        self.cache = run.parent / "cache"
        command = [sys.executable, "-m", "data_prep", str(run)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        self.log = open(run.parent / "log.txt", "ab")  # noqa: SIM115 - closed in wait()
        self.processes = []
        for task in range(ranks if backend == "array" else 1):
            if backend == "mpi":
                mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
                assert mpirun, "mpirun is not installed: pip install -r tests/requirements.txt"
                start = [mpirun, "--oversubscribe", "-n", str(ranks), *command]
            elif backend == "array":
                environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
                start = [*command, "--workers", "1"]
            else:
                start = [*command, "--workers", str(ranks)]
            self.processes.append(
                subprocess.Popen(
                    start, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
                )
            )

    def wait(self) -> list[int]:
        """The exit codes."""
        codes = [process.wait(timeout=300) for process in self.processes]
        self.log.close()
        return codes

    def tasks_done(self) -> int:
        """How many tasks have been done, by this and earlier jobs."""
        try:
            return sum(1 for _ in (self.cache / "tokens").glob(".*.work/done/*/*.json"))
        except FileNotFoundError:  # it finishes, and cleans up
            return 0

    def kill_after(self, tasks: int, delay: float) -> bool:
        """SIGKILL everything `delay` seconds after so many more tasks are done; False if it finished before."""
        goal = self.tasks_done() + tasks
        while self.tasks_done() < goal:
            if all(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.005)
        time.sleep(delay)
        alive = [process for process in self.processes if process.poll() is None]
        for process in alive:
            os.killpg(process.pid, signal.SIGKILL)
        self.wait()
        return bool(alive)
