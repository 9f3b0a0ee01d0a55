#!/usr/bin/env bash
# From an empty folder to a model that sees, hears and answers: install, make the toy world, pretrain its backbones, train
# the three stages, evaluate, and print the figures and the command that opens the chat. Safe to run twice, from any folder:
# what is done and unchanged is not done again. Arguments go to scripts/toy_world/quickstart.py (see --help).
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
began="$(date +%s)"
install_environment
cd "$ROOT" || die "cannot enter $ROOT"
free="$(df -Pk "$ROOT" | awk 'NR == 2 { print int($4 / 1048576) }')"
[ -d runs/quickstart/features ] || [ "$free" -ge 4 ] || die "4 GB of free disk are needed for the run; $ROOT has $free GB"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PATH="$VENV/bin:$PATH"
exec "$VENV/bin/python" scripts/toy_world/quickstart.py --install-seconds "$(($(date +%s) - began))" "$@"
