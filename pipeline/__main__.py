"""python -m pipeline VERB RUN.yaml [--set key=value …]"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext

from pipeline import checkpoint_verbs
from pipeline.config import RunConfig
from pipeline.distributed import device_type, environment_world_size, join, leave, lost_peer, under_launcher
from pipeline.errors import EXIT_CODE, AgreedError, UserError
from pipeline.launcher import run_verb, start_ranks
from pipeline.rank_steps import RankSteps
from pipeline.run_file import load_run
from pipeline.run_folder import STEPS, RunFolder
from pipeline.run_lock import RunLock
from pipeline.watchdog import EXIT_STUCK

VERBS = {
    "run": "every step that is not done yet, in order.\nReads the run's YAML; writes output_dir/NAME/.",
    "tokenize": "text to token shards.\nReads data.*.path; writes cache_dir/tokens/.",
    "similarity": "how alike languages look to each layer.\nReads tokens and the dense model; writes similarity.json.",
    "allocate": "how many experts each layer gets.\nReads similarity.json and the budget; writes expert_plan.json.",
    "upcycle": "the dense model to a DeepSpeed-MoE checkpoint.\nReads model and expert_plan.json; writes upcycled/.",
    "train": "train a stage on all ranks.\nReads upcycled/ and tokens; writes stage1/ or stage2/.",
    "evaluate": "bits per character on held-out text.\nReads checkpoints and tokens; writes evaluation.json.",
    "report": "what was measured, to look at.\nReads the run's folder; writes report.html.",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Teach a language model new languages.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in VERBS.items():
        short = text.replace("\n", " ")
        sub = verbs.add_parser(
            verb, help=short, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("run", metavar="RUN.yaml", help="such as launch/runs/quickstart.yaml")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the run")
        sub.add_argument("--force", action="store_true", help="do it again, also where inputs have changed")
        if verb == "run":
            sub.add_argument("--until", choices=STEPS, help="stop after this step")
        if verb == "train":
            sub.add_argument("--stage", type=int, choices=(1, 2), help="1 or 2; without it, both")
        if verb == "evaluate":
            sub.add_argument("--checkpoint", metavar="TAG", help="base, stage1, stage2/best, stage1/step000050 …")
        if verb in ("train", "evaluate"):
            sub.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from deepspeed's launcher
    checkpoint_verbs.add_parsers(verbs)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Do what the command line says."""
    options = parse(arguments)
    if options.verb in checkpoint_verbs.VERBS:
        return checkpoint_verbs.run(options)
    run = load_run(options.run, options.set)
    with RunLock(run.folder) if _is_first() else nullcontext():
        return do(run, options)


def do(run: RunConfig, options: argparse.Namespace) -> int:
    """Do a verb of a run."""
    if _is_first():
        RunFolder.create(run)
    steps = RankSteps(run, force=options.force, redo=options.verb != "run")
    if options.verb == "run":
        return run_all(run, steps, options.until)
    if options.verb == "train":
        stages = [options.stage] if options.stage else [1, 2] if run.stage2 else [1]
        return train(run, steps, stages)
    if options.verb == "evaluate":
        return evaluate(run, steps, options.checkpoint)
    getattr(steps, options.verb)()
    return 0


def run_all(run: RunConfig, steps: RankSteps, until: str | None) -> int:
    """Every step that is not done, up to ``until``."""
    steps.check_parallel(run.parallel.ranks, device_type())
    todo: dict[str, Callable[[], object]] = {
        "tokenize": steps.tokenize,
        "similarity": lambda: run_alone("similarity", steps) if not steps.similarity_is_done() else None,
        "allocate": steps.allocate,
        "upcycle": lambda: run_alone("upcycle", steps) if not steps.upcycle_is_done() else None,
        "stage1": lambda: train(run, steps, [1]),
        "stage2": lambda: train(run, steps, [2]),
        "evaluate": lambda: evaluate(run, steps, None),
        "report": steps.report,
    }
    if run.stage2 is None:
        del todo["stage2"]
    for step, do in todo.items():
        do()
        if step.startswith("stage") and not steps.folder.manifest_path(step).is_file():
            print(f"{step}: stopped before its end; the same command goes on from its last checkpoint", flush=True)
            return 0
        if step == until:
            break
    return 0


def run_alone(verb: str, steps: RankSteps) -> None:
    """Do a step in a process of its own, so that the memory it took is given back when it is done."""
    run_verb(verb, steps.folder.run_file, force=steps.force)


def train(run: RunConfig, steps: RankSteps, stages: list[int]) -> int:
    """Train stages: as a rank under a launcher, or by starting the run's ranks."""
    for number in stages:
        run.stage(number)
        world_size = environment_world_size() if under_launcher() else run.parallel.ranks
        steps.check_parallel(world_size, device_type())
        if steps.stage_is_done(number, say=_is_first()):
            continue
        if _is_first():
            steps.check_stage(number)
        if under_launcher():
            ranks = join(run.parallel.timeout_minutes)
            finished = steps.train(number, ranks)
            leave(ranks)
            if not finished:
                return 0
        else:
            force = ["--force"] if steps.force else []
            start_ranks(["train", str(steps.folder.run_file), "--stage", str(number), *force], run.parallel.ranks)
    return 0


def evaluate(run: RunConfig, steps: RankSteps, tag: str | None) -> int:
    """Evaluate: as a rank under a launcher, or by starting the run's ranks."""
    if tag is None and steps.evaluate_is_done(say=_is_first()):
        return 0
    checkpoints = steps.checkpoints_to_score(tag)  # names a mistake before any rank starts
    if under_launcher():
        ranks = join(run.parallel.timeout_minutes)
        steps.evaluate(ranks, tag, checkpoints)
        leave(ranks)
    else:
        force = ["--force"] if steps.force else []
        named = ["--checkpoint", tag] if tag else []
        start_ranks(["evaluate", str(steps.folder.run_file), *named, *force], run.parallel.ranks)
    return 0


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def command_line() -> int:
    """:func:`main`, with a user's mistake as one line and exit code 2: once, where all ranks see the same."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        import torch.distributed

        joined = torch.distributed.is_initialized()
        rank = os.environ.get("RANK", "0")
        if rank == "0" or (joined and not isinstance(error, AgreedError)):
            print(f"error: {f'rank {rank}: ' if joined and rank != '0' else ''}{error}", file=sys.stderr, flush=True)
        return EXIT_CODE
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        reason = str(error).splitlines()[0]
        print(f"error: rank {os.environ['RANK']}: lost the other ranks ({reason})", file=sys.stderr, flush=True)
        os._exit(EXIT_STUCK)  # the process group can't be left in order


if __name__ == "__main__":
    sys.exit(command_line())
