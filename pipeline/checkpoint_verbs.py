"""python -m pipeline checkpoint verify|inspect CHECKPOINT, and resize CHECKPOINT --ranks N --ep-size M."""

import argparse
from pathlib import Path
from typing import Any

VERBS = ("checkpoint", "resize")
_RESIZE = """a checkpoint for another number of ranks, without a model.
Reads CHECKPOINT; writes CHECKPOINT-ranksN-epM beside it. A run does the same by itself when it resumes."""
_CHECKPOINT = "whether a checkpoint is sound (verify), or what it is (inspect), without a model.\nReads CHECKPOINT."


def add_parsers(verbs: Any) -> None:
    """Add both verbs to the command line's."""
    for verb, text in (("checkpoint", _CHECKPOINT), ("resize", _RESIZE)):
        sub = verbs.add_parser(
            verb,
            help=text.replace("\n", " "),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if verb == "checkpoint":
            sub.add_argument("action", choices=("verify", "inspect"))
        sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="such as runs/NAME/stage1/step000050")
        if verb == "resize":
            sub.add_argument("--ranks", type=int, required=True)
            sub.add_argument("--ep-size", type=int, required=True)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    from pipeline.checkpoint.inspect import find_tag, inspect_text, verify_text
    from pipeline.checkpoint.resize import resize
    from pipeline.distributed.parallel_dims import ParallelDims

    folder = find_tag(options.checkpoint)
    if options.verb == "resize":
        target = resize(folder, ParallelDims.from_options(options.ranks, options.ep_size))
        print(f"resize: {target}")
    else:
        print(verify_text(folder) if options.action == "verify" else inspect_text(folder))
    return 0
