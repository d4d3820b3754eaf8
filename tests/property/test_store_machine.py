"""Any sequence of what can be done to a store leaves it whole: a state machine of random histories."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from posthoc_ema import (
    NewAverage,
    PhemaWarning,
    PointProfile,
    PowerProfile,
    SnapshotStore,
    TensorEntry,
    TensorTable,
    synthesize,
)
from posthoc_ema.codecs import CODECS
from posthoc_ema.snapshot import is_snapshot_file_name, kind_of
from posthoc_ema.synthesis.plan import plan_synthesis

TABLE = TensorTable(
    {
        "w": TensorEntry(
            "w", (5, 20), "float32", True
        ),  # more than one block of int8, the last one short
        "gain": TensorEntry("gain", (), "bfloat16", True),
        "empty": TensorEntry("empty", (0, 3), "float32", True),
        "steps": TensorEntry("steps", (2,), "int64", False),
    },
    {"tied": "w"},
)
AVERAGED = [e for e in TABLE.entries.values() if e.averaged]
LENGTHS = (0.03, 0.05, 0.1, 0.2)


class StoreMachine(RuleBasedStateMachine):
    """A store beside a dict of what it should hold: (time, kind of the average) -> tensors."""

    def __init__(self):
        super().__init__()
        self.top = Path(tempfile.mkdtemp())
        self.folder = self.top / "store"
        self.expected = {}

    @initialize()
    def create(self):
        self.store = SnapshotStore.create(self.folder, clock="steps", table=TABLE, run_id="r")

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.top)

    # ---- what a run does

    @property
    def last(self):
        return max((time for time, _ in self.expected), default=0)

    @rule(
        step=st.integers(1, 500),
        lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3, unique=True),
        codec=st.sampled_from(CODECS),
        raw=st.booleans(),
        drift=st.sampled_from([0.0, 1e-3, 1.0]),
        seed=st.integers(0, 2**20),
    )
    def add(self, step, lengths, codec, raw, drift, seed):
        """One more snapshot; its values are near those of the one before, or far from them."""
        time, rng = self.last + step, np.random.default_rng(seed)
        profiles = [PowerProfile(time, s) for s in lengths] + [PointProfile(time)] * raw
        steps = np.array([time, seed])
        new = []
        for profile in profiles:
            values = {
                e.name: (1 + drift * rng.normal(size=e.shape)).astype(np.float32) for e in AVERAGED
            }
            new.append(NewAverage(profile, codec, {**values, "steps": steps}.__getitem__))
            self.expected[time, kind_of(profile)] = {**values, "steps": steps}
        if raw:
            kept = kind_of(PointProfile(time))
            self.expected = {k: v for k, v in self.expected.items() if k[1] != kept or k[0] == time}
        self.store.add(time, new)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def add_what_is_there(self, data):
        """Adding an average again changes nothing."""
        record = data.draw(st.sampled_from(self.store.records))
        self.store.add(
            record.time, [NewAverage(record.profile, "float32", lambda name: 1 / 0)], False
        )

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def remove(self, data):
        """Averages go; what was stored as a difference to them stays."""
        records = self.store.records
        gone = data.draw(st.lists(st.sampled_from(records), min_size=1, unique_by=lambda r: r.file))
        self.store.remove(gone)
        for record in gone:
            del self.expected[record.time, kind_of(record.profile)]

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), damage=st.sampled_from(["gone", "cut", "byte"]))
    def damage_and_drop(self, data, damage):
        """`verify` names a damaged file and what it takes along; `drop` leaves the others whole."""
        record = data.draw(st.sampled_from(self.store.records))
        path = self.store.path(record)
        content = bytearray(path.read_bytes())
        if damage == "byte":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
        path.unlink()
        if damage != "gone":
            path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
        (problem,) = self.store.verify()
        assert problem.file == record.file
        lost = self.store.drop([record])
        assert {r.file for r in lost} == {record.file, *problem.takes_along}
        for one in lost:
            del self.expected[one.time, kind_of(one.profile)]

    @rule(back=st.integers(0, 1000))
    def resume(self, back):
        """The run was killed and goes on at an earlier time, with a half-written file lying about."""
        time = max(self.last - back, 0)
        self.store.close()
        (self.folder / "000000000007-sigma_rel-0.07.safetensors").write_bytes(b"half")
        (self.folder / ".tmp-x-0123abcd").write_bytes(b"half")
        self.store = SnapshotStore.resume(
            self.folder, run_id="r", clock="steps", table=TABLE, time=time
        )
        self.expected = {k: v for k, v in self.expected.items() if k[0] <= time}

    @precondition(lambda self: self.expected)
    @rule()
    def rebuild(self):
        """The manifest is lost; the files hold all that it held."""
        before = self.store.records
        self.store.close()
        (self.folder / "manifest.json").unlink()
        after = SnapshotStore.rebuild(self.folder)
        assert [_without_noise(r) for r in after.records] == [_without_noise(r) for r in before]
        # The noise of a file is that of its writing; what bases added later stands in the manifest.
        self.store = SnapshotStore.edit(self.folder)
        assert after.table == TABLE

    @rule()
    def reopen(self):
        self.store.close()
        self.store = SnapshotStore.edit(self.folder)

    # ---- what holds always

    @invariant()
    def holds_what_was_stored(self):
        found = {(r.time, kind_of(r.profile)): r for r in self.store.records}
        assert found.keys() == self.expected.keys()
        for key, record in found.items():
            errors = []
            with self.store.read(record) as reader:
                for entry in TABLE.entries.values():
                    wanted = self.expected[key][entry.name]
                    if entry.averaged:
                        got = reader.values(entry, 0, wanted.size).reshape(entry.shape)
                        errors.append((got - wanted).ravel())
                    else:
                        np.testing.assert_array_equal(reader.copy(entry), wanted)
            square = float(np.mean(np.concatenate(errors) ** 2))
            # Rounding to float32 at each link is not counted; the values are near 1.
            assert square <= 4 * record.noise + 1e-12, (record, square)

    @invariant()
    def nothing_else_lies_there(self):
        listed = {r.file for r in self.store.records}
        present = {p.name for p in self.folder.iterdir() if is_snapshot_file_name(p.name)}
        assert present == listed
        assert list(self.store.verify()) == []
        assert SnapshotStore.open(self.folder).records == self.store.records

    @precondition(lambda self: self.store.averages and self.expected)
    @rule(sigma_rel=st.sampled_from([0.025, 0.07, 0.15]))
    def synthesize(self, sigma_rel):
        """A synthesized average is the combination of what the store gives back, one by one."""
        plan = plan_synthesis(self.store, [sigma_rel])
        total = {e.name: np.zeros(e.shape) for e in AVERAGED}
        for record, x in zip(plan.inputs, plan.coefficients[:, 0], strict=True):
            with self.store.read(record) as reader:
                for entry in AVERAGED:
                    values = reader.values(entry, 0, total[entry.name].size)
                    total[entry.name] += x * values.reshape(entry.shape)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", PhemaWarning
            )  # lengths that cannot be told: not asked here
            made = synthesize(self.store, sigma_rel)
        for name, values in made.items():
            if name in total:
                scale = 1e-5 * np.abs(plan.file_coefficients).sum()
                np.testing.assert_allclose(values, total[name], rtol=0, atol=scale + 1e-5)

    @rule()
    def close(self):
        """A closed store leaves only what belongs to it."""
        self.store.close()
        names = {p.name for p in self.folder.iterdir()} - {".lock", "manifest.json"}
        assert names - {"manifest.json.old"} == {r.file for r in self.store.records}
        self.store = SnapshotStore.edit(self.folder)


def _without_noise(record):
    return (record.file, record.time, record.profile, record.dtype, record.bases, record.file_bytes)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=150,
    stateful_step_count=14,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
