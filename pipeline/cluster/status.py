"""Where each step of a run is: done, running, waiting, failed, cancelled, stopped or to do."""

import datetime
import statistics

from common.errors import UserError
from common.text_table import aligned
from pipeline.cluster import slurm
from pipeline.cluster.jobs import Job, jobs_of
from pipeline.cluster.submit import jobs_done
from pipeline.cluster.submitted import read_submitted
from pipeline.records.metrics import StepRow
from pipeline.records.run_folder import METRICS_FILE
from pipeline.run.context import RunContext

RECENT = 50  # steps whose mean time tells how long the rest takes


def show_status(context: RunContext) -> None:
    """Print a line for each job of the run."""
    rows = [["step", "state", "job", "where it is", "log"]]
    rows += [[row[key] for key in ("step", "state", "job", "progress", "log")] for row in run_status(context)]
    print(aligned(rows), flush=True)


def run_status(context: RunContext) -> list[dict[str, str]]:
    """For each job, its state and what there is to say about it."""
    submitted = read_submitted(context.run)
    numbers = [number for known in submitted.values() for number in known]
    states = slurm.job_states(numbers) if slurm.is_here() else {}
    done, changed = [], ""
    try:
        # Asked after what is active: a job that ends meanwhile has left its results.
        for name in jobs_done(context):
            done.append(name)
    except UserError as error:
        changed = str(error)
    rows, failed_before = [], ""
    for job in jobs_of(context.run):
        known = [states[number] for number in submitted.get(job.name, []) if number in states]
        if job.name in done:
            state, progress = "done", _figures(context, job)
        elif changed and job.done_file.is_file():
            state, progress = "changed", changed
        else:
            state, progress = _state(job, known, bool(submitted.get(job.name)), failed_before)
        if state in ("failed", "cancelled"):
            failed_before = failed_before or job.name
        shown = next((job_state for job_state in known if job_state.is_active), known[-1] if known else None)
        number = shown.number if shown else " ".join(submitted.get(job.name, [])[:1])
        log = str(job.log) if job.log.is_file() else ""
        rows.append({"step": job.name, "state": state, "job": number, "progress": progress, "log": log})
    return rows


def _state(job: Job, known: list[slurm.JobState], was_submitted: bool, failed_before: str) -> tuple[str, str]:
    """The state of a job that is not done, and what there is to say about it."""
    active = next((state for state in known if state.is_active), None)
    progress = stage_progress(job)
    if active and active.state in ("RUNNING", "SUSPENDED", "COMPLETING"):
        limit = f"limit in {active.time_left}" if active.time_left not in ("", "INVALID", "UNLIMITED") else ""
        return "running", "; ".join(part for part in (progress, limit) if part)
    last = last_event(job)
    if active:
        if active.reason == "Dependency":
            return "waiting", "for the step before it"
        again = f"to resume: {last}" if last else ""
        return "waiting", "; ".join(part for part in (active.reason, again, progress) if part)
    if not was_submitted:
        return ("stopped", progress) if progress else ("to do", "")
    if job.error.is_file():
        return "failed", job.error.read_text(encoding="utf-8").strip().splitlines()[0].removeprefix("error: ")
    if last or job.log.is_file():
        state = known[-1].state.lower() if known else ""
        if "cancel" in state:
            return "cancelled", "; ".join(part for part in (last, progress) if part)
        return "failed", "; ".join(part for part in (last, f"SLURM says {state}" if state else "", progress) if part)
    return "cancelled", f"did not start, as {failed_before} {'failed' if failed_before else 'did not end well'}"


def last_event(job: Job) -> str:
    """The last line that the batch script has noted, without date and number."""
    if not job.events.is_file():
        return ""
    lines = job.events.read_text(encoding="utf-8").splitlines()
    return lines[-1].split(": ", 1)[-1] if lines else ""


def stage_progress(job: Job) -> str:
    """How far a stage is by its metrics: step, speed, and the time that the rest takes."""
    rows = StepRow.load_rows(job.run.folder / job.name / METRICS_FILE)
    if not rows:
        return ""
    [number] = [number for number in job.run.stage_numbers if job.name == f"stage{number}"]
    total = job.run.stage(number).num_steps
    recent = rows[-RECENT:]
    seconds = statistics.mean(row.seconds for row in recent)
    speed = statistics.mean(row.tokens_per_second for row in recent)
    left = datetime.timedelta(seconds=round((total - rows[-1].step) * seconds))
    return f"step {rows[-1].step:,} of {total:,}, {speed:,.0f} tokens/s, {left} left"


def _figures(context: RunContext, job: Job) -> str:
    """What a job that is done took."""
    figures = [manifest.figures for manifest in context.folder.manifests(step.name for step in job.steps).values()]
    seconds = round(sum(entry.get("seconds", 0) for entry in figures))
    text = f"in {datetime.timedelta(seconds=seconds)}"
    if "steps" in figures[0]:
        return f"{figures[0]['steps']:,} steps, {figures[0]['tokens_per_second']:,.0f} tokens/s, last session {text}"
    return text
