"""Labelled images: where they come from, how they are decoded, and in which order they are read.

What a trainer calls:

    from datasets.build import build
    from datasets.iterators import make_iterator, start_worker_server

    start_worker_server()                    # before MPI and the GPU, if iterator is "process"
    data = build(train="train.txt", val="val.txt", root="images", mean="mean.npy", insize=224,
                 seed=0, rank=rank, size=size)           # raises InputError, never communicates
    train = make_iterator(data.train, 32, iterator="process", workers=4, seed=(0, rank))
    val = make_iterator(data.val, 250, iterator="process", workers=4, repeat=False)

``build`` returns this rank's share as Chainer datasets of (image, label), and the numbers of all
ranks. An example that cannot be made is a ``preprocessed.BadExample`` in its batch.

With ``augmentation="resnet"``, say, no mean file is needed; ``dataset="cifar10", data_root="data"``
instead of ``train`` and ``val`` takes original files.

    decoding, resizing           from the bytes of a file to RGB pixels of some size
    labeled, folders, lmdb_images, datum, hdf5, arrays, originals, cifar, mnist, digits, in_memory
                                 sources: what offers name, label and image of each index
    opening                      the sources of a data set by its name or path
    statistics                   mean image, mean and standard deviation of each channel
    preprocessed                 sources through a transform; the order of an epoch
    build, iterators             the two entry points; process_iterator: workers and shared memory
"""
