#!/usr/bin/env bash
# Make the environment when it is missing, then run the whole test suite. Arguments go to pytest.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_environment
command -v g++ >/dev/null 2>&1 || die "g++ is needed by DeepSpeed's CPU communication (Debian: apt-get install g++)"
cd "$ROOT" || die "cannot enter $ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 GRADIO_ANALYTICS_ENABLED=False TOKENIZERS_PARALLELISM=false
# DeepSpeed builds its extension with the ninja of this environment.
export PATH="$VENV/bin:$PATH"
# Two workers, since many tests wait for processes that they start. A test that ends its worker does not end the run.
exec "$VENV/bin/python" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
