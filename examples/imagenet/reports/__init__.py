"""What a run shows and leaves behind: table, progress bar, log, plots, TensorBoard, report."""

from reports.attach import Reports, extensions
from reports.confusion import KeepConfusion
from reports.figures import Synchronize
from reports.history import History
from reports.plots import write_plots
from reports.progress import Progress
from reports.summary import print_summary, summarize, write_summary
from reports.table import COLUMNS, Table, print_report
from reports.units import GIB, gibibytes, megabytes

__all__ = [
    "COLUMNS",
    "GIB",
    "History",
    "KeepConfusion",
    "Progress",
    "Reports",
    "Synchronize",
    "Table",
    "extensions",
    "gibibytes",
    "megabytes",
    "print_report",
    "print_summary",
    "summarize",
    "write_plots",
    "write_summary",
]
