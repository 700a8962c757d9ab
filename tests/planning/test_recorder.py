from chainer_ooc.planning.profile import BACKWARD, FORWARD, OTHER, Rerun, SavedTensor
from chainer_ooc.planning.recorder import Recorder

PARAMETERS = 1000


def test_records_become_a_profile():
    """Two functions: a makes 100 saved bytes and 40 that nobody saves, b makes 60 saved ones from them."""
    recorder = Recorder()
    recorder.begin("a", FORWARD, 0.0, PARAMETERS, inputs=("float32[5]",))
    recorder.end(PARAMETERS + 100 + 40 + 25)
    first, unsaved = recorder.made(100), recorder.made(40)
    recorder.saved([first])
    for storage in (first, unsaved):
        recorder.can_remake(storage, [], [0])
    recorder.freed(first)
    recorder.begin("b", FORWARD, 1.0, PARAMETERS + 140, inputs=("float32[5]@0",))
    recorder.end(PARAMETERS + 140 + 60 + 5)
    second = recorder.made(60)
    recorder.saved([second])
    recorder.begin("b", BACKWARD, 3.0, PARAMETERS + 200, function=1)
    recorder.freed(unsaved)
    recorder.end(PARAMETERS + 200 + 30)
    recorder.begin("a", BACKWARD, 4.5, PARAMETERS + 160 + 70, function=0)
    recorder.end(PARAMETERS + 160 + 70)
    recorder.begin("update", OTHER, 7.0, PARAMETERS + 160)
    recorder.end(PARAMETERS + 160)
    profile = recorder.profile("two", "clock", recorder.seconds(7.5))
    assert profile.fixed_bytes == PARAMETERS
    assert profile.seconds == [1.0, 2.0, 1.5, 2.5, 0.5]
    assert profile.held == [0, 40, 40, 70, 0]
    # The 40 bytes that are not saved are part of a's workspace when it makes them.
    assert profile.workspace == [65, 5, 30, 0, 0]
    assert profile.storages == (
        SavedTensor(100, 0, 1, (3,), "a"),
        SavedTensor(40, 0, 2, (), "a"),
        SavedTensor(60, 1, 5, (2,), "b"),
    )
    assert profile.steps[0].rerun == Rerun(1.0, 25, (), (0, 1), (0,))
    assert profile.steps[3].function == 0


def test_running_again_a_chain_takes_what_its_steps_took():
    """x is saved, a makes h from it (40 bytes, 90 of its own), b makes y from h (60 bytes, 20 of its own)."""
    recorder = Recorder()
    recorder.begin("input", FORWARD, 0.0, 0)
    recorder.end(100)
    x = recorder.made(100)
    recorder.saved([x])
    recorder.begin("a", FORWARD, 1.0, 100)
    recorder.end(100 + 40 + 90)
    recorder.begin("b", FORWARD, 3.0, 140)
    recorder.end(140 + 60 + 20)
    y = recorder.made(60)
    recorder.saved([y])
    recorder.can_remake(y, [x], [1, 2])
    recorder.begin("b", BACKWARD, 6.0, 160, function=2)
    recorder.end(160)
    profile = recorder.profile("chain", "clock", recorder.seconds(7.0))
    assert profile.steps[2].rerun == Rerun(5.0, 40 + 90 + 20, (x,), (y,), (1, 2))


def test_a_clock_that_goes_back_tells_of_no_time():
    """It is the time without waits, and other threads wait too."""
    recorder = Recorder()
    for time in (1.0, 0.5, 2.0):
        recorder.begin("f", FORWARD, time, 0)
    assert recorder.seconds(1.5) == [0.0, 1.5, 0.0]


def test_what_a_function_makes_together_is_made_again_together():
    recorder = Recorder()
    recorder.begin("lstm", FORWARD, 0.0, 0)
    recorder.end(190)
    c, h = recorder.made(100), recorder.made(60)
    recorder.saved([c, h])
    for one in (h, c, c):
        recorder.can_remake(one, [], [0])
    recorder.begin("lstm", BACKWARD, 1.0, 160, function=0)
    recorder.end(160)
    profile = recorder.profile("lstm", "clock", recorder.seconds(2.0))
    assert profile.steps[0].rerun == Rerun(1.0, 30, (), (c, h), (0,))
