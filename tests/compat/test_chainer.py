"""What each edit is for: it failed, or warned, on today's NumPy; here it gives the old result."""

from __future__ import annotations

import warnings

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import gradient_check, serializers, testing
from chainer.dataset import concat_examples

pytestmark = pytest.mark.filterwarnings("error")


def test_as_strided_backward():
    x = np.arange(6, dtype=np.float32)
    gy = np.ones((2, 3), np.float32)

    def strided(x):
        return F.as_strided(x, (2, 3), (2, 1), 0)

    np.testing.assert_array_equal(strided(x).array, [[0, 1, 2], [2, 3, 4]])
    gradient_check.check_backward(strided, x, gy, dtype=np.float64, atol=1e-4, rtol=1e-4)


def test_as_strided_refuses_to_differentiate_integers():
    from chainer.functions.array.as_strided import AsStridedGrad

    with pytest.raises(TypeError, match="Only float"):
        AsStridedGrad(None, (2,), (1,), 0).forward((np.arange(2),))


def test_resize_images():
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    y = F.resize_images(x, (3, 3), align_corners=True)
    np.testing.assert_allclose(y.array[0, 0], [[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]])


@pytest.mark.parametrize("wrap", [np.asarray, chainer.Variable])
def test_categorical_log_prob(wrap):
    p = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)
    log_prob = chainer.distributions.Categorical(p).log_prob(wrap(np.array([1, 0])))
    np.testing.assert_allclose(log_prob.array, np.log([0.75, 0.5]), rtol=1e-6)


def test_pad_sequence_with_a_negative_padding_wraps_around():
    xs = [np.array([1, 2], np.uint8), np.array([3], np.uint8)]
    np.testing.assert_array_equal(F.pad_sequence(xs, padding=-1).array, [[1, 2], [3, 255]])


def test_debug_print_names_the_cpu():
    assert "device: CPU" in chainer.Variable(np.zeros(2, np.float32)).debug_print()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sparse_matmul(dtype):
    pytest.importorskip("scipy")
    dense = np.array([[0, 2], [3, 0]], dtype)
    b = np.array([[1, 2], [3, 4]], dtype)
    y = F.sparse_matmul(chainer.utils.to_coo(dense), chainer.Variable(b))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.array, dense @ b)


def test_caffe_messages_are_read_back():
    from chainer.links.caffe.protobuf3 import caffe_pb2

    net = caffe_pb2.NetParameter(name="net")
    layer = net.layer.add(name="conv", type="Convolution")
    layer.convolution_param.num_output = 3
    layer.blobs.add().data.extend([1.5, 2.5])
    read = caffe_pb2.NetParameter.FromString(net.SerializeToString())
    assert read.layer[0].convolution_param.num_output == 3
    assert list(read.layer[0].blobs[0].data) == [1.5, 2.5]
    assert caffe_pb2.TEST == caffe_pb2.Phase.Value("TEST") == 1


def test_caffe_model_is_loaded_and_run(tmp_path):
    from chainer.links.caffe import CaffeFunction
    from chainer.links.caffe.protobuf3 import caffe_pb2

    net = caffe_pb2.NetParameter()
    layer = net.layer.add(name="fc", type="InnerProduct", bottom=["data"], top=["fc"])
    layer.inner_product_param.num_output = 2
    layer.inner_product_param.bias_term = False
    blob = layer.blobs.add()
    blob.data.extend(range(6))
    blob.shape.dim.extend([2, 3])
    path = tmp_path / "net.caffemodel"
    path.write_bytes(net.SerializeToString())
    x = np.ones((1, 3), np.float32)
    (y,) = CaffeFunction(str(path))(inputs={"data": x}, outputs=["fc"])
    np.testing.assert_array_equal(y.array, [[3, 12]])


@pytest.mark.parametrize("value", ["abc", "", "ü"])
def test_strings_are_read_from_hdf5_as_strings(tmp_path, value):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["text"] = value
    with h5py.File(tmp_path / "f.h5") as file:
        assert serializers.HDF5Deserializer(file)("text", "") == value
        assert serializers.HDF5Deserializer(file)("text", None)[()] == value


@pytest.mark.parametrize("save, load", [("save_npz", "load_npz"), ("save_hdf5", "load_hdf5")])
def test_a_trained_model_and_its_optimizer_are_saved_and_loaded(tmp_path, save, load):
    if "hdf5" in save:
        pytest.importorskip("h5py")

    def new():
        link = L.Classifier(L.Linear(4, 3))
        return link, chainer.optimizers.Adam().setup(link)

    (first, optimizer), (second, loaded) = new(), new()
    x, t = np.random.randn(5, 4).astype(np.float32), np.zeros(5, np.int32)
    optimizer.update(first, x, t)
    for source, target in ((first, second), (optimizer, loaded)):
        getattr(serializers, save)(tmp_path / "file.npz", source)
        getattr(serializers, load)(tmp_path / "file.npz", target)
    assert loaded.t == 1
    for one, two in zip(first.params(), second.params(), strict=True):
        np.testing.assert_array_equal(one.array, two.array)
        np.testing.assert_array_equal(one.update_rule.state["m"], two.update_rule.state["m"])


def test_examples_of_several_shapes_are_padded():
    x = concat_examples([np.ones((1, 3)), np.ones((2, 2))], padding=7)
    np.testing.assert_array_equal(x, [[[1, 1, 1], [7, 7, 7]], [[1, 1, 7], [1, 1, 7]]])


def test_fix():
    x = np.array([-1.5, -0.5, 0.5, 1.5], np.float32)
    np.testing.assert_array_equal(F.fix(x).array, [-1, 0, 0, 1])


def test_maxout_fills_its_weights_by_a_callable():
    def fill(array):
        array[...] = np.arange(array.size).reshape(array.shape)
        shapes.append(array.shape)

    shapes: list[tuple[int, ...]] = []
    link = L.Maxout(2, 3, 4, initialW=fill, initial_bias=fill)
    assert shapes == [(3, 4, 2), (3, 4)]
    np.testing.assert_array_equal(link.linear.W.array, np.arange(24).reshape(12, 2))
    np.testing.assert_array_equal(link.linear.b.array, np.arange(12))


def test_deconvolution_backward_without_forward_cover_all():
    link = L.Deconvolution2D(2, 3, 3, stride=2)
    x = chainer.Variable(np.random.randn(1, 2, 4, 4).astype(np.float32), requires_grad=False)
    function = F.connection.deconvolution_2d.Deconvolution2DFunction(stride=2)
    (y,) = function.apply((x, link.W))
    function.cover_all = None  # as the cuDNN and ChainerX paths leave it
    F.sum(y).backward()
    assert function.cover_all is False
    assert link.W.grad.shape == link.W.shape


@pytest.mark.parametrize("requirement, met", [("numpy>=1.26", True), ("numpy<1", False)])
def test_requirements_of_tests_are_checked(requirement, met):
    def test():
        pass

    decorated = testing.with_requires(requirement)(test)
    assert getattr(decorated, "__unittest_skip__", False) is not met
    decorated = testing.without_requires(requirement)(test)
    assert getattr(decorated, "__unittest_skip__", False) is met


def test_onnx_export(tmp_path):
    onnx = pytest.importorskip("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of ONNX's own import
        import onnx_chainer

    model = chainer.Sequential(L.Convolution2D(1, 2, 3), F.relu, L.Linear(8, 2))
    x = np.zeros((1, 1, 4, 4), np.float32)
    exported = onnx_chainer.export(model, x)
    onnx.checker.check_model(exported)
    assert [node.op_type for node in exported.graph.node][:2] == ["Conv", "Relu"]


X = np.zeros((8, 10), "f")
MISFITS = {
    "labels of another length": (F.softmax_cross_entropy, X, np.zeros(16, "i")),
    "labels of floats": (F.softmax_cross_entropy, X, np.zeros(8, "f")),
    "labels in a column": (F.softmax_cross_entropy, X, np.zeros((8, 1), "i")),
    "unsigned labels": (F.softmax_cross_entropy, X, np.zeros(8, np.uint8)),
    "labels as booleans": (F.softmax_cross_entropy, X, np.zeros(8, bool)),
    "scores of integers": (F.softmax_cross_entropy, np.zeros((8, 10), "i"), np.zeros(8, "i")),
    "scores of one image": (F.softmax_cross_entropy, X[0], np.array(3)),
    "images in two dimensions": (F.softmax_cross_entropy, X[..., None], np.zeros((8, 2), "i")),
    "an axis beyond the last": (F.softmax, X, 2),
    "an axis before the first": (F.log_softmax, X, -3),
    "a softmax of integers": (F.softmax, np.zeros((8, 10), "i"), 1),
    "no dimension": (F.log_softmax, np.array(0.5, "f"), 0),
    "too few dimensions": (F.shift, np.zeros((4, 3), "f"), 3),
    "a convolution of a matrix": (F.convolution_2d, X, np.zeros((3, 3, 3, 3), "f")),
}


@pytest.mark.parametrize("function, args", [(f, a) for f, *a in MISFITS.values()], ids=MISFITS)
def test_what_does_not_fit_is_told_in_chainers_own_words(function, args):
    with pytest.raises(chainer.utils.type_check.InvalidType) as error:
        function(*args)
    expected, actual = str(error.value).split("Actual: ")
    assert "Expect: " in expected
    assert actual
    assert "Expr instance" not in str(error.value)


def test_what_fits_is_computed_as_before():
    t = np.arange(8, dtype="i")
    loss = F.softmax_cross_entropy(X, t).array
    assert loss == np.float32(np.log(10))
    soft = np.full((8, 10), 0.1, "f")
    np.testing.assert_allclose(F.softmax_cross_entropy(X, soft).array, np.log(10), rtol=1e-6)
    for axis in (-2, -1, 0, 1):
        probabilities = F.softmax(X, axis).array
        np.testing.assert_allclose(probabilities.sum(axis), 1, rtol=1e-6)
        np.testing.assert_allclose(np.exp(F.log_softmax(X, axis).array), probabilities, rtol=1e-6)
