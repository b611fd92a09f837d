#!/usr/bin/env bash
# Everything that needs a GPU, in one command: tools/gpu_check.sh OUT [--only STEP] [--python PYTHON]
# docs/gpu_check.md says what it does and what it writes.
exec python3 "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
