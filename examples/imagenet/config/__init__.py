"""The settings of a run, from the command line and from YAML or JSON files.

``schema.py`` has every setting, ``job.py`` those of a job script; ``files.py`` reads files,
``command_line.py`` makes flags of the schema and merges: flags over file over defaults.
"""

from config.command_line import flag_name, parse_args, read_file, resolve
from config.job import Job
from config.schema import N_CLASSES, Config

__all__ = ["N_CLASSES", "Config", "Job", "flag_name", "parse_args", "read_file", "resolve"]
