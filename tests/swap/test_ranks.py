"""What launchers tell the processes that they start."""

from __future__ import annotations

import pytest

from chainer_ooc.swap.system import ranks

#: The 4th of 8 processes, 5 of them on this machine, as each launcher tells it.
LAUNCHERS = [
    {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALNRANKS": "5"},
    {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "5",
    },
    {"PALS_RANKID": "3", "PALS_SIZE": "8", "PALS_LOCAL_SIZE": "5"},
    {
        "MV2_COMM_WORLD_RANK": "3",
        "MV2_COMM_WORLD_SIZE": "8",
        "MV2_COMM_WORLD_LOCAL_SIZE": "5",
    },
]
STEP = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "5,3"}


@pytest.mark.parametrize("environ", [*LAUNCHERS, STEP])
def test_each_launcher_is_understood(environ, monkeypatch):
    assert (ranks.rank(environ), ranks.world_size(environ)) == (3, 8)
    assert ranks.ranks_of_this_node(environ, unknown=7) == 5
    for name, value in environ.items():  # what a process reads if it names no environment
        monkeypatch.setenv(name, value)
    assert (ranks.rank(), ranks.world_size(), ranks.ranks_of_this_node()) == (3, 8, 5)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PMI_RANK": "", "PMI_SIZE": "many", "MPI_LOCALNRANKS": "-1"},
        # A batch script that starts python without srun.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
    ],
)
def test_without_a_launcher_a_process_is_alone(environ):
    assert (ranks.rank(environ), ranks.world_size(environ)) == (0, 1)
    assert ranks.ranks_of_this_node(environ) == 1
    assert ranks.ranks_of_this_node(environ, unknown=7) == 7


@pytest.mark.parametrize(
    ("tasks", "node", "expected"),
    [
        ("4(x2),3", "0", 4),
        ("4(x2),3", "1", 4),
        ("4(x2),3", "2", 3),
        ("6,5", "1", 5),
        ("6,5", "", 6),
        ("6,5", "9", 1),
        ("", "0", 1),
        ("six", "0", 1),
    ],
)
def test_slurm_lists_the_tasks_of_all_nodes_of_the_step(tasks, node, expected):
    step = {**STEP, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}
    assert ranks.ranks_of_this_node(step) == expected
    assert ranks.ranks_of_this_node({**step, "SLURM_NTASKS_PER_NODE": "12"}) == expected


def test_an_mpi_launcher_inside_of_a_step_of_slurm_is_asked_first():
    assert ranks.world_size({"PMI_SIZE": "2", "PMI_RANK": "1", **STEP}) == 2
