#!/usr/bin/env bash
# Trains a team on TPU slices, one for each policy named, by queued resources of
# Google Cloud. A slice that is taken away is asked for again; docs/pods.md.
set -euo pipefail

: "${PROJECT:?}" "${ZONE:?}"
: "${TYPE:?of each slice, such as v6e-16}" "${RUNTIME:?such as v2-alpha-tpuv6e}"
: "${CONFIG:?a recipe}" "${BUCKET:?gs://…, of the run}"
: "${SETUP:?command of every host: installs, mounts SHARED}"
: "${SHARED:?folder that outlives slices, with the file token}"
at=(--project="$PROJECT" --zone="$ZONE" --quiet)
qr() { gcloud compute tpus queued-resources "$@" "${at[@]}"; }
on_all() { gcloud compute tpus tpu-vm ssh "$1" --worker=all --command="$2" "${at[@]}"; }
state() { qr describe "$1" --format='value(state.state)' 2>/dev/null || true; }

place() { # waits for a slice; one that is lost makes room for another
  local now refused=0 lost=0 most="${ATTEMPTS:-50}"
  while now=$(state "$1"); [[ -e $going ]] || return 1; [[ $now != ACTIVE ]]; do
    case $now in
      '') qr create "$1" --node-id="$1" --accelerator-type="$TYPE" \
        --runtime-version="$RUNTIME" ${SPOT:+--spot} || {
        refused=$((refused + 1))
        echo "$1: request for a slice refused, $refused of $most times" >&2
      } ;;
      FAILED | SUSPENDED)
        lost=$((lost + 1))
        echo "$1: slice is $now, $lost of $most times before any ran" >&2
        qr delete "$1" --force ;;
      *) refused=0 ;; # it stands in the queue, for as long as that takes
    esac
    ((refused < most && lost < most)) || return 1
    sleep 30
  done
}

job() { # one policy's, to its end; a process of its own
  name="mgrpo-$1" code=1
  run="cd mgrpo_jax && python -m experiments.train --config=$CONFIG \
    --bucket=$BUCKET --policy=$1 --workdir=$SHARED/$1 --processes=0 \
    --listen=0.0.0.0 --reached_as=\$(hostname -I | cut -d' ' -f1) \
    --token_file=$SHARED/token"
  trap 'qr delete "$name" --force || true' EXIT
  trap 'exit 1' TERM
  for _ in $(seq "${ATTEMPTS:-50}"); do
    code=1
    place "$name" || break
    if on_all "$name" "$SETUP"; then
      code=0
      on_all "$name" "$run" || code=$? # that of its first host that failed
      ((code != 0 && code != 2)) || break
    fi
    echo "job of $1 ended early, with code $code" >&2
    sleep 30
  done
  if ((code)); then # who waits for it would wait in vain
    rm -f "$going"
    echo "job of $1 is given up, and with it all jobs; code $code" >&2
  fi
  ((code == 0 || code == 2)) || code=1
  return "$code"
}

jobs=() ended=0 going=$(mktemp) # while it is there, jobs are tried again
# However this ends, each job, a process group by -m, gives its slice back.
trap 'rm -f "$going"; kill -- "${jobs[@]/#/-}" 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
set -m
for policy in "$@"; do job "$policy" </dev/null & jobs+=("$!"); done
for one in "${jobs[@]}"; do
  code=0
  wait "$one" || code=$?
  ((ended == 2 || code == 0)) || ended=$code
done
exit "$ended"
