"""A stage's run in W&B: the same one after each restart. DeepSpeed starts it; W&B reads these variables."""

import os
import secrets
import sys
from pathlib import Path

from common.files import write_text

FILE_NAME = "wandb_id"


def keep_wandb_run(stage: Path) -> None:
    """Have W&B go on with this stage's run, or begin it; its id lies with the checkpoints.

    Args:
        stage: the stage's folder, in the run's.
    """
    path = stage / FILE_NAME
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ["WANDB_RESUME"] = "allow"
    os.environ["WANDB_NAME"] = f"{stage.parent.name} {stage.name}"
    os.environ.setdefault("WANDB_DIR", str(stage.parent.absolute()))


def finish_wandb_run() -> None:
    """End the stage's run, so that the next stage begins its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
