"""The quadratic table of the paper on scheduled restarts, and the logistic regression's curves."""

import json

import numpy
import pytest
from tools import logistic, quadratic, quadratic_problem
from tools.image_arrays import load
from tools.momentum_rules import METHODS, Momentum
from tools.quadratic_problem import (
    NOISES,
    PUBLISHED,
    Noise,
    distributions,
    gap,
    objective,
    simulate,
    times_p,
)

N = 30


def dense(n):
    return 2 * numpy.eye(n) - numpy.eye(n, k=1) - numpy.eye(n, k=-1)


def reference(n, iterations, method, restarts):
    """The methods as the paper writes them, one by one, with a dense matrix."""
    p, b = dense(n), numpy.eye(n)[0]

    def f(x):
        return 0.5 * x @ p @ x - b @ x

    best = numpy.linalg.solve(p, b)
    x = y = numpy.zeros(n)
    k = 1
    for t in range(1, iterations):
        following = y - 0.25 * (p @ y - b)
        mu = {"GD": 0, "GD + momentum": 0.9}.get(method, (k - 1) / (k + 2))
        y = following + mu * (following - x)
        if method == "NAG":
            k += 1
        elif method == "NAG adaptive restart":
            k = 1 if f(following) > f(x) else k + 1
        elif method == "NAG scheduled restart":
            for until, period in restarts:
                if t < until:
                    k = 1 if k >= period else k + 1
                    break
        x = following
    return f(y) - f(best)


def test_follows_the_paper_step_by_step():
    restarts = ((100, 20), (250, 40))  # and none after
    noise = Noise("", lambda t: 0.0, restarts)
    result = simulate(N, 300, noise, 1)
    for i, method in enumerate(METHODS):
        expected = reference(N, 300, method, restarts)
        assert result.final[i, 0] == pytest.approx(expected, rel=1e-6, abs=1e-15)
    numpy.testing.assert_array_equal(result.curves[-1], result.final)
    assert result.iterations[[0, -1]].tolist() == [0, 299]


def test_gap_and_objective():
    rng = numpy.random.default_rng(0)
    x = rng.standard_normal((3, N))
    p = dense(N)
    best = numpy.linalg.solve(p, numpy.eye(N)[0])
    numpy.testing.assert_allclose(times_p(x), x @ p, rtol=1e-12, atol=1e-12)
    numpy.testing.assert_allclose(objective(x) - objective(best[None]), gap(x), rtol=1e-10)
    assert gap(best) < 1e-28


@pytest.mark.parametrize("name", ["constant", "decaying"])
def test_runs_have_the_distribution_that_theory_says(name):
    exact = distributions(20, 300, NOISES[name])
    result = simulate(20, 300, NOISES[name], seeds=200)
    for i, method in enumerate(METHODS):
        if method not in exact:
            continue
        runs = result.final[i]
        error = exact[method].deviation / numpy.sqrt(len(runs))
        assert runs.mean() == pytest.approx(exact[method].mean, abs=4 * error), method
        assert runs.std() == pytest.approx(exact[method].deviation, rel=0.4), method
        assert exact[method].draws.mean() == pytest.approx(exact[method].mean, rel=0.05)
        tails = [exact[method].tail(value) for value in runs]
        assert 0.3 < numpy.mean(tails) < 0.7, method  # uniform, if the draws are right


@pytest.mark.slow
def test_exact_row_to_the_printed_digits():
    final = simulate(1000, 50000, NOISES["exact"], 1).final[:, 0]
    published = PUBLISHED["exact"]
    assert final[:3] == pytest.approx(published[:3], rel=1e-5)
    assert f"{final[3]:.1e}" == f"{published[3]:.1e}" == "2.1e-13"
    assert f"{final[4]:.14f}" == "0.00000000000000"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["constant", "decaying"])
def test_published_noisy_runs_are_likely(name):
    exact = distributions(1000, 50000, NOISES[name])
    for method, value in zip(METHODS, PUBLISHED[name], strict=True):
        if method in exact:
            # One of the eight is rare: NAG with constant noise is a run of the upper tail.
            assert exact[method].tail(value) > (
                0.001 if (name, method) == ("constant", "NAG") else 0.1
            )


def test_scheduled_restart_periods():
    rule = Momentum("NAG scheduled restart", 1, ((5, 3), (9, 4)))
    mus = []
    for t in range(1, 12):
        mus.append(rule.mu()[0])
        rule.advance(t, lambda: numpy.array([False]))
    k = [1, 2, 3, 1, 2, 3, 4, 1, 2, 2, 2]  # after the last until the count stays
    assert mus == [(c - 1) / (c + 2) for c in k]


def test_command_line(tmp_path, capsys):
    out, picture = tmp_path / "q.json", tmp_path / "q.png"
    command = ["--size", "20", "--iterations", "300", "--seeds", "3", "--json", str(out)]
    assert quadratic.main([*command, "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "NAG scheduled restart" in text
    assert text.count(" ± ") == 2 * 5 + 2 * 4
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == {"exact", "constant", "decaying"}
    runs = rows["constant"]["methods"]["NAG"]["runs"]
    assert len(runs) == 3
    assert len(set(runs)) == 3
    assert "published" not in rows["constant"]["methods"]["NAG"]  # of another size
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_bad_size(capsys):
    with pytest.raises(SystemExit) as e:
        quadratic.main(["--size", "0"])
    assert e.value.code == 2
    assert "--size: '0' is not an integer of at least 2" in capsys.readouterr().err


def test_exact_gap_as_restart_criterion():
    noise = NOISES["exact"]
    by_objective = simulate(10, 2000, noise, 1).final[3, 0]
    by_gap = simulate(10, 2000, noise, 1, value=gap).final[3, 0]
    assert by_gap < 1e-25
    assert by_gap < by_objective


def test_logistic_gradient_is_that_of_the_loss():
    rng = numpy.random.default_rng(0)
    x = rng.standard_normal((7, 4))
    t = rng.integers(0, 3, 7)
    w = rng.standard_normal((2, 4, 3))
    g = logistic.gradients(x, t, w)
    for index in ((0, 0, 0), (1, 3, 2), (1, 1, 1)):
        step = numpy.zeros_like(w)
        step[index] = 1e-6
        up, down = logistic.losses(x, t, w + step), logistic.losses(x, t, w - step)
        assert g[index] == pytest.approx((up - down)[index[0]] / 2e-6, rel=1e-6, abs=1e-8)


def test_logistic_regression_orders_the_methods_as_published():
    """NAG gathers noise; restarts beat gradient descent."""
    points, curve = logistic.simulate(load("digits"), 2.0, 16, 1500, 20, seed=0)
    last = dict(zip(METHODS, curve[-5:].mean(axis=0), strict=True))
    assert points[-1] == 1500
    assert curve[0] == pytest.approx(numpy.log(10))
    assert last["NAG scheduled restart"] < last["GD"] < last["NAG"]
    assert last["NAG"] > 0.5


def test_logistic_command_line(tmp_path, capsys):
    out, picture = tmp_path / "l.json", tmp_path / "l.png"
    command = ["--iterations", "100", "--seeds", "2", "--json", str(out), "--plot", str(picture)]
    assert logistic.main(command) == 0
    assert "published, MNIST" in capsys.readouterr().out
    curves = json.loads(out.read_text())["methods"]
    assert numpy.array(curves["NAG"]).shape == (2, 101)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_missing_data_is_one_clear_line(capsys):
    assert logistic.main(["--data", "nowhere.npz", "--iterations", "100"]) == 2
    err = capsys.readouterr().err
    assert "--data nowhere.npz: no such set; give `digits`" in err
    assert err.count("\n") == 1


def test_damaged_mnist_file(tmp_path, capsys):
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(b"\0\0\x08\x01\0\0\0\x09abc")
    assert logistic.main(["--data", str(tmp_path)]) == 2
    assert "damaged or not what its name says" in capsys.readouterr().err


def test_published_table_has_fifteen_numbers():
    assert [len(row) for row in quadratic_problem.PUBLISHED.values()] == [5, 5, 5]
