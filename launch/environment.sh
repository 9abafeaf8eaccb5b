# Sourced: a Python with the given requirements. Uses $PYTHON, or makes .venv in the repository.
# After it, $python is set. Each requirements file is installed once, and again when it changes.
ensure_python() {
  local root=$1 base
  shift
  if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
  else
    for base in python3 python3.12 python3.11; do
      "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break || base=
    done
    [ -n "$base" ] || { echo "error: no Python 3.11 or 3.12 here; install one, or set PYTHON" >&2; exit 2; }
    python=$root/.venv/bin/python
    if [ ! -x "$python" ] || ! "$python" -m pip --version >/dev/null 2>&1; then
      rm -rf "$root/.venv"
      if ! "$base" -m venv "$root/.venv" >/dev/null 2>&1; then
        [ "$(id -u)" = 0 ] || { echo "error: $base can't make a virtual environment; install python3-venv, or set PYTHON" >&2; exit 2; }
        system_packages python3-venv
        rm -rf "$root/.venv"
        "$base" -m venv "$root/.venv"
      fi
    fi
  fi
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $python is $("$python" --version); Python 3.11 or 3.12 is needed: set PYTHON" >&2; exit 2; }
  local prefix file stamp
  prefix=$("$python" -c 'import sys; print(sys.prefix)')
  for file in "$@"; do
    stamp=$prefix/.installed-$(sha256sum <"$file" | cut -c1-16)
    [ -e "$stamp" ] && continue
    echo "installing $file" >&2
    "$python" -m pip install -q --disable-pip-version-check -r "$file" >&2
    touch "$stamp"
  done
}

# Debian packages, where they are missing and we are root. Processes that want some at once take turns.
system_packages() (
  [ "$(id -u)" = 0 ] && exec 9>/var/lock/moe-lpr-packages && flock 9
  missing=()
  for package in "$@"; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && exit
  echo "installing ${missing[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  install() { apt-get -o DPkg::Lock::Timeout=300 install -y -q --no-install-recommends "${missing[@]}" >/dev/null; }
  install 2>/dev/null || { apt-get update -q >/dev/null && install; }
)
