"""The devices that hold arrays: ``ram/`` for NumPy, ``cuda/`` for CuPy; ``protocol.py`` is their interface."""
