"""The command line: its verbs and their options. Most verbs are those of the list of steps."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.cluster import JOBS
from pipeline.run.exporting import DTYPES, NATIVE, SERVE
from pipeline.run.steps import STEP_NAMES, STEPS

RUN_VERBS = {
    "run": "every step that is not done yet, in order.\nReads the run's YAML; writes output_dir/NAME/.",
    **{step.verb: step.help for step in STEPS},
    "fetch": "what the run names on the hub, at a fixed revision, so that no later step needs a network.\n"
    "Reads model and data; writes to the hub's cache and output_dir/NAME/fetched.json.",
    "submit": "the steps that are not done to SLURM, one job after the other.\n"
    "Reads the run's cluster section; writes output_dir/NAME/jobs/.",
    "status": "which step is done, running, waiting or failed.\nReads the run's folder and SLURM; writes nothing.",
    "estimate": "parameters, memory per rank, network, checkpoints and hours, before anything runs.\n"
    "Reads RUN.yaml and the model's config; writes nothing.",
    "export": "a trained checkpoint as a Hugging Face folder that transformers, peft and vLLM load.\n"
    "Reads the run's folder; writes --to, or output_dir/NAME/export/.",
    "push": "an exported folder and its card to the Hugging Face hub.\n"
    "Reads --from, or output_dir/NAME/export/; writes the model on the hub.",
    "generate": "how the base model and the stages continue a prompt.\nReads the run's folder; prints.",
    "check": "whether the ranks of a cluster reach each other, how fast, and whether their software is the same.\n"
    "Reads RUN.yaml's cluster.environment if it is given; writes nothing.",
}
TASKS = "lm-eval's tasks: names, folders or YAML files with commas between, such as held_out,verse_continuation_tr"
NEW = "new"
IMPORT = "import"
COMPARE = "compare"
SWEEP = "sweep"
CHECKPOINT_VERBS = {
    "checkpoint": "whether a checkpoint is sound (verify), or what it is (inspect), without a model.\n"
    "Reads CHECKPOINT.",
    "resize": "a checkpoint for another number of ranks, without a model.\n"
    "Reads CHECKPOINT; writes CHECKPOINT-ranksN-epM beside it. A run does the same by itself when it resumes.",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Teach a language model new languages.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in RUN_VERBS.items():
        sub = _add_verb(verbs, verb, text)
        run = sub.add_argument("run", metavar="RUN.yaml", help="such as launch/runs/quickstart.yaml")
        if verb == "check":
            run.nargs = "?"
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the run")
        sub.add_argument("--force", action="store_true", help="do it again, also where inputs have changed")
        # Of ranks that `run --force` starts: do it although inputs have changed, but nothing that they do not touch.
        sub.add_argument("--changed", action="store_true", help=argparse.SUPPRESS)
        if verb in OPTIONS:
            OPTIONS[verb](sub)
        if verb == "check" or any(step.verb == verb and step.needs_ranks for step in STEPS):
            sub.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from deepspeed's launcher
    _new_options(_add_verb(verbs, NEW, "a run for your own model and text, with values that fit both."))
    _import_options(
        _add_verb(
            verbs, IMPORT, "an exported folder as the base of further expansions: base: in a run's YAML.\n"
            "Reads FOLDER; writes --to.",
        )
    )  # fmt: skip
    _compare_options(
        _add_verb(
            verbs, COMPARE, "what runs gained, forgot and cost, as a table and a page.\n"
            "Reads the runs' folders; writes compare.html and compare.json into --to.",
        )
    )  # fmt: skip
    _sweep_options(
        _add_verb(
            verbs, SWEEP, "many runs of one base, each with its changes and seed; then compare.\n"
            "Reads SWEEP.yaml and its base; writes output_dir/BASE-RUN-seedN/ and output_dir/compare-SWEEP/.",
        )
    )  # fmt: skip
    for verb, text in CHECKPOINT_VERBS.items():
        sub = _add_verb(verbs, verb, text)
        if verb == "checkpoint":
            sub.add_argument("action", choices=("verify", "inspect"))
        sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="such as runs/NAME/stage1/step000050")
        if verb == "resize":
            sub.add_argument("--ranks", type=int, required=True)
            sub.add_argument("--ep-size", type=int, required=True)
    return parser.parse_args(arguments)


def _new_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN.yaml", help="the file to write; its name becomes the run's")
    parser.add_argument("--model", required=True, metavar="PATH", help="a folder or a hub id")
    for group, what in (("old", "the model knows"), ("new", "it is to learn")):
        parser.add_argument(
            f"--{group}", action="append", required=True, metavar="NAME=PATH",
            help=f"text of a language that {what}: a file, a folder or a glob; may be given several times",
        )  # fmt: skip


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="that export wrote of a run with experts")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="by default runs/NAME-imported, NAME being that run")


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its YAML")
    parser.add_argument("--against", metavar="RUN", help="add paired intervals against this run")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="by default compare-FIRST-and-N-more beside the first run's folder"
    )


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sweep", type=Path, metavar="SWEEP.yaml", help="base: RUN.yaml, runs: {NAME: {KEY: VALUE}}, seeds"
    )
    parser.add_argument("--submit", action="store_true", help="a chain of SLURM's jobs per run, rather than here")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done or submitted, and do nothing")
    parser.add_argument("--force", action="store_true", help="do it again, also where inputs have changed")


def _add_verb(verbs: Any, verb: str, text: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = verbs.add_parser(
        verb,
        help=text.replace("\n", " "),
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return sub


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="first", choices=STEP_NAMES, default=STEP_NAMES[0], help="begin with this step")
    parser.add_argument("--until", choices=STEP_NAMES, default=STEP_NAMES[-1], help="stop after this step")


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", type=int, choices=(1, 2), help="1 or 2; without it, both")
    parser.add_argument("--evaluate", action="store_true", help="then score the base model and the checkpoints")


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="TAG", help="base, stage1, stage2/best, stage1/step000050 …")
    parser.add_argument("--tasks", metavar="NAMES", help=f"then score them on {TASKS}")
    parser.add_argument("--few-shot", type=int, metavar="N", help="examples before each question of --tasks")
    parser.add_argument("--report", action="store_true", help="then write the report")


def _fetch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", metavar="NAMES", help=f"fetch the data of {TASKS} too")


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="TAG", help="stage1, stage2/best …; the last stage's last without it")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; that of training without it")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="by default output_dir/NAME/export")
    parser.add_argument(
        "--graft", metavar="INSTRUCT_MODEL", help="add what this tuning of the dense model added to it (experimental)"
    )
    parser.add_argument("--native", choices=NATIVE, help="as an architecture of transformers, without own code")
    parser.add_argument("--serve", choices=SERVE, help="with own code whose experts vLLM computes by one kernel")


def _push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="the model on the hub")
    parser.add_argument("--from", dest="folder", type=Path, metavar="FOLDER", help="by default output_dir/NAME/export")
    parser.add_argument("--private", action="store_true", help="seen by its owner alone, where it is made now")


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--stage", metavar="L,L", help="of base,1,2 or stage1/best …; without it base and the last stage"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at a temperature")
    parser.add_argument("--show-experts", action="store_true", help="show which experts each token took")


def _submit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="show the sbatch lines and their scripts, submit nothing"
    )
    parser.add_argument("--until", choices=JOBS, default=JOBS[-1], help="submit up to this one")


def _allocate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budgets", metavar="N,N,…", help="only show the plans of so many new experts side by side, and write nothing"
    )
    _machine_options(parser, " (with --budgets)")


def _machine_options(parser: argparse.ArgumentParser, when: str = "") -> None:
    parser.add_argument("--ranks", type=int, help=f"how many; the run's parallel.ranks without it{when}")
    parser.add_argument("--ep-size", type=int, help=f"the run's parallel.ep_size without it{when}")
    parser.add_argument("--device", help=f"h100, h200, a100 …, or gigabytes such as 80GB; without it the CPU{when}")


def _estimate_options(parser: argparse.ArgumentParser) -> None:
    _machine_options(parser)
    parser.add_argument(
        "--num-new", type=int, metavar="N", help="new experts, where experts.delta leaves them to similarities"
    )
    parser.add_argument("--tokens-per-second", type=float, help="of all ranks; for the hours")


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="how many to start where no launcher did")
    parser.add_argument("--megabytes", type=int, default=64, help="the largest message")


OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "run": _run_options,
    "allocate": _allocate_options,
    "train": _train_options,
    "evaluate": _evaluate_options,
    "fetch": _fetch_options,
    "export": _export_options,
    "push": _push_options,
    "generate": _generate_options,
    "submit": _submit_options,
    "estimate": _estimate_options,
    "check": _check_options,
}
