"""Basics without networks or images: errors, configuration, files, machine, random numbers, progress, signals."""
