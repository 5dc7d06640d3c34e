#!/usr/bin/env bash
# Answers, or speed, on every image of a directory. Without arguments it says how it is called.
set -euo pipefail

# Edit these, or set them in the environment.
LORA_ADAPTER_ID=${LORA_ADAPTER_ID:-wemm}
TP_WORLD_SIZE=${TP_WORLD_SIZE:-1}
PERFORMANCE_MAX_BATCH_SIZE=${PERFORMANCE_MAX_BATCH_SIZE:-1}
PERFORMANCE_MAX_OUTPUT_LENGTH=${PERFORMANCE_MAX_OUTPUT_LENGTH:-256}
PRECISION_MAX_BATCH_SIZE=${PRECISION_MAX_BATCH_SIZE:-1}
# One text for all images, or one per image.
[ -n "${TEXTS+set}" ] || TEXTS=("${input_texts_for_image:-请详细描述这张图片。}")
# The Python that has the requirements.
PYTHON=${PYTHON:-python3}

directory=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat >&2 << USAGE
usage: run_pa.sh --precision | --performance  [--trust_remote_code]  MODEL IMAGES  [--input_texts_for_image TEXT...]
  MODEL   checkpoint directory, also as --model_path MODEL
  IMAGES  directory of images, also as --image_or_video_path IMAGES
--precision writes ./examples/models/wemm/predict_result.json, --performance wemm_performance.csv beside it.
USAGE
  exit 1
}

fail() {
  echo "$1" >&2
  exit 1
}

precision=false performance=false trust=() model='' images=''

[ $# -gt 0 ] || usage
while [ $# -gt 0 ]; do
  case $1 in
    --precision) precision=true ;;
    --performance) performance=true ;;
    --trust_remote_code) trust=(--trust_remote_code) ;;
    --model_path | --image_or_video_path)
      [ $# -gt 1 ] || fail "$1 needs a value"
      if [ "$1" = --model_path ]; then model=$2; else images=$2; fi
      shift
      ;;
    --input_texts_for_image)
      TEXTS=()
      while [ $# -gt 1 ] && [ "${2#--}" = "$2" ]; do
        TEXTS+=("$2")
        shift
      done
      [ ${#TEXTS[@]} -gt 0 ] || fail "--input_texts_for_image needs a text"
      ;;
    -*) fail "Unknown parameter: $1" ;;
    *)
      if [ -z "$model" ]; then
        model=$1
      elif [ -z "$images" ]; then
        images=$1
      else
        fail "Unknown parameter: $1"
      fi
      ;;
  esac
  shift
done
$precision || $performance || fail "give --precision or --performance"
[ -n "$model" ] || fail "give the model: --model_path MODEL"
[ -n "$images" ] || fail "give the directory of images: --image_or_video_path IMAGES"

run() {
  "$PYTHON" "$directory/wemm.py" --model_path "$model" --image_or_video_path "$images" \
    --input_texts_for_image "${TEXTS[@]}" --lora_adapter_id "$LORA_ADAPTER_ID" --tp "$TP_WORLD_SIZE" \
    --skip_special_tokens ${trust[@]+"${trust[@]}"} "$@"
}

if $precision; then
  run --prediction_result --max_batch_size "$PRECISION_MAX_BATCH_SIZE"
fi
if $performance; then
  for ((batch = 1; batch <= PERFORMANCE_MAX_BATCH_SIZE; batch++)); do
    run --performance --ignore_eos --max_batch_size "$batch" --max_output_length "$PERFORMANCE_MAX_OUTPUT_LENGTH"
  done
fi
