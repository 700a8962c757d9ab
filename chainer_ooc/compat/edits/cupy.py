"""Edits of Chainer's and ChainerMN's GPU code for CuPy 14."""

from __future__ import annotations

from chainer_ooc.compat.edits import Edit, Replace

_ATOMIC = "atomicAdd of float16 takes float16, but the product of two is a float: cast it back"

_USE_CUDNN = "chainer.should_use_cudnn('>=auto', 5000)"

EDITS = (
    Edit(
        "chainer.backends.cuda",
        "it advises to reinstall CuPy where it runs without cuDNN for a reason that is known and has been said",
        (
            Replace(
                "            not _cudnn_disabled_by_user and\n",
                "            not _cudnn_disabled_by_user and"
                " not getattr(_resolution_error, 'has_been_said', False) and\n",
            ),
        ),
    ),
    *(
        Edit(
            f"chainer.functions.rnn.{module}",
            "recurrent networks on cuDNN are a setting of their own (CHAINER_OOC_CUDNN_RNN)",
            (
                Replace(
                    _USE_CUDNN,
                    f"{_USE_CUDNN} and getattr(cuda.cudnn, 'rnn_enabled', lambda: True)()",
                ),
            ),
        )
        for module in ("n_step_rnn", "n_step_lstm", "n_step_gru")
    ),
    Edit(
        "chainer.functions.connection.deconvolution_2d",
        "a bug of the 7.8.1 release: arrays are passed where shapes are expected",
        (Replace("self._set_cover_all(x, W)", "self._set_cover_all(x.shape, W.shape)"),),
    ),
    Edit(
        "chainer.functions.array.resize_images",
        _ATOMIC,
        tuple(Replace(f", w{i} * gy);", f", (T)(w{i} * gy));") for i in range(4)),
    ),
    *(
        Edit(
            f"chainer.functions.pooling.{module}",
            "max of a float (the difference of two float16) and a float16 is ambiguous: cast it back",
            tuple(
                Replace(
                    f"max(roi_end_{axis} - roi_start_{axis}, (T)1.)",
                    f"max((T)(roi_end_{axis} - roi_start_{axis}), (T)1.)",
                    times=2,
                )
                for axis in "hw"
            ),
        )
        for module in ("roi_average_align_2d", "roi_max_align_2d")
    ),
    Edit(
        "chainer.functions.loss.negative_sampling",
        _ATOMIC,
        (
            Replace(
                "atomicAdd(&gW[k * c + j], gi * x[(i / m) * c + j]);",
                "atomicAdd(&gW[k * c + j], (T)(gi * x[(i / m) * c + j]));",
            ),
        ),
    ),
    Edit(
        "chainer.links.loss.hierarchical_softmax",
        _ATOMIC,
        (
            Replace("(&gx[x_ind], g * w[w_ind])", "(&gx[x_ind], (T)(g * w[w_ind]))"),
            Replace("(&gw[w_ind], g * x[x_ind])", "(&gw[w_ind], (T)(g * x[x_ind]))"),
        ),
    ),
    Edit(
        "chainer.training.updaters.multiprocess_parallel_updater",
        "CuPy no longer defines float16 in kernels whose arguments have none",
        (
            Replace(
                "        loop_prep='''\n",
                "        preamble='#include <cupy/float16.cuh>', loop_prep='''\n",
                times=2,
            ),
        ),
    ),
    Edit(
        "chainermn.communicators._memory_utility",
        "CuPy no longer includes the header of half",
        (
            Replace(
                "#include <cupy/carray.cuh>\n",
                "#include <cupy/carray.cuh>\n#include <cuda_fp16.h>\n",
                times=2,
            ),
        ),
    ),
    Edit(
        "chainermn.communicators._memory_utility",
        "copy=False now raises when a copy is needed, here to another dtype",
        (Replace("xp.array(v, copy=False, dtype=", "xp.array(v, copy=None, dtype="),),
    ),
)
