#!/usr/bin/env bash
# Accuracy of a model on a data set: bash scripts/mm_run.sh DATASET MODEL [OPTION...]
#
# DATASET and MODEL name files in config/task and config/model; an OPTION is one of `modeltest --help`, such as
# --limit 100. A run that was killed goes on when it is called again on the same day, or with the same DATE.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# The Python that has wemm.
PYTHON=${PYTHON:-python3}
DATE=${DATE:-$(date +%Y-%m-%d)}

names() {
  (cd "config/$1" && ls -- *.yaml | sed 's/\.yaml$//' | paste -sd ' ' -)
}

if [ $# -lt 2 ]; then
  echo "usage: mm_run.sh DATASET MODEL [OPTION...]; datasets: $(names task); models: $(names model)" >&2
  exit 1
fi
dataset=$1 model=$2
shift 2
if [ ! -f "config/task/$dataset.yaml" ]; then
  echo "unknown dataset $dataset; there are: $(names task)" >&2
  exit 1
fi
if [ ! -f "config/model/$model.yaml" ]; then
  echo "unknown model $model; there are: $(names model)" >&2
  exit 1
fi

exec "$PYTHON" -m modeltest \
  --model_config_path "config/model/$model.yaml" --task_config_path "config/task/$dataset.yaml" \
  --output_dir "output/$DATE/modeltest/$model/precision_result" --save_debug_enable --lcoc_disable "$@"
