"""DeepSpeed's monitors, TensorBoard and W&B: which are on, and how their curves continue after a resume."""

import importlib.util
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_text
from pipeline.config.run import LogConfig

WANDB_ID_FILE = "wandb_id"


def check_monitors(log: LogConfig) -> None:
    """Check that the packages of the monitors are there.

    Raises:
        UserError: one is not installed.
    """
    for name, wanted in (("tensorboard", log.tensorboard), ("wandb", log.wandb)):
        if wanted and importlib.util.find_spec(name) is None:
            raise UserError(f"log.{name}: the package {name} is not installed; pip install {name}, or set it to false")


def monitor_sections(log: LogConfig, run_folder: Path, stage: str) -> dict[str, Any]:
    """The sections of DeepSpeed's config that turn its monitors on, by their keys there.

    Args:
        log: which are on.
        run_folder: the run's; its name groups the stages in W&B.
        stage: the stage's name; each stage has curves of its own.
    """
    sections: dict[str, Any] = {}
    if log.tensorboard:
        path = str(run_folder / "tensorboard")
        sections["tensorboard"] = {"enabled": True, "output_path": path, "job_name": stage}
    if log.wandb:
        sections["wandb"] = {"enabled": True, "project": log.wandb_project, "group": run_folder.name}
    return sections


def rewind_tensorboard(monitor: Any, samples: int) -> None:
    """Drop points beyond a checkpoint, so that each step appears once in the curves of a resumed stage.

    W&B needs nothing of the kind: it ignores a step that is not beyond its last.

    Args:
        monitor: the engine's.
        samples: consumed up to the checkpoint; what earlier sessions wrote beyond them is dropped.
    """
    tensorboard = getattr(monitor, "tb_monitor", None)
    if tensorboard is None or not tensorboard.enabled or tensorboard.summary_writer is None:
        return
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    # This is what a SummaryWriter's purge_step writes; DeepSpeed makes the writer without it.
    writer = tensorboard.summary_writer
    writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step=samples + 1)
    writer.flush()


def keep_wandb_run(stage_folder: Path) -> None:
    """Let a stage have one W&B run, the same after each restart: DeepSpeed starts it, W&B reads these variables.

    Args:
        stage_folder: the stage's folder in the run's; the W&B run's id is kept there, with the checkpoints.
    """
    path = stage_folder / WANDB_ID_FILE
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ["WANDB_RESUME"] = "allow"
    os.environ["WANDB_NAME"] = f"{stage_folder.parent.name} {stage_folder.name}"
    os.environ.setdefault("WANDB_DIR", str(stage_folder.parent.absolute()))


def finish_wandb_run() -> None:
    """End the stage's W&B run, so that the next stage starts its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
