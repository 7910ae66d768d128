#!/bin/sh
# Install onestepsr with its server into an environment of its own: install.sh SOURCE ENVIRONMENT
# The steps of the Dockerfile beside this file; also of use without a container. PYTHON names another interpreter.
set -eu
source=$1 environment=$2
"${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/pip" install -q -c "$source/constraints.txt" "$source[serve]"
"$environment/bin/onestepsr" --version
"$environment/bin/onestepsr" serve --help > /dev/null
