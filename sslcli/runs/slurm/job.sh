# From here on, the script is the same for every job. It starts one agent per node. When Slurm sends the warning signal,
# a training run saves a checkpoint, and the job is requeued.
attempt=${SLURM_RESTART_COUNT:-0}
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
warned="" over=""
trap 'warned=${warned:-now}' USR1
trap 'over=${over:-now}' TERM # sent if the job is canceled or reaches its time limit; the run also receives it and saves

note() { echo "$(date +%Y-%m-%dT%H:%M:%S) job $SLURM_JOB_ID attempt $attempt: $*" | tee -a "$folder/history.log"; }
field() { scontrol show job --oneliner "$SLURM_JOB_ID" | grep -oE "(^| )$1=[^ ]*" | cut -d = -f 2-; }
finish() {
  note "ended with exit code $1"
  echo "$1" >"$folder/$SLURM_JOB_ID.exit"
  exit "$1"
}

# Print why Slurm sent the warning signal. The reason is derived from the preemption time and the end time of the job.
cause() {
  case $(field PreemptTime) in "" | None | Unknown) ;; *) echo "preemption" && return ;; esac
  local end
  end=$(date -d "$(field EndTime)" +%s 2>/dev/null) || end=0
  if [ "$end" -gt 0 ] && [ $((end - $(date +%s))) -le $((warning + 90)) ]; then echo "the time limit"; else echo "a signal"; fi
}

requeue() { # REASON
  local state reason idle=0
  state=$(field JobState) reason=$(field Reason)
  if [ "$state" != RUNNING ] && [ "$reason" != TimeLimit ]; then # the job is canceled, or Slurm has already requeued it
    note "$1; the job is $state"
    finish 75
  fi
  if [ "$(saved)" = "$before" ]; then idle=$((10#$(grep -xE '[0-9]{1,9}' "$folder/idle" 2>/dev/null || echo 0) + 1)); fi
  echo "$idle" >"$folder/idle"
  if [ "$idle" -ge 3 ]; then
    note "$1; $idle consecutive attempts saved no $progress, so launcher.time or launcher.stop_before is too short: not requeued"
    finish 75
  fi
  note "$1; requeued ($((attempt + 1)) times so far)"
  rm -f "$folder/want_requeue"
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    note "scontrol requeue failed: run the same command again to resume"
    finish 75
  fi
  while kill -0 "$srun" 2>/dev/null; do sleep 1; done
  exit 0
}

# Print the exit code that the processes of the run recorded, since srun returns only the largest exit code. If the
# processes recorded none, print the argument.
exit_code() {
  for code in 2 3 75; do
    if grep -qsx "$code" "$folder"/codes/*; then echo "$code" && return; fi
  done
  echo "$1"
}

if [ "$attempt" -gt 0 ] && ! tail -n 1 "$folder/history.log" | grep -qE "requeued|queued again"; then
  note "the previous attempt recorded no end (a lost node, or preemption without time to stop): requeued by Slurm"
fi
note "starts on $SLURM_JOB_NODELIST"
[ "$attempt" -gt 0 ] || rm -f "$folder/idle"
before=$(saved)
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # suppress warnings about host names and closed stores
prepare || { note "launcher.setup ended with exit code $?" && finish 2; }
[ -z "$warned" ] || requeue "stopped by $(cause) before it started"

# USR1 is sent to every process of the step. The signal must not kill the agents, or a run that still imports modules.
# Therefore, the agents and their child processes ignore USR1 until the run installs its handler.
start_step() {
  export SSLCLI_RESTARTS=$((attempt + restarts))
  port=$((10000 + (SLURM_JOB_ID + 7919 * attempt + 104729 * restarts) % 20000))
  rm -rf "$folder/want_requeue" "$folder/codes"
  mkdir "$folder/codes"
  "${step[@]}" bash -c 'trap "" USR1; exec "$@"' agent "${agent[@]}" "$host:$port" &
  srun=$!
}

watch() {
  while kill -0 "$srun" 2>/dev/null; do
    sleep 1
    if [ "$warned" = now ]; then
      warned=$(cause)
      note "asked to stop by $warned"
    fi
    if [ "$over" = now ]; then
      over=yes
      note "terminated by Slurm: the job is $(field JobState), reason $(field Reason)"
    fi
    if [ -e "$folder/want_requeue" ]; then continue; fi
    if [ -n "$over" ] && [ "$(field Reason)" = TimeLimit ]; then requeue "the time limit was reached before the run was saved"; fi
    # The signal is lost if the run has no handler yet, so the signal is repeated until the run responds.
    if [ -n "$warned" ] && [ -z "$over" ]; then scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null; fi
  done
  wait "$srun"
  code=$?
  ls "$folder" >/dev/null # makes NFS show files that another node has written
  [ "$code" -eq 0 ] || code=$(exit_code "$code")
}

for ((restarts = 0; ; restarts++)); do
  start_step
  watch
  if [ -e "$folder/want_requeue" ]; then requeue "$(cat "$folder/want_requeue")${warned:+ ($warned)}"; fi
  case $code in 0 | 2 | 3 | 75) finish "$code" ;; esac
  # The signal kills a step that does not ignore it yet. After the requeue, the job continues from what it has saved.
  if [ -n "$warned" ]; then requeue "ended with exit code $code ($warned)"; fi
  if [ -n "$over" ] || [ "$restarts" -ge "$max_restarts" ]; then finish 3; fi
  note "a process crashed or was killed (exit code $code); all restart from $restarts_from" \
    "(restart $((restarts + 1)) of $max_restarts)"
done
