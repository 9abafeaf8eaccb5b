"""Where the time of a step goes: torch's profiler over the steps that ``log.profile_steps`` names, on rank 0."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.distributed.process_group import Ranks

FOLDER = "profile"
TRACE_FILE, TABLE_FILE = "trace.json", "table.txt"
ROWS = 40


class StepProfiler:
    """Profiles some steps of a stage, and writes a trace (for chrome://tracing or Perfetto) and a table.

    Args:
        steps: the first and the last, both profiled; None for none.
        folder: the stage's; what is written goes to ``profile/`` there.
        ranks: rank 0 profiles.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, ranks: Ranks) -> None:
        self._steps = steps if ranks.is_first else None
        self._folder, self._ranks = folder / FOLDER, ranks
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Begin, if this is the first step to profile."""
        if self._steps is not None and self._profile is None and self._steps[0] <= step <= self._steps[1]:
            gpu = [ProfilerActivity.CUDA] if self._ranks.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """End and write, if this was the last step to profile."""
        if self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """End and write what was profiled, if anything."""
        if self._profile is None:
            return
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / TRACE_FILE))
        by = f"self_{self._ranks.device.type}_time_total"
        table = self._profile.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
        (self._folder / TABLE_FILE).write_text(table, encoding="utf-8")
        self._profile, self._steps = None, None
        self._ranks.say(f"profile of some steps: {self._folder}")
