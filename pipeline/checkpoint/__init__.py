"""Checkpoints in DeepSpeed-MoE's native layout, written atomically, verified when read.

A folder of checkpoints holds one folder per tag, ``latest`` and ``best.json``. A tag is complete when its
``manifest.json`` exists: it is written last, with the size and sha256 of every file. A checkpoint holds the
weights that trained. The frozen ones lie in the upcycled checkpoint; a stage-2 checkpoint names the stage-1
checkpoint that holds its experts.
"""

from pipeline.checkpoint.engine import AtomicCheckpointEngine
from pipeline.checkpoint.optimizer_state import SavedOptimizer
from pipeline.checkpoint.store import (
    MANIFEST,
    best,
    check_same_run,
    complete_tags,
    mark_best,
    read_manifest,
    save_checkpoint,
    write_manifest,
)
from pipeline.checkpoint.tensors import expert_file, load_tensors, main_file, save_tensors
from pipeline.checkpoint.verify import (
    check_sound,
    damaged_files,
    damaged_weights,
    newest_sound_tag,
    weight_files,
)
from pipeline.checkpoint.weights import local_expert_names, read_weights

__all__ = [
    "MANIFEST",
    "AtomicCheckpointEngine",
    "SavedOptimizer",
    "best",
    "check_same_run",
    "check_sound",
    "complete_tags",
    "damaged_files",
    "damaged_weights",
    "expert_file",
    "load_tensors",
    "local_expert_names",
    "main_file",
    "mark_best",
    "newest_sound_tag",
    "read_manifest",
    "read_weights",
    "save_checkpoint",
    "save_tensors",
    "weight_files",
    "write_manifest",
]
