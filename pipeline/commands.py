"""What the verbs of the command line do."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from common.launch_environment import is_first_rank
from pipeline.config.run import RunConfig
from pipeline.distributed.launcher import run_verb, start_ranks
from pipeline.distributed.process_group import device_type, environment_world_size, join, leave, under_launcher
from pipeline.run.rank_steps import RankSteps
from pipeline.run.run_folder import STEPS


def run_all(run: RunConfig, options: Namespace) -> int:
    """Every step that is not done, from ``options.first`` to ``options.until``."""
    steps = RankSteps(run, force=options.force)
    todo: dict[str, Callable[[], object]] = {
        "tokenize": steps.tokenize,
        "similarity": lambda: run_alone("similarity", steps) if not steps.similarity_is_done() else None,
        "allocate": steps.allocate,
        "upcycle": lambda: run_alone("upcycle", steps) if not steps.upcycle_is_done() else None,
        "stage1": lambda: train_stages(run, steps, [1]),
        "stage2": lambda: train_stages(run, steps, [2]),
        "evaluate": lambda: evaluate_on_ranks(run, steps, None),
        "report": steps.report,
    }
    wanted = STEPS[STEPS.index(options.first) : STEPS.index(options.until) + 1]
    if options.first == STEPS[0] or set(wanted) & {"stage1", "stage2", "evaluate"}:
        steps.check_parallel(run.parallel.ranks, device_type())
    for step in wanted:
        if step == "stage2" and run.stage2 is None:
            continue
        todo[step]()
        if step.startswith("stage") and not steps.folder.manifest_path(step).is_file():
            print(f"{step}: stopped before its end; the same command goes on from its last checkpoint", flush=True)
            return 0
    return 0


def run_alone(verb: str, steps: RankSteps) -> None:
    """Do a step in a process of its own, so that the memory it took is given back when it is done."""
    run_verb(verb, steps.folder.run_file, force=steps.force)


def train_stages(run: RunConfig, steps: RankSteps, stages: list[int]) -> int:
    """Train stages: as a rank under a launcher, or by starting the run's ranks."""
    for number in stages:
        run.stage(number)
        world_size = environment_world_size() if under_launcher() else run.parallel.ranks
        steps.check_parallel(world_size, device_type())
        if steps.stage_is_done(number, say=is_first_rank()):
            continue
        if is_first_rank():
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


def evaluate_on_ranks(run: RunConfig, steps: RankSteps, tag: str | None) -> int:
    """Evaluate: as a rank under a launcher, or by starting the run's ranks."""
    if tag is None and steps.evaluate_is_done(say=is_first_rank()):
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


def train(run: RunConfig, options: Namespace) -> int:
    """Train the stage that is named, or all."""
    stages = [options.stage] if options.stage else [1, 2] if run.stage2 else [1]
    return train_stages(run, RankSteps(run, force=options.force, redo=True), stages)


def evaluate(run: RunConfig, options: Namespace) -> int:
    """Score the last checkpoints, or the one named; then write the report if asked to."""
    steps = RankSteps(run, force=options.force, redo=True)
    code = evaluate_on_ranks(run, steps, options.checkpoint)
    if options.report and is_first_rank():
        steps.report()
    return code


def one_step(run: RunConfig, options: Namespace) -> int:
    """A step that one process does."""
    getattr(RankSteps(run, force=options.force, redo=True, quiet=not is_first_rank()), options.verb)()
    return 0


def submit(run: RunConfig, options: Namespace) -> int:
    """The steps that are not done to SLURM."""
    from pipeline.cluster.submit import submit_run

    submit_run(RankSteps(run, quiet=True), until=options.until, dry_run=options.dry_run)
    return 0


def status(run: RunConfig, _options: Namespace) -> int:
    """Where each step is."""
    from pipeline.cluster.status import show_status

    show_status(RankSteps(run, quiet=True))
    return 0


def fetch(run: RunConfig, _options: Namespace) -> int:
    """What the run names on the hub."""
    from pipeline.run.fetch import fetch_run

    fetch_run(run)
    return 0


def check(options: Namespace) -> int:
    """What the ranks' network and software are like: as a rank, or by starting ranks on this machine."""
    from pipeline.cluster.check import check_ranks

    if under_launcher():
        return check_ranks(join(), options.megabytes)
    named = [options.run] if options.run else []
    sets = [f"--set={change}" for change in options.set]
    arguments = ["check", *named, *sets, "--megabytes", str(options.megabytes)]
    start_ranks(arguments, options.ranks, entry="check.sh")
    return 0


def estimate(run: RunConfig, options: Namespace) -> int:
    """What the run will take."""
    from pipeline.estimate.report import estimate as print_estimate

    return print_estimate(run, options)


DO: dict[str, Any] = {
    "run": run_all, "train": train, "evaluate": evaluate, "submit": submit, "status": status, "fetch": fetch,
    "estimate": estimate, "check": lambda _run, options: check(options),
    **dict.fromkeys(("tokenize", "similarity", "allocate", "upcycle", "report"), one_step),
}  # fmt: skip
