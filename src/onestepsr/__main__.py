"""``python -m onestepsr``: the command line, also for launchers that start several processes."""

from onestepsr.apps.cli import main

main()
