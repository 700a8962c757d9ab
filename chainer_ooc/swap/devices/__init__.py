"""What holds the arrays: NumPy in RAM (``ram.py``), CuPy on a GPU (``cuda.py``)."""
