"""DeepSpeed's monitors after a resume: what an interrupted session wrote beyond the checkpoint is taken back."""

import csv
from pathlib import Path
from typing import Any

from common.files import write_text


def rewind_monitors(monitor: Any, samples: int) -> None:
    """Have each monitor go on after so many samples, so that a step appears once in its curves.

    TensorBoard is told to drop later points of earlier sessions; lines of CSV files are removed. W&B needs
    nothing: it takes no step that is not beyond its last.
    """
    if getattr(monitor, "tb_monitor", None) is not None and monitor.tb_monitor.enabled:
        _rewind_tensorboard(monitor.tb_monitor.summary_writer, samples)
    if getattr(monitor, "csv_monitor", None) is not None and monitor.csv_monitor.enabled:
        for path in Path(monitor.csv_monitor.log_dir).glob("**/*.csv"):
            _rewind_csv(path, samples)


def _rewind_tensorboard(writer: Any, samples: int) -> None:
    if writer is None:
        return
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    # What a SummaryWriter's purge_step writes; DeepSpeed makes the writer without it.
    writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step=samples + 1)
    writer.flush()


def _rewind_csv(path: Path, samples: int) -> None:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    kept = [row for row in rows if row and not (row[0].isdigit() and int(row[0]) > samples)]
    if len(kept) < len(rows):
        write_text(path, "".join(",".join(row) + "\n" for row in kept))
