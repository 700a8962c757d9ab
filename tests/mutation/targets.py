"""What is changed, which tests must notice, and what nobody can: the lists of the mutation runner.

Modules are named from ``chainer_ooc`` on, functions by their qualified names. All names and files must exist: the
tests see to it.
"""

from __future__ import annotations

from typing import NamedTuple

#: The tests of each part, the fastest first. Against more than a few mutants those take part that run what is changed.
TESTS = {
    "graph": (
        "tests/graph/test_storages.py",
        "tests/graph/test_modes.py",
        "tests/graph/test_readers.py",
        "tests/graph/test_attributes.py",
        "tests/graph/test_death.py",
        "tests/graph/test_single_backward.py",
        "tests/graph/test_random_programs.py",
        "tests/equality/test_programs.py",
        "tests/graph/test_recompute.py",
    ),
    "swap.devices.ram": (
        "tests/swap/test_ram.py",
        "tests/graph/test_storages.py",
        "tests/swap/test_manager.py",
        "tests/equality/test_programs.py",
        "tests/graph/test_random_programs.py",
    ),
    "planning": (
        "tests/swap/cuda/test_executor.py",
        "tests/swap/cuda/test_eviction.py",
        "tests/swap/cuda/test_room.py",
        "tests/swap/cuda/test_fetching.py",
        "tests/swap/cuda/test_engine.py",
        "tests/swap/test_manager.py",
        "tests/swap/test_prefetch.py",
        "tests/swap/test_space.py",
        "tests/planning/test_simulator.py",
        "tests/swap/test_recipes.py",
        "tests/graph/test_iteration.py",
    ),
    "swap": (
        "tests/swap/test_transfers.py",
        "tests/swap/cuda/test_streams.py",
        "tests/swap/cuda/test_device.py",
        "tests/swap/cuda/test_engine.py",
        "tests/swap/cuda/test_fetching.py",
        "tests/swap/cuda/test_room.py",
        "tests/swap/cuda/test_executor.py",
        "tests/swap/cuda/test_eviction.py",
        "tests/swap/cuda/test_checksums.py",
        "tests/swap/cuda/test_fingerprints.py",
        "tests/swap/cuda/test_late_verdicts.py",
        "tests/swap/test_manager.py",
        "tests/swap/cuda/test_allocator.py",
        "tests/swap/cuda/test_pinned.py",
        "tests/swap/cuda/test_schedules.py",
        "tests/swap/test_prefetch.py",
        "tests/swap/test_budget.py",
        "tests/swap/test_space.py",
        "tests/swap/test_ram.py",
        "tests/swap/test_recipes.py",
        "tests/swap/test_page_pool.py",
        "tests/swap/test_settings.py",
        "tests/graph/test_iteration.py",
    ),
}

#: Modules whose waits, records, holds, states and conditions are taken away, one at a time: all of each.
ENGINE = (
    *("planning.eviction", "planning.executor", "planning.states", "planning.use_order"),
    *("swap.budget", "swap.cupy_allocator", "swap.checksums", "swap.gpus"),
    *("swap.manager", "swap.observed_growth", "swap.prefetch", "swap.recipe", "swap.storage", "swap.transfers"),
    *("swap.devices.cuda.checksum", "swap.devices.cuda.device", "swap.devices.cuda.host"),
    "swap.devices.cuda.fingerprints",
    *("swap.devices.cuda.streams", "swap.devices.cuda.transfers", "swap.tiers.free_blocks", "swap.tiers.pinned"),
)  # fmt: skip
#: Functions, by patterns, in which each statement is left out and each condition turned around.
STATEMENTS = {
    "graph.attributes": (
        *("PackedTuple.get", "_SavedAttribute.*", "save_*", "_save_list", "_descriptor"),
    ),
    "graph.nodes": ("_get_*", "_set_*", "save_*", "_save_node"),
    "graph.hooks": ("_apply", "_backprop_step", "_fetch", "_save"),
    "swap.devices.ram.device": (
        *("RamDevice.locate", "RamDevice.view", "RamDevice.copy_*", "_dense_order", "_is_dense"),
    ),
}

#: Calls of the engine that only count and tell.
TOLD = ("stalled", "_copied", "ran", "used", "remade")
#: Functions of the engine that only tell.
TELLING = ("stalled", "_copied", "ran", "ended", "explain_shortage", "_shortage", "__repr__")

#: Generic mutants in which nothing that can be observed is different, by how their names begin, and why.
EQUIVALENT = {
    "planning.executor.PlanExecutor.step: True for self._come and": "_begin_in() asks again",
    "planning.executor.PlanExecutor.step: no self._come[0][0] <= step": "_begin_in() asks again",
    "planning.eviction.Evictor.begin_ahead: True for room < nbytes": "less than nothing is released",
    "planning.eviction.Evictor.prefetch: no storage.state in AWAY": "begin_ahead() finds nothing to fetch",
    "planning.executor.PlanExecutor._begin_in: no storage.state in AWAY": "begin_ahead() finds nothing to fetch",
    "swap.manager.SwapManager._fetch_absent: True for discarded": "saves time only",
    "swap.manager.SwapManager.run_plan: True for evict_after_recompute": "saves time only",
    "swap.recipe.Constant.keep: True for not self.is_kept": "a copy of a copy",
    "swap.manager.SwapManager._note_who_holds: no storage.state.in_memory": "mark_dirty() leaves it as it is",
    "planning.eviction.Evictor.make_room: no used > self._budget.low": "less than nothing is written behind",
    "planning.eviction.Evictor.make_room: True for used + nbytes > self._budget.high": "saves time only",
    "swap.transfers.Transfers.run_deferred_frees: False for not (self.dead or self.deferred_frees)": "saves time",
    "swap.manager.SwapManager.usage_without_offload: True for transfers.dead or transfers.deferred_frees": "saves time",
    "swap.manager.SwapManager._begin_in: True for storage.state in AWAY": "outside() leaves them out as well",
    "planning.eviction.outside: False for storage.state is State.OUT": "saves time only",
    "swap.transfers.Transfers.end_in: True for storage.ahead": "which of two counters of seconds",
    "swap.transfers.Transfers.end_in: False for storage.ahead": "which of two counters of seconds",
    "swap.gpus.Gpus.manager_for: True for manager is None": "_add() returns the one there is",
    "swap.transfers.Transfers.defer_free: True for storage.copy": "nothing is freed",
    "swap.transfers.Transfers.drop: True for storage.owner": "None is the memory of no storage",
    "swap.transfers.Transfers.defer_free: True for storage.owner": "None is the memory of no storage",
    "swap.transfers.Transfers._give_up: no not storage.used in storage.key is None and (not storage.used)": (
        "prefetch() passes over what was used"
    ),
    "planning.eviction.Evictor.reclaim: False for missing <= 0": "less than nothing is given up",
    "swap.devices.cuda.streams.CopyStreams.on_device: False for": "saves time only",
    "swap.devices.cuda.streams.CopyStreams._note: True for len(": "streams are looked through more often",
    "swap.tiers.pinned.PinnedSlab.close: no memory.close()": "it is unmapped when the list of chunks goes",
    "swap.tiers.pinned.PinnedSlab._make: no memory.close()": "it is unmapped when the function returns",
    "graph.nodes._save_node: leave out 'if data is None:'": "of nothing nothing is saved",
    "graph.nodes._get_data: leave out 'if PRIVATE in node.__dict__:'": "of what is not private nothing is noted",
    "graph.nodes._get_data: turn around 'PRIVATE in node.__dict__'": "a saved array is exposed "
    "when it is read; no re-run reads the array of a node that is not saved",
    "swap.devices.ram.device._is_dense: turn around": "the other branch gives the same, more slowly",
}  # fmt: skip


class Planted(NamedTuple):
    """An error that a change could well bring.

    Attributes:
        name: The error, in words.
        module: Where: the module and, by its qualified name, the function.
        function: See ``module``.
        old: A statement or expression, which is in the function at least once.
        new: What is there instead, wherever it is.
    """

    name: str
    module: str
    function: str
    old: str
    new: str


PLANTED = (
    Planted(
        "restore with swapped strides",
        "swap.devices.ram.device",
        "RamDevice.view",
        "layout.strides",
        "layout.strides[::-1]",
    ),
    Planted(
        "restore at the start of the storage",
        "swap.devices.ram.device",
        "RamDevice.view",
        "origin + layout.offset",
        "origin",
    ),
    Planted(
        "skip the look for an alias",
        "swap.manager",
        "SwapManager.save",
        "self._transfers.find(location.owner)",
        "None",
    ),
    Planted(
        "lose an attribute",
        "graph.attributes",
        "save_attributes",
        "attributes[name] = replacement",
        "attributes.pop(name)",
    ),
    Planted(
        "lose an item of a tuple",
        "graph.attributes",
        "PackedTuple.get",
        "item.get() if type(item) is PackedArray else item",
        "None if type(item) is PackedArray else item",
    ),
    Planted(
        "keep a stale copy after an edit",
        "swap.transfers",
        "Transfers.mark_dirty",
        "storage.state is State.BOTH",
        "False",
    ),
    Planted(
        "keep a stale copy after an edit while it is written",
        "swap.transfers",
        "Transfers.end_out",
        "storage.dirty",
        "False",
    ),
    Planted(
        "no fetch after disable()",
        "graph.nodes",
        "_get_data",
        "type(data) is PackedArray",
        "type(data) is PackedArray and __import__('chainer_ooc').is_enabled()",
    ),
    Planted(
        "release what is held",
        "swap.storage",
        "Storage.referenced_externally",
        'references.attribute_is_referenced_externally(self, "owner")',
        "False",
    ),
    Planted(
        "do not wait for what comes in",
        "swap.transfers",
        "Transfers._join_arrival",
        "transfer.join()",
        "None",
    ),
    Planted(
        "never give the space of the dead back",
        "swap.transfers",
        "Transfers.run_deferred_frees",
        "copy.free()",
        "None",
    ),
    Planted("trust everybody", "swap.manager", "SwapManager.read", "not read_only", "False"),
    Planted(
        "save leaves",
        "graph.nodes",
        "save_inputs",
        "node is not None and node._creator_node is not None",
        "node is not None",
    ),
    Planted(
        "drop before the last use",
        "swap.manager",
        "SwapManager.release_use",
        "s.used and not (s.kept or s.dependents)",
        "True",
    ),
    Planted(
        "take fingerprints in no order with other streams",
        "swap.devices.cuda.fingerprints",
        "Fingerprints._begin_sum",
        "self._streams.order_computing()",
        "None",
    ),
    Planted(
        "compare fingerprints in no order with other streams",
        "swap.devices.cuda.fingerprints",
        "Fingerprints._begin_compare",
        "self._streams.order_computing()",
        "None",
    ),
    Planted(
        "do not wait for the flag",
        "swap.devices.cuda.fingerprints",
        "_Comparison.equal",
        "self._event.synchronize()",
        "None",
    ),
    Planted(
        "use a flag again while it is copied",
        "swap.devices.cuda.fingerprints",
        "Fingerprints._take_flag",
        "self._streams.has_passed(self._retired[0][1])",
        "True",
    ),
    Planted(
        "compare only checksums",
        "swap.devices.cuda.fingerprints",
        "Fingerprints.compare",
        "first.nbytes != second.nbytes",
        "False",
    ),
    Planted(
        "compare only the last few pairs",
        "swap.devices.cuda.fingerprints",
        "Fingerprints._begin_compare",
        "start > 0",
        "0",
    ),
    Planted(
        "trust a constant once it is copied",
        "swap.recipe",
        "Constant.pairs",
        "self._of_copy if self.is_kept else self._look()",
        "self._fingerprint if self.is_kept else self._look()",
    ),
    Planted(
        "take no second look at a constant",
        "swap.transfers",
        "Transfers.begin_discard",
        "Both(verdict, self.device.compare(pairs))",
        "verdict",
    ),
    Planted(
        "discard before it is known",
        "swap.transfers",
        "Transfers.end_discard",
        "storage.verdict.equal()",
        "True",
    ),
    Planted(
        "discard what somebody has got meanwhile",
        "swap.transfers",
        "Transfers.end_discard",
        "not is_unchanged or storage.referenced_externally",
        "not is_unchanged",
    ),
    Planted(
        "go on checking what is written to",
        "swap.transfers",
        "Transfers.mark_dirty",
        "storage.state is State.CHECKING",
        "False",
    ),
    Planted(
        "go on checking what is made from what is written to",
        "swap.manager",
        "SwapManager.make_dependents",
        "dependent.state is State.CHECKING",
        "False",
    ),
    Planted(
        "fetch what another re-run has made",
        "swap.manager",
        "SwapManager.make_dependents",
        "dependent.state is State.DISCARDED",
        "True",
    ),
    Planted(
        "keep silent about a wrong re-run that is known late",
        "swap.transfers",
        "Transfers.check_remade",
        "not is_right",
        "False",
    ),
    Planted(
        "check all at once",
        "planning.eviction",
        "Evictor.push_out",
        "freed + size[State.GOING_OUT] + size[State.CHECKING]",
        "freed + size[State.GOING_OUT]",
    ),
    Planted(
        "leave what may not be discarded",
        "planning.eviction",
        "Evictor.push_out",
        "checked and freed < nbytes",
        "False",
    ),
)
