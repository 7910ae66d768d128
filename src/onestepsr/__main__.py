"""``python -m onestepsr``: the command line, also for launchers that start several processes."""

from onestepsr.cli.main import main

main()
