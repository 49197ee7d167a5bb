# From here on every job is the same: start one agent a node; when Slurm warns, let the run save, then queue it again.
attempt=${SLURM_RESTART_COUNT:-0}
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
warned="" over=""
trap 'warned=${warned:-now}' USR1
trap 'over=${over:-now}' TERM # the job is cancelled, or its time is over; the run gets this signal as well, and saves

note() { echo "$(date +%Y-%m-%dT%H:%M:%S) job $SLURM_JOB_ID attempt $attempt: $*" | tee -a "$folder/history.log"; }
field() { scontrol show job --oneliner "$SLURM_JOB_ID" | grep -oE "(^| )$1=[^ ]*" | cut -d = -f 2-; }
newest() { ls "$checkpoints" 2>/dev/null | grep -xE "$checkpoint_pattern" | sort -V | tail -n 1; }
finish() {
  note "ended with exit code $1"
  echo "$1" >"$folder/$SLURM_JOB_ID.exit"
  exit "$1"
}

# Why Slurm warned: nothing tells but the times of the job.
cause() {
  case $(field PreemptTime) in "" | None | Unknown) ;; *) echo "preemption" && return ;; esac
  local end
  end=$(date -d "$(field EndTime)" +%s 2>/dev/null) || end=0
  if [ "$end" -gt 0 ] && [ $((end - $(date +%s))) -le $((warning + 90)) ]; then echo "the time limit"; else echo "a signal"; fi
}

queue_again() { # WHY
  local state reason idle=0
  state=$(field JobState) reason=$(field Reason)
  if [ "$state" != RUNNING ] && [ "$reason" != TimeLimit ]; then # cancelled, or queued again by Slurm already
    note "$1; the job is $state"
    finish 75
  fi
  if [ "$(newest)" = "$before" ]; then idle=$(($(cat "$folder/idle" 2>/dev/null || echo 0) + 1)); fi
  echo "$idle" >"$folder/idle"
  if [ "$idle" -ge 3 ]; then
    note "$1; $idle attempts in a row saved nothing, so launcher.time or launcher.stop_before is too short: not queued again"
    finish 75
  fi
  note "$1; queued again ($((attempt + 1)) times by now)"
  rm -f "$folder/want_requeue"
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    note "scontrol requeue was refused: start the same command again to go on"
    finish 75
  fi
  while kill -0 "$srun" 2>/dev/null; do sleep 1; done
  exit 0
}

# The run's own code where it could tell one: srun knows but the largest.
exit_code() {
  for code in 2 3 75; do
    if grep -qsx "$code" "$folder"/codes/*; then echo "$code" && return; fi
  done
  echo "$1"
}

if [ "$attempt" -gt 0 ] && ! tail -n 1 "$folder/history.log" | grep -q "queued again"; then
  note "the attempt before ended without a word (a lost node, or preemption without time to stop): queued again by Slurm"
fi
note "starts on $SLURM_JOB_NODELIST"
[ "$attempt" -gt 0 ] || rm -f "$folder/idle"
before=$(newest)
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # names that cannot be looked up, stores that end first
prepare || { note "launcher.setup ended with exit code $?" && finish 2; }
[ -z "$warned" ] || queue_again "stopped by $(cause) before it began"

# The signal for the run reaches every process of the step. The agents must not die of it, and neither must a run that
# is still importing; what is ignored stays ignored until the run takes it over.
begin() {
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
      note "told to end: the job is $(field JobState), for the reason $(field Reason)"
    fi
    if [ -e "$folder/want_requeue" ]; then continue; fi
    if [ -n "$over" ] && [ "$(field Reason)" = TimeLimit ]; then queue_again "the time limit came before the run was saved"; fi
    # A signal before the run listens is lost, so it is repeated until the run has answered.
    if [ -n "$warned" ] && [ -z "$over" ]; then scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null; fi
  done
  wait "$srun"
  code=$?
  ls "$folder" >/dev/null # makes NFS look for what another node wrote
  [ "$code" -eq 0 ] || code=$(exit_code "$code")
}

for ((restarts = 0; ; restarts++)); do
  begin
  watch
  if [ -e "$folder/want_requeue" ]; then queue_again "$(cat "$folder/want_requeue")${warned:+ ($warned)}"; fi
  case $code in 0 | 2 | 3 | 75) finish "$code" ;; esac
  # The signal can find a step that does not ignore it yet; the newest checkpoint is as good then.
  if [ -n "$warned" ]; then queue_again "ended with exit code $code ($warned)"; fi
  if [ -n "$over" ] || [ "$restarts" -ge "$max_restarts" ]; then finish 3; fi
  note "a process crashed or was killed (exit code $code); all start again from the last checkpoint" \
    "(restart $((restarts + 1)) of $max_restarts)"
done
