"""The steps of random programs: each kind is a function that returns source."""

# ruff: noqa: E501 - a line of a program is a line here
from __future__ import annotations

import random
from collections.abc import Callable

__all__ = ["KINDS", "LAST", "Names", "ending", "leaf", "unary"]

SHAPES = ((1, 1), (3, 4), (0, 4), (7, 64), (40, 64), (64, 300), (128, 256), (256, 512), (512, 1024))
SIZES = (1, 30, 2000, 20000, 70000, 600000)  #: elements of temporaries
ERRORS = (
    'KeyError("k")',
    'ValueError("v", 3)',
    'OSError(2, "no file", "name")',
    'Alarm("a")',
    'KeyboardInterrupt("c")',
    "StopIteration(5)",
    'MemoryError("m")',
    'Budget("b")',
    "GeneratorExit()",
    'ExceptionGroup("g", [KeyError(1), OSError(5, "e")])',
    'TimeoutError("late")',
    "AssertionError()",
    "SystemExit(4)",
)
UNARY = (
    "F.exp({x})",
    "F.sin({x})",
    "F.tanh({x})",
    "F.relu({x})",
    "F.sigmoid({x})",
    "F.dropout({x}, 0.3)",
    "F.log1p(F.absolute({x}))",
    "F.softmax({x})",
    "F.clipped_relu({x}, 0.5)",
    "F.leaky_relu({x})",
    "F.elu({x})",
    "F.softplus({x})",
    "F.square({x})",
    "F.transpose(F.transpose({x}))",
    "F.concat([{x}, {x}[:1]], 0)[1:]",
    "F.broadcast_to(F.sum({x}, axis=0, keepdims=True), {x}.shape)",
    "F.normalize({x})",
    "F.forget(lambda h: F.tanh(F.sin(h)), {x})",
    "F.tanh({x}[::-1])",
    "F.cast(F.sin(F.cast({x}, 'd')), {x}.dtype)",
    "F.where({x}.array > 0, {x}, {x} * 2)",
    "F.tanh(F.reshape({x}, (-1,))).reshape({x}.shape)",
    "F.layer_normalization({x}, np.ones({x}.shape[1], {x}.dtype), np.zeros({x}.shape[1], {x}.dtype))",
    "Own().apply(({x}, {x}))[0]",
    "F.maximum({x}, {x} * 0.5)",
    "F.clip({x}, -0.5, 0.5)",
    "F.identity({x}) ** 2",
    "F.swapaxes({x}, 0, 1).T",
    "F.tile({x}, (1, 2))[:, ::2]",
    "F.pad({x}, 1, 'constant')[1:-1, 1:-1]",
)
BINARY = (
    "{x} * {y}",
    "{x} + F.sin({y})",
    "{x} - {y} * 0.5",
    "F.maximum({x}, {y})",
    "Own().apply(({x}, {y}))[0]",
    "F.matmul({x}, {y}, transb=True)",
    "F.tanh({x}) / (F.square({y}) + 1)",
    "F.concat([{x}, {y}])",
    "F.where({x}.array > {y}.array, {x}, {y})",
    "F.squared_error({x}, {y})",
)
OPTIMIZERS = (
    "chainer.optimizers.SGD(0.01)",
    "chainer.optimizers.MomentumSGD(0.01)",
    "chainer.optimizers.Adam()",
    "chainer.optimizers.RMSprop()",
    "chainer.optimizers.AdaDelta()",
)
HOOKS = (
    "chainer.optimizer.WeightDecay(0.01)",
    "chainer.optimizer.GradientClipping(0.5)",
    "chainer.optimizer.Lasso(0.01)",
    "chainer.optimizer.GradientNoise(0.01)",
)
EDITS = (
    "{a} *= 0.5",
    "{a}[...] *= 0.9",
    "{a}[:1] = 3",
    "np.add({a}, 1, out={a})",
    "{a}.T[:1] += 1",
    "{a}.fill(0.25)",
    "{a}.sort()",
    "np.copyto({a}, {a}[::-1])",
    "{a}.flat[:3] = 1",
    "np.add.at({a}, ([0],), 1)",
    "{a}.view('u1')[..., :1] ^= 1",
    "memoryview({a}).cast('B')[0:1] = b'x'",
    "np.negative({a}, {a})",
    "{a}.reshape(-1)[::2] = {a}.reshape(-1)[::2] * 2",
    "{a}[{a} > 0] = 0.125",
    "np.put({a}, [0], 7)",
    "np.multiply({a}, {a}, out={a}, where={a} > 0)",
    "np.random.shuffle({a})",
    "np.einsum('ij->ij', {a}, out={a})",
    "np.nan_to_num({a}, copy=False)",
    "{a}[:] = np.where({a} > 0, {a}, 0)",
)
LAST = (
    "",
    "",
    'raise KeyError("last")',
    "sys.exit(3)",
    'sys.exit("a message")',
    "add(np.ones(30000, 'f') * 2, fail(ValueError('last')))",
    "kill(error=KeyboardInterrupt)",
    "os._exit(5)",
    "print('the end'); finalizer = Finalizer(lambda: print('died', np.ones(30000).sum()))",
    "kept = [F.tanh(F.exp(F.sin(chainer.Variable(rand((200, 100)))))) for _ in range(3)]",
    "import atexit; atexit.register(lambda: print(float(F.sum(F.exp(chainer.Variable(rand((200, 100))))).array)))",
    "thread = threading.Thread(target=lambda: add(np.ones(30000), fail(KeyError('in a thread')))); thread.start()",
)


class Names:
    """What a program has given names to so far, as far as it went well.

    Args:
        rng: Where all that is random comes from.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.leaves: list[str] = []
        self.variables: dict[str, tuple[int, ...]] = {}
        self.arrays: list[str] = []
        self.nets: list[tuple[str, str]] = []
        self.count = 0

    def new(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def variable(self) -> str:
        known = list(self.variables)
        return self.rng.choice(known[-4:] if self.rng.random() < 0.7 else known)

    def shape(self) -> tuple[int, ...]:
        return self.rng.choice(SHAPES)

    def error(self) -> str:
        return self.rng.choice(ERRORS)

    def size(self) -> int:
        return self.rng.choice(SIZES)

    def seed(self) -> int:
        return self.rng.randrange(100)

    def function(self) -> str:
        """Return a ``lambda`` that builds a small graph of its own, runs backward and returns the gradient."""
        shape = self.rng.choice(SHAPES[1:8])
        chain = "h"
        for _ in range(self.rng.randint(1, 4)):
            chain = self.rng.choice(UNARY).format(x="h") if chain == "h" else f"F.sin({chain})"
        return (
            f"lambda *_: (lambda x: ((lambda h: F.sum({chain}).backward())(F.exp(x)), x.grad)[1])"
            f"(chainer.Variable(rand({shape}, seed={self.seed()})))"
        )


def leaf(names: Names) -> str:
    name, shape = names.new("x"), names.shape()
    dtype = names.rng.choices(["f", "d", "e"], [8, 1, 1])[0]
    layout = names.rng.choices(
        ["C", "F", "strided", "reversed", "broadcast", "offset", "unaligned"],
        [12, 2, 2, 1, 1, 1, 1],
    )[0]
    names.leaves.append(name)
    names.variables[name] = shape
    kind = names.rng.choice(["chainer.Variable", "chainer.Variable", "chainer.Parameter"])
    return f"{name} = {kind}(rand({shape}, {dtype!r}, {names.seed()}, {layout!r}))\nsee({name})"


def unary(names: Names) -> str:
    x, name = names.variable(), names.new("v")
    text = names.rng.choice(UNARY).format(x=x)
    for _ in range(names.rng.choice([0, 0, 1, 3])):
        text = names.rng.choice(UNARY[:16]).format(x=text) if len(text) < 300 else f"F.sin({text})"
    names.variables[name] = names.variables[x]
    return f"{name} = {text}" + names.rng.choice(["", f"\nsee({name})"])


def binary(names: Names) -> str:
    x, y, name = names.variable(), names.variable(), names.new("v")
    if names.variables[x] != names.variables[y] and names.rng.random() < 0.8:
        y = x
    names.variables[name] = names.variables[x]
    return f"{name} = {names.rng.choice(BINARY).format(x=x, y=y)}\nsee({name})"


def backward(names: Names) -> str:
    y = names.variable()
    retain = names.rng.choice(
        ["", "", "retain_grad=True", "enable_double_backprop=True", "loss_scale=2."]
    )
    again = names.rng.choice(["", "", f"; F.sum({y}).backward()"])
    text = names.rng.choice(
        [f"F.sum({y}).backward({retain}){again}", f"F.sum(F.sin({y})).backward({retain}){again}"]
    )
    if names.rng.random() < 0.2:
        text = f"{y}.grad = rand({y}.shape, {y}.dtype, 3); {y}.backward({retain})"
    return f"{text}\nsee({', '.join(names.leaves)})"


def grad(names: Names) -> str:
    y, double = names.variable(), names.rng.random() < 0.6
    leaves = ", ".join(names.leaves[:2])
    text = f"gs = chainer.grad([F.sum(F.sin({y}))], [{leaves}], enable_double_backprop={double})\nsee(gs)"
    if double:
        text += f"\nF.sum(sum(F.sum(g * g) for g in gs if g is not None)).backward()\nsee({leaves})"
    return text + "\ndel gs"


def drop(names: Names) -> str:
    kind = names.rng.randrange(4)
    intermediate = [name for name in names.variables if name not in names.leaves]
    if kind == 0 or len(intermediate) < 2:
        return "gc.collect()\n" + "\n".join(f"{x}.cleargrad()" for x in names.leaves)
    name = names.rng.choice(intermediate)
    if kind == 1:
        return f"{name}.{names.rng.choice(['unchain', 'unchain_backward'])}()\nsee({name})"
    del names.variables[name]
    return f"del {name}"


def take(names: Names) -> str:
    v, name = names.variable(), names.new("a")
    names.arrays.append(name)
    text = names.rng.choice(
        [
            f"{name} = {v}.array",
            f"{name} = {v}.array",
            f"{name} = {v}.array.T",
            f"{name} = {v}.array[::2]",
            f"{name} = {v}.node.data",
            f"{name} = {v}.creator_node.get_retained_outputs()[0].array",
            f"{name} = {v}.creator_node.inputs[0].data",
        ]
    )
    return f"{text}\nsee({name})"


def use(names: Names, v: str) -> str:
    """Return nothing, or what uses a variable once more."""
    y = names.rng.choice(
        [None, f"F.sum(F.exp({v}) * {v})", f"F.sum(F.absolute({v}))", f"F.sum({v})"]
    )
    return "" if y is None else f"\n{y}.backward()\nsee({', '.join(names.leaves)})"


def edit(names: Names) -> str:
    if names.rng.random() < 0.5:
        v, y, text = names.variable(), names.new("v"), names.rng.choice(EDITS).format(a="a")
        names.variables[y] = names.variables[v]
        chain = v
        for _ in range(names.rng.randint(1, 4)):
            chain = (
                names.rng.choice(UNARY[:12]).format(x=chain)
                if len(chain) < 60
                else f"F.sin({chain})"
            )
        return (
            f"{y} = {chain}\na = inner({y}, {names.rng.randint(1, 4)})\nsee(a)\n{text}\n"
            f"{names.rng.choice(['', 'see(a)'])}\ndel a\nF.tanh(F.exp({y}))" + use(names, y)
        )
    where = names.rng.choice(names.arrays) if names.arrays and names.rng.random() < 0.6 else None
    text = names.rng.choice(EDITS)
    if where is None:
        v = names.variable()
        return f"a = {v}.array\n{text.format(a='a')}\nsee(a)\ndel a" + use(names, v)
    return f"{text.format(a=where)}\nsee({where})"


def assign(names: Names) -> str:
    v = names.variable()
    if names.rng.random() < 0.5:  # to a variable whose node has been saved
        new = names.new("v")
        names.variables[new] = names.variables[v]
        before, v = f"{new} = F.tanh({v})\ny = F.exp(F.sin({new}))\n", new
    else:
        before = ""
    return (
        before
        + names.rng.choice(
            [
                f"{v}.array = {v}.array.copy()",
                f"{v}.array = {v}.array * 0.5",
                f"{v}.data = np.asfortranarray({v}.array)",
                f"{v}.array = rand({v}.shape, {v}.dtype, {names.seed()})",
                f"{v}.grad = np.ones_like({v}.array)",
                f"{v}.array = {names.variable()}.array",
                f"{v}.array = None\n{v}.array = rand((3, 4))",
                f"{v}.retain_data()",
            ]
        )
        + f"\nsee({v})"
        + use(names, v)
    )


def failing(names: Names) -> str:
    """Something raises while temporaries are alive."""
    e, s, t, v = names.error(), names.size(), names.size(), names.variable()
    raiser = names.rng.choice(
        [f"fail({e})", f"fail({e})", f"kill(error={names.rng.choice(['Alarm', 'KeyError'])})"]
    )
    temporary = names.rng.choice(
        [
            f"np.ones({s}, 'f') * 2",
            f"np.zeros({s}) + 1",
            f"(np.ones({s}, 'f') + np.ones({s}, 'f'))[::2]",
            f"F.exp({v}) * 2",
            f"F.sin(F.tanh({v})).array",
            f"{v}.array * 3",
            f"[np.ones({t}), np.ones({s}) * 2]",
            f"np.concatenate([np.ones({s}), np.ones({t})])",
        ]
    )
    return names.rng.choice(
        [
            f"add({temporary}, {raiser})",
            f"({temporary}) + {raiser}",
            f"see([add(np.full({s}, i, 'f') * 2, {raiser} if i == 2 else i)[0] for i in range(4)])",
            f"try:\n    np.minimum({temporary}, {{}}[3])\nexcept KeyError:\n    see(np.ones({t}) * 2)",
            f"try:\n    add({temporary}, {raiser})\nfinally:\n    see(np.ones({t}, 'f') * 3)",
            f"with contextlib.suppress(Exception):\n    add({temporary}, {raiser})\nsee(np.arange({t}) * 2)",
            f"try:\n    try:\n        add({temporary}, {raiser})\n    except BaseException as error:\n"
            f"        raise RuntimeError('other') from error\nfinally:\n    see(np.ones({t}) + 1)",
            f"try:\n    add({temporary}, {raiser})\nexcept BaseException as error:\n    kept = error\n"
            f"see(kept, np.ones({s}) * 4)",
            f"n = 0\nfor b in batches(5, {names.rng.randrange(6)}, {e}, ({s},)):\n    n += 1\n    see(b)\nsee(n)",
            f"it = iter([np.ones({s}, 'f')])\nwhile True:\n    np.add(np.ones({s}, 'f') * 3, next(it))",
            f"def g():\n    with mode({names.rng.choice(['', 'False', 'swap_all=True'])}):\n"
            f"        yield np.ones({s}) * 2 + F.exp({v}).array.sum()\n        yield add({temporary}, {raiser})\n"
            f"for value in g():\n    see(value)",
            f"dict(a=add({temporary}, 1), b={raiser})",
            f"sorted([np.ones({s}) * 2, np.ones({s})], key=lambda a: add(a * 2, {raiser}).sum())",
            f"np.tensordot(np.ones((60, {max(s // 60, 1)}), 'f') + 1, np.ones((3, 7), 'f') * 2, 1)",
            f"(np.ones({s}) * 2).reshape(7, 11)",
            f"np.ones({s + 5}, 'f') * 2 + np.ones({s + 7}, 'f') * 3",
            f"np.concatenate([np.ones({s}) * 2, 'x'])",
            f"np.add(np.ones({s}) * 2, np.ones({s}), out=np.empty({s + 1}))",
            f"assert add({temporary}, {v}) is None, np.ones(3)",
            f"(np.ones({s}) * 2).no_such_name",
            f"int('no number' * bool((np.ones({s}) * 2).all()))",
            f"exec('(np.ones({s}) * 2) + (lambda: 1 // 0)()')",
            f"{v} + np.ones(({s}, 3), 'f') * 2",
            f"F.matmul({v} * 2, np.ones((17, 19), 'f') * 2)",
            f"np.empty(1 << 50, 'u1') + add({temporary}, 1)",
            f"add({temporary}, np.zeros((1 << 40, 1 << 9)))",
            f"async def go():\n    return add({temporary}, {raiser})\nsee(asyncio.run(go()))",
            f"max(add({temporary}, {raiser}) for _ in range(2))",
            f"contextvars.Context().run(lambda: see(add({temporary}, {raiser})))",
            f"class C:\n    x = np.ones({s}) * 2\n    y = add({temporary}, {raiser})",
            f"x = lambda: (yield add({temporary}, 1))\ni = x(); next(i); i.throw({e.split('(')[0]})",
            f"def g():\n    try:\n        yield add({temporary}, 1)\n    finally:\n        see(np.ones({t}) * 2)\n"
            f"i = g(); next(i); i.close()\ndel i",
            f"np.vectorize(lambda x: add(np.ones({s}), {raiser}).sum())(np.arange(3))",
            f"np.apply_along_axis(lambda x: add(np.ones({s}), {raiser}), 0, np.ones((4, 5)))",
            f"np.fromiter((add(np.ones({s}) * 2, {raiser} if i > 300 else 1)[0] for i in range(400)), 'd')",
            f"np.array([{temporary}, {raiser}], dtype=object)",
        ]
    )


def finalizer(names: Names) -> str:
    s, e = names.size(), names.error()
    action = names.rng.choice(
        [
            f"add(np.ones({s}) * 2, fail({e}))",
            f"np.ones({s}) * 2",
            "F.sum(F.exp(chainer.Variable(rand((40, 64))))).backward()",
            "gc.collect()",
        ]
    )
    return names.rng.choice(
        [
            f"Finalizer(lambda: {action})",
            f"f = Finalizer(lambda: {action}); f.me = f; del f; gc.collect()",
            f"f = Finalizer(lambda: {action}); see(add(np.ones({s}), [f][0] is not None)); del f",
            f"def t(f):\n    return add(np.ones({s}) * 2, fail(KeyError('k')))\nt(Finalizer(lambda: {action}))",
        ]
    )


def hooked(names: Names) -> str:
    v, e = names.variable(), names.error()
    point = names.rng.choice(
        ["forward_preprocess", "forward_postprocess", "backward_preprocess", "backward_postprocess"]
    )
    hook = f"Hook({point!r}, {names.rng.randint(1, 4)}, {names.rng.choice([e, e, None])}, {names.rng.random() < 0.4})"
    return names.rng.choice(
        [
            f"with {hook}:\n    y = F.sum(F.tanh(F.exp({v}) * {v}))\n    y.backward()\nsee({', '.join(names.leaves)})",
            f"y = F.sum(F.tanh(F.exp({v}) * {v}))\nwith {hook}:\n    y.backward()\nsee({', '.join(names.leaves)})",
            f"m = net('mlp'); h = LinkHook({names.rng.random() < 0.5}, {names.rng.randint(1, 5)}, {e})\n"
            f"with h:\n    see(m(rand((9, 64))))",
        ]
    )


def own(names: Names) -> str:
    v, e = names.variable(), names.error()
    point = names.rng.choice(["forward", "forward end", "backward", "backward end"])
    what = names.rng.choice(
        [
            e,
            e,
            "kill",
            "lambda: np.empty(1 << 50)",
            f"lambda: np.ones({names.size()}) * 2",
            "gc.collect",
        ]
    )
    return (
        f"y = F.tanh({v})\nz = F.sum(F.sin(Own({what}, {point!r}).apply((F.exp({v}), y))[0]))\n"
        f"z.backward()\nsee(z, {', '.join(names.leaves)})"
    )


def training(names: Names) -> str:
    kind = names.rng.choice(["mlp", "conv", "norm"])
    name = names.new("net")
    optimizer, hook = names.rng.choice(OPTIMIZERS), names.rng.choice(HOOKS)
    rows = names.rng.choice([3, 40, 200])
    shape = (rows, 3, 12, 12) if kind == "conv" else (rows, 64)
    text = f"{name} = net({kind!r}, {names.seed()}); o{name} = {optimizer}.setup({name})\n"
    if names.rng.random() < 0.5:
        text += f"o{name}.add_hook({hook})\n"
    if names.rng.random() < 0.2:
        text += f"o{name}.add_hook(lambda o: add(np.ones(30000, 'f'), fail({names.error()})), name='failing')\n"
    text += f"see(train({name}, o{name}, rand({shape}, seed=1), {names.rng.randint(1, 5)}))\n"
    names.nets.append((name, kind))
    return text + f"see([p for _, p in sorted({name}.namedparams())], o{name}.t)"


def prediction(names: Names) -> str:
    if not names.nets:
        return training(names)
    name, kind = names.rng.choice(names.nets)
    shape = (20, 3, 12, 12) if kind == "conv" else (20, 64)
    context = names.rng.choice(
        [
            "chainer.no_backprop_mode()",
            "chainer.using_config('train', False)",
            "chainer.using_config('enable_backprop', False)",
            "chainer.force_backprop_mode()",
            "chainer.using_config('type_check', False)",
            "chainer.using_config('keep_graph_on_report', True)",
        ]
    )
    return f"with {context}:\n    y = {name}(rand({shape}, seed={names.seed()}))\n    see(y, y.creator is None)"


def copying(names: Names) -> str:
    v = names.variable()
    choices = [
        f"c = copy.deepcopy({v}); see(c); F.sum(F.exp(c)).backward(); see(c)",
        f"c = pickle.loads(pickle.dumps({v}, {names.rng.choice([2, 4, 5])})); see(c)",
        f"c = copy.copy({v}); see(c); F.sum(F.exp(c)).backward(); see({', '.join(names.leaves)})",
        f"see(pickle.loads(pickle.dumps({v}.array)), copy.deepcopy({v}.array), len(pickle.dumps({v}.array)))",
        f"f = copy.deepcopy({v}.creator_node); see(f is None or f.label)",
        f"f = copy.copy({v}.creator_node); see(f is None or f.label)",
        f"b = io.BytesIO(); np.save(b, {v}.array); b.seek(0); see(np.load(b))",
        f"see([{v}.array.dumps()[:50] is None, {v}.array.tolist() == {v}.array.tolist(), str({v})[:300], repr({v})[:300]])",
    ]
    if names.nets:
        name = names.rng.choice(names.nets)[0]
        choices += [
            f"m = copy.deepcopy({name}); see([p for _, p in sorted(m.namedparams())])",
            f"m = pickle.loads(pickle.dumps({name}.copy('copy'))); see([p for _, p in sorted(m.namedparams())])",
            f"b = io.BytesIO(); chainer.serializers.save_npz(b, {name}); b.seek(0); "
            f"chainer.serializers.load_npz(b, {name}); see([p for _, p in sorted({name}.namedparams())])",
            f"see([p for _, p in sorted({name}.copy('init').namedparams())])",
        ]
    return names.rng.choice(choices)


def floating(names: Names) -> str:
    """Floating-point errors and warnings arrive as they do in stock."""
    v = names.variable()
    operation = names.rng.choice(
        [
            f"F.exp({v} * 1000)",
            f"F.log({v} * 0)",
            f"F.sum(F.exp({v} * 1000)).backward()",
            f"{v}.array / 0",
            f"F.sqrt({v})",
            f"1 / ({v} * 0)",
        ]
    )
    return names.rng.choice(
        [
            f"with np.errstate(all='raise'):\n    see({operation})",
            f"with warnings.catch_warnings(record=True) as w:\n    warnings.simplefilter('always')\n    {operation}\n"
            "see([(str(one.message), one.filename[-30:], one.lineno) for one in w])",
            f"with warnings.catch_warnings():\n    warnings.simplefilter('error')\n    see({operation})",
            f"with np.errstate(all='call'), np.errstate(call=lambda *a: fail(KeyError(a[0]))):\n    see({operation})",
            f"{operation}",
            f"see(np.geterr()); old = np.seterr(over='ignore'); {operation}; np.seterr(**old); see(np.geterr())",
        ]
    )


def settings(names: Names) -> str:
    v = names.variable()
    chosen = names.rng.choice(
        [
            "limit='1MiB', min_bytes=1",
            "swap_all=True, min_bytes=1",
            "above=1 << 20, min_bytes=1000",
            "above=8 << 20, plan=False",
            "limit='1MiB', discard_all=True, min_bytes=1",
            "limit='1B', min_bytes=1",
            "limit=1.0",
            "limit='100GiB'",
            "split='exact', limit='1MiB'",
            "False",
        ]
    )
    inside = names.rng.choice(
        [
            f"y = F.sum(F.sin(F.exp({v})))\n    y.backward()",
            f"y = F.tanh(F.exp({v}))",
            f"y = F.tanh(F.exp({v})); add(np.ones(30000) * 2, fail({names.error()}))",
            f"y = ({names.function()})()",
        ]
    )
    if names.rng.random() < 0.3:
        return names.rng.choice(
            ["disable()", f"enable({chosen})" if chosen != "False" else "disable()"]
        )
    if names.rng.random() < 0.3:
        inside = f"y = F.tanh({v})\n    with mode(swap_all=True, min_bytes=1):\n        y = F.exp(y)\n    y = F.sin(y)"
    return f"with mode({chosen}):\n    {inside}\nsee(y)\nF.sum(F.sin(F.exp({v}))).backward()\nsee({', '.join(names.leaves)})"


def once(names: Names) -> str:
    """A graph of its own that runs backward once, with settings that are for such alone."""
    chosen = names.rng.sample(
        [
            "single_backward=True",
            "verify=True",
            "discard_all=True",
            "split='exact'",
        ],
        names.rng.randint(1, 3),
    )
    limit = names.rng.choice(["limit='1MiB'", "swap_all=True", "above=1 << 20"])
    text = ", ".join([limit, "min_bytes=1", *chosen])
    if names.rng.random() < 0.5:
        return f"with mode({text}):\n    f = {names.function()}\n    see(f(), f())"
    kind = names.rng.choice(["mlp", "conv", "norm"])
    shape = (30, 3, 12, 12) if kind == "conv" else (30, 64)
    return (
        f"m = net({kind!r}); o = chainer.optimizers.SGD(0.01).setup(m)\nwith mode({text}):\n"
        f"    see(train(m, o, rand({shape}), 4))\nsee([p for _, p in sorted(m.namedparams())])\ndel m, o"
    )


def planned(names: Names) -> str:
    """Training by a plan that runs functions again; something is done to arrays in some of the steps."""
    rng = names.rng
    reach = rng.choice(
        [
            "v.array",
            "v.node.data",
            "copy.copy(v).array",
            "F.reshape(v, (-1,)).array.reshape(v.shape)",
            "F.identity(v).array",
            "v.creator_node.get_retained_outputs()[0].array",
            "inner(v, 2)",
            "F.split_axis(v, 2, 1)[1].array",
        ]
    )
    change = rng.choice([text for text in EDITS if "ij->ij" not in text]).format(a="a")
    wrapped = rng.choice(
        [
            "{0}",
            "{0}",
            "F.sqrt(F.absolute(v))\n        {0}",
            "with mode({1}):\n            {0}",
            "with Calls(lambda: kept):\n            F.sum(v)\n        {0}",
            "with np.errstate(all='call'), np.errstate(call=lambda *_: [k.array.fill(0.5) for k in kept]):\n"
            "            F.exp(v * 1000)\n        {0}",
            "with chainer.no_backprop_mode():\n            {0}",
        ]
    ).format(
        f"a = {reach}; {change}; del a",
        rng.choice(["False", "plan=False", "recompute='never'", "swap_all=True"]),
    )
    first, place = rng.randint(2, 6), rng.randint(0, 27)
    steps = rng.choice([f"n == {first}", f"n >= {first}", f"n % 3 == {first % 3}", "True"])
    end = rng.choice(
        [
            "",
            "",
            "v = F.sqrt(F.absolute(v) + 1)",
            "v = Own().apply((v, v))[0]",
            "v.array = v.array * 0.5",
        ]
    )
    early = f"i == {max(place - rng.randint(1, 4), 0)}"
    return (
        f"kept = []\ndef act(n, i, v):\n    if {early} and {steps} and i < {place}:\n        kept.append(v)\n"
        f"    if i == {place} and {steps}:\n        {wrapped}\n        kept.clear()\n        {end or 'pass'}\n"
        f"    return v\nwith slow_copies({rng.choice([1200, 1400, 1700])} << 10):\n"
        f"    see(iterate(8, act, {names.seed()}))\ndel act, kept"
    )


def strict(names: Names) -> str:
    limit = names.rng.choice(["limit='1MiB'", "above=100000", "above=3000000", "limit='1B'"])
    function = names.function()
    if names.rng.random() < 0.5:
        function = (
            f"lambda: add(np.ones({names.size()}) * 2, ({function})() * 0 + fail({names.error()}))"
        )
    return f"np.random.seed(1)\nsee(strictly(lambda: (np.random.seed(1), ({function})())[1], {limit}, min_bytes=1))"


def signals(names: Names) -> str:
    function = names.rng.choice(
        [names.function(), names.function(), "lambda: train(m, o, rand((30, 64)), 1)"]
    )
    timer = names.rng.choice(["real", "prof", "virtual"])
    delays = [round(10 ** names.rng.uniform(-5, -1.5), 6) for _ in range(names.rng.randint(2, 6))]
    error = names.rng.choice(["Alarm", "Alarm", "KeyboardInterrupt", "TimeoutError", "Budget"])
    start = (
        "m = net('norm'); o = chainer.optimizers.SGD(0.01).setup(m)\n"
        if "train(" in function
        else ""
    )
    end = "\ndel m, o" if start else ""
    return f"{start}interrupt({function}, {timer!r}, {delays}, {error})\nsee(({names.function()})()){end}"


def threads(names: Names) -> str:
    function, n = names.function(), names.rng.choice([1, 2, 3])
    return names.rng.choice(
        [
            f"in_threads({n}, {function.replace('F.dropout(h, 0.3)', 'F.sin(h)')})",
            f"in_threads({n}, lambda i: add(np.ones({names.size()}) * 2, fail({names.error()}) if i == 1 else i))",
            f"def w(i):\n    with mode(swap_all=True, min_bytes=1):\n        return F.exp(F.sin({names.variable()})).array\n"
            f"in_threads({n}, w)",
            f"y = F.sum(F.tanh(F.exp({names.variable()})))\nin_threads(1, lambda i: y.backward())\nsee({', '.join(names.leaves)})",
            f"t = threading.Thread(target=lambda: add(np.ones({names.size()}) * 2, fail({names.error()})), name='T')\n"
            "t.start(); t.join()",
        ]
    )


def forks(names: Names) -> str:
    v = names.variable()
    leave = names.rng.choice(["None", "None", "0", "7"])
    return names.rng.choice(
        [
            f"forked({names.function()}, {leave})",
            f"y = F.sum(F.sin(F.exp({v})))\nforked(lambda: (y.backward(), {names.leaves[0]}.grad)[1], {leave})\n"
            f"y.backward()\nsee({', '.join(names.leaves)})",
            f"forked(lambda: add(np.ones({names.size()}) * 2, fail({names.error()})), {leave})",
            f"y = F.tanh(F.exp({v}))\nforked(lambda: (enable(swap_all=True, min_bytes=1), F.sin(y).array)[1], {leave})\nsee(y)",
        ]
    )


def recursion(names: Names) -> str:
    function = names.rng.choice(
        ["lambda h: np.ones(9000, 'f') * 2", "F.sin", "lambda h: F.exp(h).array", "F.tanh"]
    )
    return (
        "old = sys.getrecursionlimit(); sys.setrecursionlimit(260)\n"
        f"try:\n    recurse({function}, chainer.Variable(rand((40, 64))), 999)\n"
        "except RecursionError:\n    see('too deep')\n"
        "finally:\n    sys.setrecursionlimit(old)"
    )


def cycles(names: Names) -> str:
    v = names.variable()
    return names.rng.choice(
        [
            f"c = [F.tanh(F.exp({v}))]; c.append(c); del c; gc.collect()",
            f"r = weakref.ref(F.tanh(F.exp({v})).node); see(r() is None)",
            f"y = F.tanh(F.exp({v})); r = weakref.ref(y.array); del y; see(r() is None)",
            f"a = np.ones({names.size()}) * 2; r = weakref.ref(a, lambda _: see('died')); del a; see(r() is None)",
            f"gc.disable(); see(F.sum(F.exp({v}))); gc.enable()",
            f"gc.callbacks.append(lambda *a: np.ones({names.size()}) * 2); gc.collect(); gc.callbacks.pop()",
            "print('so far', 3); sys.stdout.flush()",
            "print('an error', file=sys.stderr)",
            f"see(np.random.rand(3), (np.ones({names.size()}) * 2).sum())",
            f"a = np.zeros(4); a.resize({names.size()}, refcheck=False); see(a); a.resize(2, refcheck=False); see(a)",
            f"see(np.fromiter((i * 0.5 for i in range({min(names.size(), 20000)})), 'd'))",
            f"see(np.sort(rand(({names.size()},)))[:5], np.argsort(rand((20, 300)), axis=0), np.unique(rand((99,)) > 0))",
            f"see(rand(({min(names.size(), 20000)},), 'd').astype('>f4').astype('U9'))",
            "a = rand((30, 40)); b = a[1:]; b += a[:-1]; see(a, np.asarray([a, a]).T @ np.ones((2, 30, 3), 'f')[0])",
        ]
    )


def ending(names: Names) -> str:
    """All graphs that live run backward once more."""
    variables = ", ".join(names.variables)
    return (
        f"for x in ({', '.join(names.leaves)},):\n    x.cleargrad()\n"
        f"for v in ({variables},):\n    with contextlib.suppress(Exception):\n        F.sum(F.sin(v)).backward()\n"
        f"see({', '.join(names.leaves)}, np.random.rand(2))\ndel v, x"
    )


KINDS: tuple[tuple[Callable[[Names], str], int], ...] = (
    (leaf, 2),
    (unary, 14),
    (binary, 8),
    (backward, 8),
    (grad, 4),
    (drop, 6),
    (take, 6),
    (edit, 10),
    (assign, 4),
    (failing, 24),
    (finalizer, 3),
    (hooked, 6),
    (own, 6),
    (training, 4),
    (prediction, 2),
    (copying, 4),
    (floating, 4),
    (settings, 8),
    (once, 4),
    (planned, 2),
    (strict, 3),
    (signals, 5),
    (threads, 4),
    (forks, 2),
    (recursion, 2),
    (cycles, 6),
)
