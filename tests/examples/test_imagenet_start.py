"""The start of a run: ranks that wait leave the cores to the one that works, and what has begun ends."""

import subprocess

import out_of_core
import pytest
from config import parse_args
from imagenet_cli import IMAGENET, command, environment

WAITING = f"""
import sys, time
sys.path.insert(0, {str(IMAGENET)!r})
import chainer_ooc, world
ranks = world.create_world(None, False)
start = time.process_time()
with ranks.together():
    if ranks.rank == 0:
        time.sleep(2)
most = max(ranks.gather(time.process_time() - start))
if ranks.rank == 0:
    print(most)
"""


@pytest.mark.mpi
def test_ranks_that_wait_for_one_take_no_core_from_it(tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    done = subprocess.run(
        command([], 3, script), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5  # seconds, of two


def test_a_measurement_ends_with_the_run_that_it_was_for(tmp_path):
    config = parse_args(["--ooc", "-o", str(tmp_path)])
    with pytest.raises(ZeroDivisionError), out_of_core.measuring(config, -1) as measurement:
        assert measurement is not None
        process = measurement._process
        assert process.poll() is None
        raise ZeroDivisionError
    assert process.returncode == -9


@pytest.mark.parametrize("options", [[], ["--ooc", "--ooc-limit", "1GiB"]])
def test_nothing_is_measured_where_nobody_asks(options):
    with out_of_core.measuring(parse_args(options), -1) as measurement:
        assert measurement is None


def test_a_limit_of_the_environment_is_not_measured(monkeypatch):
    monkeypatch.setenv("CHAINER_OOC_LIMIT", "1GiB")
    with out_of_core.measuring(parse_args(["--ooc"]), -1) as measurement:
        assert measurement is None
