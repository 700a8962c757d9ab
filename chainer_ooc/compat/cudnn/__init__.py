"""``cupy.cudnn`` and ``cupy.cuda.cudnn`` on cuDNN 9, for stock Chainer on a CuPy without its own.

CuPy 14 dropped cuDNN; Chainer calls it through the two modules ``cupy.cudnn`` and
``cupy.cuda.cudnn`` and runs many times slower without them. This package provides both on the C API
of ``libcudnn.so.9`` (:mod:`ctypes`, nothing to compile):

* :mod:`.choice`     which cuDNN modules Chainer gets: CuPy's own, these, or none
  (``CHAINER_OOC_CUDNN``)
* :mod:`.library`    finding, loading and checking the library; :mod:`.prototypes`,
  :mod:`.constants`: its C API
* :mod:`.device`     the part of CuPy that is used; :mod:`.handles`, :mod:`.descriptors`
* :mod:`.math_mode`  strict float32 or TF32; :mod:`.workspace`, :mod:`.algorithms`,
  :mod:`.convolution`
* :mod:`.pooling`, :mod:`.normalization`, :mod:`.activation`, :mod:`.dropout`, :mod:`.spatial`,
  :mod:`.rnn_weights`, :mod:`.rnn`
* :mod:`.cupy_cudnn`, :mod:`.cupy_cuda_cudnn`: what the import hook registers under CuPy's names

Importing this package loads neither CuPy nor cuDNN.
"""
