# Makes the virtual environment .venv in the checkout if it is not there, installs zoscale with the extras named in $1,
# and puts it on the PATH. To be sourced from the root of the checkout; returns another status than 0 where that fails.
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv && .venv/bin/python -m pip install --quiet --upgrade pip || return 1
fi
stamp=.venv/.installed-$(printf '%s' "${1:-}" | tr -c 'a-z\n' '_')
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "installing zoscale${1:-} into .venv ..."
  .venv/bin/python -m pip install --quiet -e ".${1:-}" && touch "$stamp" || return 1
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH
