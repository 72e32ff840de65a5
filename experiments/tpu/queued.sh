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
  while [[ $(state "$1") != ACTIVE ]]; do
    case $(state "$1") in
      '') qr create "$1" --node-id="$1" --accelerator-type="$TYPE" \
        --runtime-version="$RUNTIME" ${SPOT:+--spot} || true ;;
      FAILED | SUSPENDED) qr delete "$1" --force || true ;;
    esac
    sleep 30
  done
}

job() { # one policy's, to its end
  local name="mgrpo-$1" run
  run="cd mgrpo_jax && python -m experiments.train --config=$CONFIG \
    --bucket=$BUCKET --policy=$1 --workdir=$SHARED/$1 --processes=0 \
    --listen=0.0.0.0 --reached_as=\$(hostname -I | cut -d' ' -f1) \
    --token_file=$SHARED/token"
  for _ in $(seq "${ATTEMPTS:-50}"); do
    place "$name"
    if on_all "$name" "$SETUP" && on_all "$name" "$run"; then
      qr delete "$name" --force
      return
    fi
    echo "job of $1 ended early" >&2
    sleep 30
  done
  qr delete "$name" --force
  return 1
}

jobs=() failed=0
for policy in "$@"; do job "$policy" & jobs+=("$!"); done
for one in "${jobs[@]}"; do wait "$one" || failed=1; done
exit "$failed"
