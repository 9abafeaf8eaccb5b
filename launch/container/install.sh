#!/usr/bin/env bash
# While an image is built: installs the repository's requirements, and the repository, beside the torch that the image
# has, which stays. Usage: install.sh ROOT; $PYTHON, by default python, is the image's.
set -euo pipefail
root=$1
python=${PYTHON:-python}
torch_version() { "$python" -c 'import importlib.metadata; print(importlib.metadata.version("torch"))'; }

torch=$(torch_version)
case $torch in
  2.11.* | 2.12.* | 2.13.*) ;;
  *) echo "error: the image has torch $torch; 2.11 to 2.13 work: choose another tag" >&2; exit 2 ;;
esac
lists=$(mktemp -d)
trap 'rm -rf "$lists"' EXIT
grep -v '^torch==' "$root/requirements.txt" >"$lists/requirements.txt"
echo "torch==$torch" >"$lists/constraints.txt" # other packages need torch, too
"$python" -m pip install --no-cache-dir -r "$lists/requirements.txt" -c "$lists/constraints.txt"
"$python" -m pip install --no-cache-dir --no-deps -e "$root"
[ "$(torch_version)" = "$torch" ] || { echo "error: pip has replaced the image's torch $torch" >&2; exit 1; }
