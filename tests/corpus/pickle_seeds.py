"""Makes tests/corpus/pickles: small files of every kind that the restricted reader meets.

`python tests/corpus/pickle_seeds.py` writes them anew; the files are kept so that the fuzzing starts from
the same inputs everywhere. The hostile ones are the bytes of `hostile`.
"""

from __future__ import annotations

import io
import pickle  # noqa: TID251  # it writes the seeds, and reads nothing
import struct
from pathlib import Path

FOLDER = Path(__file__).parent / "pickles"


def text(value):
    """A string as protocol 4 writes it."""
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data


def name(module, attribute):
    """A name as protocol 4 writes it."""
    return text(module) + text(attribute) + b"\x93"


def hostile(canary="/tmp/canary"):
    """Name -> a pickle that would write the file `canary` if a name in it were called."""
    command = f"echo executed > {canary}"
    code = f"open({canary!r}, 'w').write('executed')"
    system = name("os", "system") + text(command) + b"\x85R"
    getattr_ = name("builtins", "getattr")
    chain = (
        getattr_ + name("os", "__builtins__") + text("get") + b"\x86R" + text("eval") + b"\x85R"
    ) + (text(code) + b"\x85R")
    imported = name("builtins", "__import__") + text("os") + b"\x85R"
    nested = b"cbuiltins\neval\n" + text(code) + b"\x85R"
    inner = (
        b"\x80\x02cos\nsystem\nX" + struct.pack("<I", len(command)) + command.encode() + b"\x85R."
    )
    return {
        "os-system": b"\x80\x04" + system + b".",
        "os-system-protocol-0": f"cos\nsystem\n(S'{command}'\ntR.".encode(),
        "posix-system": b"\x80\x04" + name("posix", "system") + text(command) + b"\x85R.",
        "nt-system": b"\x80\x04" + name("nt", "system") + text(command) + b"\x85R.",
        "eval": b"\x80\x04" + nested + b".",
        "eval-python-2": b"c__builtin__\neval\n" + text(code) + b"\x85R.",
        "exec": b"\x80\x04" + name("builtins", "exec") + text(code) + b"\x85R.",
        "compile-exec": b"\x80\x04"
        + (name("builtins", "exec") + name("builtins", "compile") + text(code))
        + (text("x") + text("exec") + b"\x87R\x85R."),
        "nested-reduce": b"\x80\x04(" + system + system + b"\x86" + nested + b"t.",
        "getattr-chain": b"\x80\x04" + chain + b".",
        "getattr-of-import": b"\x80\x04"
        + (getattr_ + imported + text("system") + b"\x86R" + text(command) + b"\x85R."),
        "dotted-name": b"\x80\x04" + name("os", "path.os.system") + text(command) + b"\x85R.",
        "subprocess": b"\x80\x04"
        + (name("subprocess", "check_output") + b"]" + text("sh") + b"a" + text("-c") + b"a")
        + (text(command) + b"a\x85R."),
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text(command) + b"o.",
        "newobj": b"\x80\x04" + name("os", "system") + text(command) + b"\x85\x81.",
        "newobj-ex": b"\x80\x04" + name("os", "system") + text(command) + b"\x85}\x92.",
        "ext-1": b"\x80\x02\x82\x01" + text(command) + b"\x85R.",
        "ext-4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "persistent-id": b"P" + command.encode() + b"\n.",
        "binary-persistent-id": b"\x80\x04" + system + b"Q.",
        "build": b"\x80\x04"
        + (name("builtins", "object") + b")\x81}" + text("__setstate__"))
        + (name("os", "system") + b"sb" + text(command) + b"b."),
        "dict-item": b"\x80\x04}" + text("ema") + system + b"s.",
        "set-item": b"\x80\x04\x8f(" + system + b"\x90.",
        "key": b"\x80\x04}" + system + b"Ns.",
        "memoized": b"\x80\x04"
        + name("os", "system")
        + b"\x940"
        + b"h\x00"
        + text(command)
        + b"\x85R.",
        "partial": b"\x80\x04"
        + (
            name("functools", "partial")
            + name("os", "system")
            + b"\x85R"
            + text(command)
            + b"\x85R."
        ),
        "import-module": b"\x80\x04"
        + name("importlib", "import_module")
        + text("antigravity")
        + b"\x85R.",
        "runpy": b"\x80\x04" + name("runpy", "_run_code") + text(code) + b"}\x86R.",
        "torch-load": b"\x80\x04" + name("torch", "load") + text(canary) + b"\x85R.",
        "storage-bytes": b"\x80\x04"
        + (name("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(inner)) + inner)
        + b"\x85R.",
        "tensor-type": b"\x80\x04"
        + (name("torch._tensor", "_rebuild_from_type_v2") + b"(" + name("os", "system") + b"N")
        + (text(command) + b"\x85}tR."),
        "defaultdict": b"\x80\x04" + name("collections", "defaultdict") + system + b"\x85R.",
        "persistence": b"\x80\x04"
        + (name("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}(")
        + (
            text("type")
            + text("class")
            + text("module_src")
            + text(f"import os; os.system({command!r})")
        )
        + (text("class_name") + text("Net") + text("state") + b"}u\x85R."),
        "two-pickles": b"\x80\x04N." + system + b".",
        "os-remove": b"\x80\x04" + name("os", "remove") + text(canary) + b"\x85R.",
    }


def bombs():
    """Name -> a pickle that asks for far more memory or depth than its size."""
    levels = b"".join(b"\x94h" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200))
    return {
        "laughs": b"\x80\x04]" + levels + b".",
        "deep-list": b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".",
        "deep-tuple": b"\x80\x04)" + b"\x85" * 5000 + b".",
        "cycle": b"\x80\x04]\x94h\x00a.",
        "memo-index": b"\x80\x04Nr\xff\xff\xff\xff.",
        "text-size": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "bytes-size": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xff.",
        "frame-size": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
        "integer": b"\x80\x04\x8b\xff\xff\xff\x7f.",
        "hash": b"\x80\x04)" + b"\x94h\x00h\x00\x86" * 40 + b"}" + b"h\x00Ns.",
    }


def honest():
    """Name -> a file of a kind that real tools write."""
    import numpy as np
    import torch

    plain = {"a": [1, -(2**70), 0.5, None, True], "b": ("x", b"y" * 9, {3, 4}), "c": {"d": "ü"}}
    tensors = {
        "w": torch.arange(6.0).reshape(2, 3).half(),
        "b": torch.ones(3, dtype=torch.bfloat16),
    }
    tensors["t"] = tensors["w"].t()
    state = {"initted": torch.tensor(True), "step": torch.tensor(20), "ema_model.w": tensors["w"]}
    arrays = {"f": np.arange(6, dtype="f4").reshape(2, 3).T, "s": np.float64(2.5)}
    seeds = {f"plain-{p}.pkl": pickle.dumps(plain, p) for p in range(6)}
    for protocol in (2, 4):
        seeds[f"tensors-{protocol}.pkl"] = pickle.dumps(tensors, protocol)
        seeds[f"arrays-{protocol}.pkl"] = pickle.dumps(arrays, protocol)
    seeds["module.pkl"] = pickle.dumps(torch.nn.BatchNorm1d(2), 4)
    for kind, zipped in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
        seeds[f"state-{kind}.pt"] = buffer.getvalue()
    return seeds


def main():
    FOLDER.mkdir(exist_ok=True)
    seeds = {f"hostile-{key}.pkl": data for key, data in hostile().items()}
    seeds |= {f"bomb-{key}.pkl": data for key, data in bombs().items()}
    for key, data in (seeds | honest()).items():
        (FOLDER / key).write_bytes(data)


if __name__ == "__main__":
    main()
