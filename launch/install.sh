#!/usr/bin/env bash
# Installs the current directory and Python 3.12 into ~/venv, on machines whose own Python is older,
# as that of TPU machines.
#
#     launch/install.sh tpu,gcs
set -euo pipefail
extras=${1:?the extras, as tpu,gcs}
if [ ! -x ~/uv/bin/uv ]; then
    python3 -m venv ~/uv || {
        sudo apt-get --quiet update
        sudo apt-get --quiet --yes --option=DPkg::Lock::Timeout=300 install python3-venv
        python3 -m venv ~/uv
    }
    ~/uv/bin/pip install --quiet uv
fi
~/uv/bin/uv venv --quiet --allow-existing --python=3.12 ~/venv
~/uv/bin/uv pip install --quiet --python="$HOME/venv/bin/python" --editable ".[$extras]"
