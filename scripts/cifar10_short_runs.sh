#!/usr/bin/env bash
# Train each method for a few minutes on CIFAR-10's training images as class folders, then measure its features.
#
#   scripts/cifar10_short_runs.sh IMAGES OUT [METHOD ...]
#
# IMAGES holds one folder a class (50,000 images; a tenth is held out by hash). The number of steps that fit into
# SECONDS_A_RUN is measured first, so that the schedule comes to its end in time. PROTOCOLS says what is measured.
# Results: OUT/METHOD/eval/*.json. On a machine that does other work, THREADS=1 and twice the seconds spend the same
# processor time: threads that wait for each other in turn would waste most of it.
set -euo pipefail
images=$1 out=$2
shift 2
methods=("$@")
[ $# -gt 0 ] || methods=(moco_v2 simclr byol moco moco_v3)
seconds=${SECONDS_A_RUN:-600}
protocols=${PROTOCOLS:-knn linear}

arguments() {
  echo backbone=small dataset=folder dataset.root="$images" dataset.image_size=32 \
    "dataset.mean=[0.4914,0.4822,0.4465]" "dataset.std=[0.247,0.243,0.262]" \
    dataset.workers=1 train.batch_size="$(batch "$1")" launcher.threads="${THREADS:-null}"
  case $1 in # what differs from the recipes for hundreds of epochs: heads as small as the net, a rate for a short run
    simclr | moco_v2 | byol) echo experiment="cifar10_$1" ;;
    moco) echo experiment=cifar10_moco method.bn_group=32 ;;
    moco_v3) echo method=moco_v3 views=byol_cifar method.temperature=0.2 method.hidden=1024 train.warmup_epochs=0 ;;
    cpc | cpc_v2) echo method="$1" backbone=small_layernorm ;;
    *) echo method="$1" ;;
  esac
}

batch() {
  case $1 in
    cpc | cpc_v2 | deep_infomax) echo 64 ;; # their codes train on 16 to 64 images a step
    *) echo 256 ;;
  esac
}

for method in "${methods[@]}"; do
  # shellcheck disable=SC2046
  if [ ! -e "$out/$method/done" ]; then
    rm -rf "$out/$method.timing"
    ssl-train $(arguments "$method") train.max_steps=50 train.log_every=25 monitor.knn_every=0 \
      run_dir="$out/$method.timing" >/dev/null
    steps=$(python - "$out/$method.timing/metrics.jsonl" "$seconds" "$(batch "$method")" <<'P'
import json, sys
rate = json.loads(open(sys.argv[1]).readlines()[-1])["train/images_per_s"]
print(int(float(sys.argv[2]) * rate / int(sys.argv[3])))
P
    )
    ssl-train $(arguments "$method") train.max_steps="$steps" monitor.knn_every=4 run_dir="$out/$method"
  fi
  for protocol in $protocols; do
    ssl-eval run="$out/$method" protocol="$protocol"
  done
done
