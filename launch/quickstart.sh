#!/usr/bin/env bash
# The whole method on a real model and real text, on this machine's CPU: bash launch/quickstart.sh [--set key=value …]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
. launch/environment.sh
ensure_python "$root" requirements.txt
run=launch/runs/quickstart.yaml
sets=()
words=("$@")
for ((i = 0; i < ${#words[@]}; i++)); do
  case ${words[i]} in
    --set) [ $((i + 1)) -lt ${#words[@]} ] && sets+=(--set "${words[i + 1]}") ;;
    --set=*) sets+=("${words[i]}") ;;
  esac
done
case " ${sets[*]-} " in
  *" deepspeed="*) ;;
  *) if "$python" -c 'import sys; from pipeline.run.checks import has_slow_bf16; sys.exit(not has_slow_bf16())'; then
       echo "quickstart: this CPU has no instructions for bf16, so it computes in fp32 (ds_configs/fp32_zero1.json)"
       set -- "$@" --set deepspeed=ds_configs/fp32_zero1.json
     fi ;;
esac
"$python" -m data_prep.demo "$run" ${sets[@]+"${sets[@]}"}
exec "$python" -m pipeline run "$run" "$@"
