"""An interruption at any point of `add` leaves a store whose files and manifest agree."""

import pytest

from posthoc_ema import SnapshotStore, SnapshotWriteError, tensor_files
from posthoc_ema.tensor_files import is_temporary_name

from .stores import TABLE, averages_of, make_store


class Interrupter:
    """Raises at the n-th call of a function, before or after the function does its work."""

    def __init__(self, function, number, error, after):
        self.function, self.left, self.error, self.after = function, number, error, after

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        result = self.function(*args, **options)
        if self.left == 0:
            raise self.error
        return result


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("name", ["fsync_directory", "os.fsync"])
def test_files_and_manifest_agree_after_an_interruption(
    tmp_path, monkeypatch, name, number, after, error
):
    make_store(tmp_path / "store", times=(10, 20))
    with SnapshotStore.resume(
        tmp_path / "store", run_id="run-1", clock="images", table=TABLE, time=20
    ) as store:
        owner, attribute = (tensor_files.os, "fsync") if "." in name else (tensor_files, name)
        interrupter = Interrupter(getattr(owner, attribute), number, error, after)
        with monkeypatch.context() as patched:
            patched.setattr(owner, attribute, interrupter)
            if number > (4 if name == "fsync_directory" else 8):
                store.add(30, averages_of(30))
            else:
                with pytest.raises((KeyboardInterrupt, SnapshotWriteError)):
                    store.add(30, averages_of(30))
        on_disk = SnapshotStore.open(store.folder)
        assert store.records == on_disk.records
        assert on_disk.times in ([10, 20], [10, 20, 30])
        assert {what.file for what in on_disk.verify()} <= {"000000000020-raw.safetensors"}
        assert not [path for path in store.folder.iterdir() if is_temporary_name(path.name)]
        store.add(40, averages_of(40))
    again = SnapshotStore.open(store.folder)
    assert again.times[-1] == 40
    assert {what.file for what in again.verify()} <= {"000000000020-raw.safetensors"}
