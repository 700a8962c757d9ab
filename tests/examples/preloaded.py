"""What the trainer and the process that draws its pictures import, and look up for the first picture."""

import io

import chainer_ooc  # isort: skip  it makes stock Chainer importable

import chainermn
import mpi4py
import PIL.Image
import tensorboardX
import train
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from reports import confusion, drawing, plots

__all__ = [
    "PIL",
    "chainer_ooc",
    "chainermn",
    "confusion",
    "drawing",
    "mpi4py",
    "plots",
    "tensorboardX",
    "train",
]

figure = Figure(layout="constrained")
figure.subplots().plot([0, 1], label="a line")
FigureCanvasAgg(figure).print_png(io.BytesIO())
