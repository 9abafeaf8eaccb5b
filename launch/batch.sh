#!/usr/bin/env bash
# In a job of SLURM's: starts a step's ranks by srun, passes signals on to them, and keeps the job in the queue until the step is
# done. Ends with 0 only when it is. Usage: batch.sh COMMAND, what each rank runs, with these variables:
#   STEP               the step's name
#   STEP_DONE          the file that is there when the step is done
#   STEP_JOBS          the folder where events and errors are noted
#   STEP_RESTART       requeue, or chain: other jobs wait to resume the step, this one just ends
#   STEP_MAX_RESTARTS  how often
set -uo pipefail
restart=${SLURM_RESTART_COUNT:-0}
[ "$STEP_RESTART" = chain ] && restart=${STEP_ATTEMPT:-0}
export STEP_ERROR=$STEP_JOBS/$STEP.error # where a rank writes why trying again does not help
signal=
requeued=
mkdir -p "$STEP_JOBS"

note() {
  printf '%s job %s, start %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$((restart + 1))" "$*" |
    tee -a "$STEP_JOBS/$STEP.events"
}
stamp() { stat -c '%i %Y %s' "$STEP_DONE" 2>/dev/null; }
done_by_now() { [ -e "$STEP_DONE" ] && [ "$(stamp)" != "$before" ]; }
field() { scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | grep -o "\b$1=[^ ]*" | head -n 1 | cut -d= -f2; }
may_requeue() { [ "$STEP_RESTART" = requeue ] && [ "$restart" -lt "$STEP_MAX_RESTARTS" ]; }
requeue() {
  [ -z "$requeued" ] || return 0
  scontrol requeue "$SLURM_JOB_ID" && requeued=yes && note "requeued"
}
pass_on() {
  signal=$1
  note "$signal came; the ranks save and stop"
  kill -USR1 "$ranks" 2>/dev/null
  # At the time limit SLURM soon kills this script too: be queued again before.
  if [ "$(field Reason)" = TimeLimit ] && may_requeue && ! done_by_now; then
    requeue
  fi
}

if [ -e "$STEP_ERROR" ]; then
  if [ "$STEP_RESTART" = chain ] && [ "$restart" -gt 0 ]; then
    note "failed before: $(head -n 1 "$STEP_ERROR")"
    exit 2
  fi
  rm -f "$STEP_ERROR"
fi
if [ "$restart" -gt "$STEP_MAX_RESTARTS" ]; then
  note "failed: not done after $STEP_MAX_RESTARTS restarts; see the log, and raise cluster.max_restarts if it got on"
  exit 75
fi
before=$(stamp)
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-} # srun takes it from here alone
[ -n "$SRUN_CPUS_PER_TASK" ] || unset SRUN_CPUS_PER_TASK
note "starts on $SLURM_JOB_NODELIST"
srun --kill-on-bad-exit=1 "$@" &
ranks=$!
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
while :; do
  wait "$ranks"
  code=$?
  kill -0 "$ranks" 2>/dev/null || break # else a signal has ended the wait
done
trap '' USR1 TERM
wait "$ranks" 2>/dev/null # bash still knows the code, if the last wait gave the signal's
again=$?
[ "$again" = 127 ] || code=$again

if [ -e "$STEP_ERROR" ]; then
  note "failed: $(head -n 1 "$STEP_ERROR")"
  exit 2
fi
if done_by_now || { [ -e "$STEP_DONE" ] && [ "$code" = 0 ]; }; then
  note "done" # whatever a late signal made of the exit code
  exit 0
fi
how="exit code $code${signal:+ after $signal}"
if [ "$restart" -ge "$STEP_MAX_RESTARTS" ]; then
  note "failed: not done after $STEP_MAX_RESTARTS restarts ($how); see the log, and raise cluster.max_restarts if it got on"
  exit 75
fi
note "stopped before its end ($how)"
if [ "$STEP_RESTART" = chain ]; then
  exit 85 # the next job of the chain resumes the step
fi
# A job that SLURM is ending is cancelled, or preempted and queued again by SLURM itself; or it ran out of time.
if [ "$(field JobState)" = COMPLETING ] && [ "$(field Reason)" != TimeLimit ]; then
  note "ended by SLURM"
  exit 85
fi
requeue && sleep 300 # until SLURM ends this script
exit 85
